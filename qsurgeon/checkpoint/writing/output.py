"""From a layout to a folder: a run that fills the files of weights, can resume, and appears when it is whole."""

import datetime
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsurgeon.checkpoint.reading.files import INDEX, copy_companions, write_json
from qsurgeon.checkpoint.reading.headers import Tensor
from qsurgeon.checkpoint.writing import journal
from qsurgeon.checkpoint.writing.journal import Entry
from qsurgeon.checkpoint.writing.layout import Layout
from qsurgeon.checkpoint.writing.progress import Estimate, Events
from qsurgeon.checkpoint.writing.ranks import Ranks
from qsurgeon.checkpoint.writing.staging import partial_of, staged
from qsurgeon.checkpoint.writing.stream import SLAB, Stream
from qsurgeon.errors import CheckpointError, in_words
from qsurgeon.reading import read_json

ALONE = Ranks()
SLABS = 8  # that a thread holds at once, with what is made of one in between


@dataclass(frozen=True)
class Output:
    """A folder to be made of another one.

    beside: bytes of what is copied and is no weight. run: what the bytes depend on, and how to find that out again.
    notes: what the user hears of before weights are written. workers: threads, None for one a core. allow_nonfinite:
    whether NaN and infinity are written as well.
    """

    source: Path
    destination: Path
    layout: Layout
    beside: int
    run: Callable[[], Mapping[str, Any]]
    notes: tuple[str, ...] = ()
    workers: int | None = None
    allow_nonfinite: bool = False


@contextmanager
def kept(destination: Path) -> Iterator[None]:
    """Let what stops the block say that finished work is kept, if it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{in_words(error)}{kept_words(destination)}") from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(kept_words(destination) or "; nothing was written") from stop


def lead(
    output: Output,
    events: Events,
    finish: Callable[[Path, Mapping[str, Entry]], None],
    here: Ranks = ALONE,
) -> None:
    """Make the folder: this process's files, and what there is one of, which ``finish`` writes.

    ``finish`` is called with the folder and what is known of each tensor that was written, by its name, once the
    weights, their index and the companions are there.

    Raises: CheckpointError for a source that changed meanwhile, or that has NaN or infinity; OSError.
    """
    run = output.run()
    with staged(output.destination, resumable=True) as folder:
        partial = partial_of(output.destination)
        resumed = journal.begin(partial, run)
        done = journal.entries(partial)
        _check_space(output, folder)
        if resumed:
            events.note(
                f"{partial} is an unfinished run of this: {len(done)} of {len(output.layout.jobs)} tensors are done"
            )
        for note in output.notes:
            events.note(note)
        fill(output, events, here)
        entries = journal.entries(partial)
        _check_entries(output, folder, entries)
        if output.run() != run:
            raise CheckpointError(f"{output.source} changed while it was read")
        copy_companions(output.source, folder)
        _write_index(output, folder)
        finish(folder, entries)


def fill(output: Output, events: Events, here: Ranks = ALONE) -> None:
    """Write this process's files, between two waits: until there is a folder, and until all files are whole."""
    here.wait()
    shards = here.mine(output.layout.shards)
    workers = output.workers or _cores()
    partial = partial_of(output.destination)
    done = journal.entries(partial)
    layout = Layout(shards)
    events.begin(Estimate(layout.read, layout.written, len(shards), _memory(layout, workers)))
    own = journal.Journal(partial, here.rank)
    try:
        Stream(partial / output.destination.name, own, events, workers).run(shards, done)
    finally:
        own.close()
    here.wait()


def identities(files: Iterable[Path]) -> dict[str, Any]:
    """Return what tells each file from an earlier or later one, by its name."""
    return {file.name: _identity(file) for file in sorted(files)}


def files_of(tensors: Mapping[str, Tensor]) -> set[Path]:
    """Return the files that ``tensors`` are in."""
    return {tensor.file for tensor in tensors.values()}


def hash_of(data: bytes) -> str:
    """Return the SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def kept_words(destination: Path) -> str:
    """Return the end of an error message: that another run need not do everything again."""
    partial = partial_of(destination)
    return f"; finished work is kept in {partial}, and the same command resumes it" if partial.is_dir() else ""


def _identity(file: Path) -> dict[str, Any]:
    found = file.stat()
    when = datetime.datetime.fromtimestamp(found.st_mtime_ns // 10**9, datetime.UTC)
    return {"size": found.st_size, "date": f"{when:%Y-%m-%d %H:%M:%S}.{found.st_mtime_ns % 10**9:09} UTC"}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory(layout: Layout, workers: int) -> int:
    return workers * (SLABS * SLAB + max((job.held for job in layout.jobs.values()), default=0))


def _check_space(output: Output, folder: Path) -> None:
    there = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    needed, free = output.layout.written + output.beside - there, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{folder}: {needed / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free")


def _check_entries(output: Output, folder: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse an output of which something was not written, or should not be."""
    jobs = output.layout.jobs
    missing = [name for name in jobs if name not in entries]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors were not written, such as {missing[0]}")
    broken = [job.source.name for name, job in jobs.items() if not entries[name].finite]
    if broken and not output.allow_nonfinite:
        names = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise CheckpointError(
            f"{output.source} has NaN or infinity in {names}. With --allow-nonfinite they are written all the same"
            f"{kept_words(output.destination)}"
        )


def _write_index(output: Output, folder: Path) -> None:
    weight_map = output.layout.weight_map
    there = output.source / INDEX
    index = read_json(there) if there.is_file() else {}
    if index.get("weight_map") == weight_map and isinstance(index.get("metadata"), dict):
        shutil.copyfile(there, folder / INDEX)
    elif len(output.layout.shards) > 1:
        size = sum(job.size for job in output.layout.jobs.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
