"""Carry out the jobs of a layout: read a slab, round it if needed, write it; several slabs at a time.

A tensor passes through in slabs of whole rows, so that the memory a run takes depends on no tensor's size. Files are
read and written at given places by ordinary calls: what fails is an error, where a mapped file would kill the process.
"""

import os
import threading
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor as Values

from qsurgeon.checkpoint.reading.headers import FLOATS, Tensor
from qsurgeon.checkpoint.writing.journal import Entry, Journal
from qsurgeon.checkpoint.writing.layout import Encoded, Job, Packing, Piece, Shard
from qsurgeon.checkpoint.writing.progress import Events
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import Format, Quantized
from qsurgeon.layers import Weight

SLAB = 4 * 2**20  # bytes: small enough for a CPU's cache, large enough to make calls few


class _StoppedError(Exception):
    """Another thread failed, or the user did not want to wait: leave the job."""


@dataclass
class Stream:
    """Fills the files of ``folder`` with ``workers`` threads, and writes down in ``journal`` what is done."""

    folder: Path
    journal: Journal
    events: Events
    workers: int
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _handles: dict[Path, int] = field(default_factory=dict)
    _left: Counter[Path] = field(default_factory=Counter)  # jobs that need a file, of those that are not done

    def run(self, shards: Sequence[Shard], done: Mapping[str, Entry]) -> None:
        """Do every job that ``done`` does not name, or whose bytes are not what it says.

        Raises: OSError, and CheckpointError for a source that changes meanwhile.
        """
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for shard in shards:
                self._left[self.folder / shard.file] += len(shard.jobs)
                self._left.update(file for job in shard.jobs for file in job.files)
            tasks = [
                pool.submit(self._try, shard, job, done.get(job.name))
                for shard in shards
                # The longest first, so that no thread is left alone with it in the end.
                for job in sorted(shard.jobs, key=lambda one: -one.source.size)
            ]
            failed = []
            for task in as_completed(tasks):
                error = task.exception()
                if error is not None:
                    self._stop.set()
                    failed.append(error)
            # Those that were told to stop do not say why.
            for error in sorted(failed, key=lambda one: isinstance(one, _StoppedError)):
                raise error
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
            for handle in self._handles.values():
                os.close(handle)

    def _try(self, shard: Shard, job: Job, before: Entry | None) -> None:
        """Do a job; if it fails, none begins after it, however long it takes until ``run`` hears of it."""
        try:
            self._do(shard, job, before)
        except BaseException:
            self._stop.set()
            raise

    def _do(self, shard: Shard, job: Job, before: Entry | None) -> None:
        if self._stop.is_set():
            raise _StoppedError
        try:
            output = self._output(shard)
            if before is not None and self._is_written(job, output, before):
                entry = before
            else:
                entry = self._written(job, output)
                self.journal.add(job.name, entry)
            for file in job.files:
                self._leave(file)
            self._leave(self.folder / shard.file, flush=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(self.folder / shard.file)) from error
        if not entry.finite:
            with self._lock:
                self.events.note(f"{job.source.name} has values that are not finite")

    def _output(self, shard: Shard) -> int:
        path = self.folder / shard.file
        with self._lock:
            if path not in self._handles:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                self._handles[path] = handle
                os.ftruncate(handle, shard.size)
                _write(handle, memoryview(shard.header), 0)
            return self._handles[path]

    def _input(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)
            return self._handles[file]

    def _source(self, job: Job) -> "_Runs":
        return _Runs(tuple((self._input(run.file), run) for run in job.runs))

    def _leave(self, file: Path, *, flush: bool = False) -> None:
        """Close ``file`` if no other job needs it: a checkpoint may have more files than a process may open."""
        with self._lock:
            self._left[file] -= 1
            handle = None if self._left[file] else self._handles.pop(file, None)
        if handle is None:
            return
        try:
            if flush:
                os.fsync(handle)
        finally:
            os.close(handle)

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self.events.advance(count)

    def _is_written(self, job: Job, output: int, entry: Entry) -> bool:
        """Return whether the bytes that are there are those that an earlier process wrote."""
        for piece in job.pieces:
            crc = 0
            for start in range(0, piece.size, SLAB):
                count = min(SLAB, piece.size - start)
                data = os.pread(output, count, piece.start + start)
                crc = zlib.crc32(data, crc)
            if crc != entry.crcs.get(piece.name):
                return False
        self._advance(job.source.size)
        return True

    def _written(self, job: Job, output: int) -> Entry:
        if job.given is not None:
            return self._given(job, job.given, output)
        return self._copied(job, output) if job.packing is None else self._packed(job, job.packing, output)

    def _given(self, job: Job, data: bytes, output: int) -> Entry:
        (piece,) = job.pieces
        _write(output, memoryview(data), piece.start)
        return Entry({piece.name: zlib.crc32(data)}, finite=True)

    def _copied(self, job: Job, output: int) -> Entry:
        (piece,) = job.pieces
        source, crc, finite = self._source(job), 0, True
        buffer = _buffer(min(SLAB, job.source.size))
        for start in range(0, job.source.size, SLAB):
            data = buffer[: min(SLAB, job.source.size - start)]
            source.read(start, data)
            finite = finite and _is_finite(data, job.source.dtype)
            crc = zlib.crc32(_bytes(data), crc)
            _write(output, _bytes(data), piece.start + start)
            self._advance(len(data))
        return Entry({piece.name: crc}, finite)

    def _packed(self, job: Job, packing: Packing, output: int) -> Entry:
        slabs = self._rounded(job, packing.format) if job.encoded is None else self._decoded(job, job.encoded)
        finite, beside = True, None
        sinks = {piece.slot[0]: _Sink(piece, output) for piece in job.pieces if piece.slot is not None}
        for quantized, slab_is_finite, size in slabs:
            finite = finite and slab_is_finite
            beside = packing.encoding.beside(quantized, beside)
            for key, values in packing.encoding.encode(quantized).items():
                sinks[key].take(values)
            self._advance(size)
        return Entry({sink.piece.name: sink.end() for sink in sinks.values()}, finite, beside)

    def _rounded(self, job: Job, format: Format) -> Iterator["_Slab"]:
        """Yield a weight in full precision as it is rounded, slab by slab."""
        slabs = _Slabs(self._source(job), job.source, format, job.weight)
        tops = [format.peak(slab) for slab in slabs] if format.tensor_scale == "tensor" else []
        top = torch.stack([one for one in tops if one is not None]).max() if tops else None
        for slab in slabs:
            yield format.quantize(slab, top=top), _is_finite(slab, job.source.dtype), slab.nbytes

    def _decoded(self, job: Job, encoded: Encoded) -> Iterator["_Slab"]:
        """Yield an encoded weight as it is stored, slab by slab."""
        packing, columns = encoded.packing, encoded.columns
        height = packing.format.block_shape[0]
        most = max(1, SLAB // (columns * torch.float32.itemsize * height)) * height
        for start in range(0, encoded.rows, most):
            count, stored, size = min(most, encoded.rows - start), {}, 0
            for key, slot in packing.encoding.slots(packing.format, count, columns).items():
                tensor = encoded.tensors[key]
                data = _buffer(slot.bytes)
                _read(self._input(tensor.file), tensor, encoded.place(key, start), data)
                stored[key] = data.view(slot.dtype).view(slot.shape)
                size += slot.bytes if slot.rows is not None or not start else 0
            quantized = packing.encoding.decode(stored, packing.format, columns, encoded.dtype)
            yield quantized, quantized.is_finite, size


_Slab = tuple[Quantized, bool, int]  # what is to be stored, whether all of it is finite, and the bytes read for it


@dataclass
class _Sink:
    """Takes a tensor of an encoded weight slab by slab, and writes it where it belongs."""

    piece: Piece
    output: int
    _crc: int = 0
    _written: int = 0
    _held: list[Values] = field(default_factory=list)

    def take(self, values: Values) -> None:
        """Take the tensor of the next slab. One in which rows do not come first is written when it is whole."""
        assert self.piece.slot is not None
        rows = self.piece.slot[1].rows
        if rows:
            self._held.append(values)
        elif rows == 0 or not self._written:  # what all slabs share is whole with the first
            self._write(values)

    def end(self) -> int:
        """Write what is held, and return the checksum of all. Raises: CheckpointError for another size than planned."""
        if self._held:
            assert self.piece.slot is not None
            self._write(torch.cat(self._held, self.piece.slot[1].rows or 0))
        if self._written != self.piece.size:
            raise CheckpointError(f"{self.piece.name} has {self._written} bytes; its place is {self.piece.size}")
        return self._crc

    def _write(self, values: Values) -> None:
        data = _bytes(values.contiguous().view(-1).view(torch.uint8))
        if self._written + len(data) > self.piece.size:
            raise CheckpointError(f"{self.piece.name} has more bytes than its place, {self.piece.size}")
        self._crc = zlib.crc32(data, self._crc)
        _write(self.output, data, self.piece.start + self._written)
        self._written += len(data)


@dataclass(frozen=True)
class _Slabs:
    """A weight (outputs, inputs) in slabs of whole rows, and of whole blocks; each is valid until the next.

    A tensor that is stored as (inputs, outputs) is read in runs of its columns, so that a slab has whole rows as well.
    """

    source: "_Runs"
    tensor: Tensor
    format: Format
    weight: Weight

    def __iter__(self) -> Iterator[Values]:
        rows, columns = self.weight.row_shape(self.tensor.shape)
        dtype = FLOATS[self.tensor.dtype]
        row = columns * dtype.itemsize
        height = self.format.block_shape[0]
        # Stochastic rounding depends on a value's place in the whole.
        most = rows if self.format.rounding == "stochastic" else max(1, SLAB // (row * height)) * height
        buffer = _buffer(min(most, rows) * row)
        for start in range(0, rows, most):
            count = min(most, rows - start)
            data = buffer[: count * row]
            if self.weight.is_transposed:
                self._read_columns(start, count, data)
                yield data.view(dtype).view(columns, count).mT
            else:
                self.source.read(start * row, data)
                yield data.view(dtype).view(count, columns)

    def _read_columns(self, start: int, count: int, data: Values) -> None:
        """Fill ``data`` with ``count`` columns of the tensor as it is stored, from column ``start`` on."""
        width = self.tensor.shape[1]
        size = FLOATS[self.tensor.dtype].itemsize
        if count == width:
            self.source.read(0, data)
            return
        for at, part in enumerate(data.view(-1, count * size)):
            self.source.read((at * width + start) * size, part)


@dataclass(frozen=True)
class _Runs:
    """Tensors of open files that are read as if they were one, each where the one before it ends."""

    runs: tuple[tuple[int, Tensor], ...]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((run.size for _, run in self.runs[:-1]), initial=0))

    def read(self, start: int, data: Values) -> None:
        """Fill ``data`` with the bytes from ``start`` on."""
        at = bisect_right(self._starts, start) - 1
        while data.numel():
            handle, run = self.runs[at]
            inside = start - self._starts[at]
            count = min(run.size - inside, data.numel())
            _read(handle, run, inside, data[:count])
            start, data, at = start + count, data[count:], at + 1


def _buffer(size: int) -> Values:
    return torch.empty(size, dtype=torch.uint8)


def _bytes(data: Values) -> memoryview:
    """Return the memory of ``data``, uint8 and contiguous."""
    return memoryview(data.numpy()).cast("B")  # type: ignore[arg-type]  # an array is a buffer


def _read(handle: int, tensor: Tensor, start: int, data: Values) -> None:
    """Fill ``data`` with the tensor's bytes from ``start`` on."""
    view, place = _bytes(data), tensor.start + start
    while view:
        try:
            count = os.preadv(handle, [view], place)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, reading {tensor.name}", str(tensor.file)) from error
        if not count:
            raise CheckpointError(f"{tensor.file}: ends inside of {tensor.name}; it was cut short while it was read")
        view, place = view[count:], place + count


def _write(handle: int, view: memoryview, place: int) -> None:
    while view:
        count = os.pwrite(handle, view, place)
        view, place = view[count:], place + count


def _is_finite(data: Values, dtype: str) -> bool:
    """Return whether all values are finite; those of dtypes that are not ordinary floats are taken to be."""
    if dtype not in FLOATS or not data.numel():
        return True
    # NaN is the least and the greatest of what has one; torch.isfinite takes four times as long.
    low, high = torch.aminmax(data.view(FLOATS[dtype]))
    return bool(low.isfinite() and high.isfinite())
