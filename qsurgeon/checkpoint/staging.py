"""Output appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qsurgeon.errors import CheckpointError


def refuse_inside(final: Path, source: Path) -> None:
    """Do nothing if ``final`` may be written. Raises: CheckpointError if it is ``source``, or lies inside of it."""
    if final.resolve() == source.resolve():
        raise CheckpointError(f"{final} is the source itself; write somewhere else")
    if final.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{final} lies inside the source {source}; write somewhere else")


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``final`` only if the block ends well; after an error neither exists.

    Raises: CheckpointError if ``final`` is there already, or if its parent is not a folder that can be written.
    """
    if final.exists() or final.is_symlink():
        raise CheckpointError(f"{final} exists; name another folder, or remove it first")
    partial = final.with_name(f"{final.name}.partial")
    if partial.exists():
        raise CheckpointError(
            f"{partial} exists: another run is writing it, or one was killed; remove it if none is running"
        )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{final} cannot be written: {error.strerror}") from error
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(final.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
