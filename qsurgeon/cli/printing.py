"""Printing: text from other sources never reaches the terminal as more than text."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qsurgeon.cli.streams import write
from qsurgeon.visible import one_line, visible


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text of several lines, whose line breaks are ours, on stdout or on stderr."""
    write(visible(text) + ("\n" if nl else ""), err=err)


def echo_line(text: str, *, err: bool = False) -> None:
    """Print one line, whatever the names in it."""
    write(one_line(text) + "\n", err=err)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802  # logging's name
        return _indented(super().getMessage())


@contextmanager
def tamed_messages() -> Iterator[None]:
    """Escape what other libraries log or warn of while the block runs, because they quote config.json as it is.

    The second and later lines of a message are indented, so that none of them can be taken for a line of ours.
    """
    form, factory = warnings.formatwarning, logging.getLogRecordFactory()

    def warning(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        return form(_indented(str(message)), category, filename, lineno, line)

    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form


def _indented(text: str) -> str:
    return visible(text).replace("\n", "\n    ")
