"""Ctrl-C waits while a model is in a state that it must not be left in."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qsurgeon.telling import say


class Interrupts:
    """What came while a block was ``uninterrupted``."""

    def __init__(self) -> None:
        self.depth = 0
        self.error: BaseException | None = None
        self.signals: list[tuple[Any, ...]] = []

    def keep(self, error: BaseException) -> None:
        """Raise ``error`` at the end of the block, and not before."""
        self.error = self.error or error

    def receive(self, *received: Any) -> None:
        """Be the handler of a signal."""
        if not self.signals:
            say("interrupted; the model is changed as a whole first, since packed weights have no way back")
        self.signals.append(received)


class _Here(threading.local):
    def __init__(self) -> None:
        self.interrupts = Interrupts()


_here = _Here()


@contextmanager
def uninterrupted() -> Iterator[Interrupts]:
    """Let Ctrl-C wait until the block, or the one around it, is done; it is raised then.

    Python hands signals to the main thread alone, so that other threads have nothing to wait with.
    """
    found = _here.interrupts
    handler = signal.getsignal(signal.SIGINT) if not found.depth else None
    # None: a handler that Python did not install. SIG_IGN: a program in the background, which no Ctrl-C is meant for.
    takes = handler not in (None, signal.SIG_IGN) and threading.current_thread() is threading.main_thread()
    if takes:
        signal.signal(signal.SIGINT, found.receive)
    found.depth += 1
    try:
        yield found
    finally:
        found.depth -= 1
        if not found.depth:
            _here.interrupts = Interrupts()
            if takes:
                signal.signal(signal.SIGINT, handler)
                if found.signals:
                    signal.raise_signal(signal.SIGINT)
    if not found.depth and found.error is not None:
        raise found.error
