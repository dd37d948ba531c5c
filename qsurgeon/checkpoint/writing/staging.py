"""Output appears completely or not at all: it is written to a folder beside its place and renamed at the end."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qsurgeon.checkpoint.reading.files import flush
from qsurgeon.checkpoint.writing.journal import RUN, entries
from qsurgeon.errors import CheckpointError

LOCK = "lock"


def refuse_inside(final: Path, source: Path) -> None:
    """Do nothing if ``final`` may be written. Raises: CheckpointError if it is ``source``, or lies inside of it."""
    if final.resolve() == source.resolve():
        raise CheckpointError(f"{final} is the source itself; write somewhere else")
    if final.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{final} is inside the source {source}; write somewhere else")


def refuse_taken(final: Path) -> None:
    """Do nothing if ``final`` is not there and can be. Raises: CheckpointError if it is; for a name that is no UTF-8.

    safetensors opens no path with such a name: what was written there, nothing could load.
    """
    try:
        str(final.absolute()).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{final}: a name that is not UTF-8, which safetensors cannot open; choose another"
        ) from error
    if final.exists() or final.is_symlink():
        raise CheckpointError(f"{final} exists; name another folder, or remove it first")


def partial_of(final: Path) -> Path:
    """Return the folder that ``final`` is made in, under its own name; what is known of the work lies there too."""
    return final.with_name(f"{final.name}.partial")


@contextlib.contextmanager
def staged(final: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yield a folder that becomes ``final`` only if the block ends well; no other process is in it meanwhile.

    After an error neither exists, unless the output is ``resumable`` and its journal says that something is done. Then
    the unfinished folder stays, and the next call yields it again.

    Raises: CheckpointError if ``final`` is there already, if another process is making it, or if its parent is not a
    folder that can be written.
    """
    refuse_taken(final)
    partial = partial_of(final)
    if partial.exists() and not (resumable and _is_unfinished(partial)):
        raise CheckpointError(
            f"{partial} exists: another run is writing it, or one was killed; remove it if none is running"
        )
    lock, folder = FileLock(partial / LOCK), partial / final.name
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:  # an OSError too
        raise CheckpointError(f"{final} is being written by another run, in {partial}") from error
    except OSError as error:
        raise CheckpointError(f"{final} cannot be written: {error.strerror}") from error
    try:
        refuse_taken(final)  # the run that had the lock may have ended well
        if not entries(partial):  # of a run that was killed before anything was done, nothing may end up in another's
            (partial / RUN).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        yield folder
        for path in (*folder.rglob("*"), folder):
            flush(path)
        folder.rename(final)
        flush(final.parent)
    finally:
        if not (resumable and folder.is_dir() and entries(partial)):
            shutil.rmtree(partial, ignore_errors=True)
        lock.release()
        with contextlib.suppress(OSError):  # NFS keeps a file that is open, and so the folder, until the lock is closed
            partial.rmdir()


def _is_unfinished(partial: Path) -> bool:
    """Return whether a folder is one that ``staged`` made, or might have: an empty one."""
    return partial.is_dir() and ((partial / LOCK).is_file() or not any(partial.iterdir()))
