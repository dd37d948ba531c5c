"""The layout of the output, decided before any value is read: files, headers, and the place of every tensor."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from qsurgeon.checkpoint.reading.headers import BITS, DTYPES, Tensor, read_header
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import Format
from qsurgeon.layers import Weight
from qsurgeon.layers.layer import ONE
from qsurgeon.storage import Encoding, Slot
from qsurgeon.storage.packed import WEIGHT

MAX_SHARD_SIZE = "5GB"
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[KMGT]?B)?", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FEW_BYTES = 10**6  # a file of less is not meant, if no unit says so
_ALIGNMENT = 8  # of where the data begin, as safetensors has it


@dataclass(frozen=True)
class Piece:
    """A tensor to be written, and where: ``start`` counts from the beginning of its file, in bytes.

    slot: which one of an encoded weight it is, and its name there; nothing for one that is copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int = 0
    slot: tuple[str, Slot] | None = None


@dataclass(frozen=True)
class Packing:
    """How a weight is rounded, and how what comes of it is stored."""

    format: Format
    encoding: Encoding


@dataclass(frozen=True)
class Encoded:
    """A weight (rows, columns) that is encoded already: its tensors by their names in the encoding.

    dtype: what its values are in, if they are asked for.
    """

    packing: Packing
    tensors: Mapping[str, Tensor]
    rows: int
    columns: int
    dtype: torch.dtype

    def place(self, key: str, row: int) -> int:
        """Return where in the tensor ``key`` the rows from ``row`` on begin, in bytes; ``row`` begins a block."""
        slot = self.packing.encoding.slots(self.packing.format, row, self.columns)[key] if row else None
        return 0 if slot is None or slot.rows is None else slot.bytes


@dataclass(frozen=True)
class Job:
    """A stored tensor to be read, and what is written of it: its own bytes, or codes and scales.

    packing: the format of these, and how they are stored; None for a copy.
    parts: where its bytes are, one after the other, if ``source`` is made of several stored tensors or of rows of them.
    weight: what the kind of its module says of it, if it is to be packed: in which dimension blocks run.
    encoded: how it is stored, if that is not in full precision: its codes are kept, and stored otherwise.
    given: the bytes that are written, if nothing is read for them.
    """

    source: Tensor
    packing: Packing | None
    pieces: tuple[Piece, ...]
    parts: tuple[Tensor, ...] = ()
    weight: Weight = ONE
    encoded: Encoded | None = None
    given: bytes | None = None

    @property
    def name(self) -> str:
        """What no other job is called: its first piece's name."""
        return self.pieces[0].name

    @property
    def runs(self) -> tuple[Tensor, ...]:
        """What is read, in its order."""
        if self.given is not None:
            return ()
        return tuple(self.encoded.tensors.values()) if self.encoded is not None else self.parts or (self.source,)

    @property
    def files(self) -> set[Path]:
        """The files that are read."""
        return {run.file for run in self.runs}

    @property
    def held(self) -> int:
        """How many bytes are held in memory, however small a slab is."""
        # Stochastic rounding depends on a value's place in the whole.
        whole = self.encoded is None and self.packing is not None and self.packing.format.rounding == "stochastic"
        pieces = sum(piece.size for piece in self.pieces if piece.slot is not None and piece.slot[1].rows)
        return pieces + (self.source.size if whole else 0)

    @property
    def size(self) -> int:
        """How many bytes are written."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Shard:
    """A file to be written: its header, and the jobs that fill the rest."""

    file: str
    header: bytes
    jobs: tuple[Job, ...]

    @property
    def size(self) -> int:
        """The file's length in bytes."""
        return len(self.header) + sum(job.size for job in self.jobs)


@dataclass(frozen=True)
class Layout:
    """Every file of weights to be written."""

    shards: tuple[Shard, ...]

    @cached_property
    def jobs(self) -> dict[str, Job]:
        """All jobs by name."""
        return {job.name: job for shard in self.shards for job in shard.jobs}

    @property
    def read(self) -> int:
        """How many bytes of tensors are read."""
        return sum(job.source.size for job in self.jobs.values())

    @property
    def written(self) -> int:
        """How many bytes of files are written."""
        return sum(shard.size for shard in self.shards)

    @property
    def weight_map(self) -> dict[str, str]:
        """The file of every tensor, as an index has it."""
        return {piece.name: shard.file for shard in self.shards for job in shard.jobs for piece in job.pieces}


def copied(tensor: Tensor, name: str | None = None) -> Job:
    """Return the job that copies a tensor's bytes, under its own name or another."""
    return Job(tensor, None, (Piece(name or tensor.name, tensor.dtype, tensor.shape, tensor.size),))


def packed(tensor: Tensor, packing: Packing, name: str | None = None, weight: Weight = ONE) -> Job:
    """Return the job that writes the codes and scales of a weight, which is named ``….weight``.

    They are of the weight as (outputs, inputs); ``weight`` says how the tensor is laid out.
    """
    rows, columns = weight.row_shape(tensor.shape)
    slots = packing.encoding.slots(packing.format, rows, columns)
    return Job(tensor, packing, _pieces(name or tensor.name, slots), weight=weight)


def _pieces(name: str, slots: Mapping[str, Slot]) -> tuple[Piece, ...]:
    stem = name.removesuffix(WEIGHT)
    return tuple(
        Piece(f"{stem}{key}", DTYPES[slot.dtype], slot.shape, slot.bytes, slot=(key, slot))
        for key, slot in slots.items()
    )


def recoded(name: str, encoded: Encoded, encoding: Encoding) -> Job:
    """Return the job that stores an encoded weight by another ``encoding``, with the codes and scales that it has.

    name: of the module's weight, ``….weight``; the tensors are named as ``encoding`` says.
    """
    first = next(iter(encoded.tensors.values()))
    source = replace(
        first, shape=(encoded.rows, encoded.columns), size=sum(one.size for one in encoded.tensors.values())
    )
    packing = Packing(encoded.packing.format, encoding)
    slots = encoding.slots(packing.format, encoded.rows, encoded.columns)
    return Job(source, packing, _pieces(name, slots), encoded=encoded)


def given(name: str, value: torch.Tensor) -> Job:
    """Return the job that writes a tensor that is known already."""
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    piece = Piece(name, DTYPES[value.dtype], tuple(value.shape), len(data))
    return Job(Tensor(name, Path(), piece.shape, piece.dtype, 0, 0), None, (piece,), given=data)


def mirrored(file: Path, name: str) -> Shard:
    """Return the shard that is ``file`` to the byte, under a file name."""
    header = read_header(file)
    jobs = (copied(tensor) for tensor in header.tensors)
    placed = (replace(job, pieces=(replace(job.pieces[0], start=job.source.start),)) for job in jobs)
    return Shard(name, header.raw, tuple(placed))


def sharded(jobs: Sequence[Job], max_shard_size: int | str = MAX_SHARD_SIZE, stem: str = "model") -> tuple[Shard, ...]:
    """Return the files that ``jobs`` are written into, in their order; what one job writes stays in one file.

    ``max_shard_size``: of a file's tensors, in bytes or as "5GB". Raises: as ``size_in_bytes``.
    """
    split = split_state_dict_into_shards_factory(
        {job.name: job for job in jobs},
        get_storage_size=lambda job: job.size,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=size_in_bytes(max_shard_size),
    )
    named = {job.name: job for job in jobs}
    return tuple(
        _shard(file, [named[name] for name in names], {"format": "pt"})
        for file, names in split.filename_to_tensors.items()
    )


def size_in_bytes(size: int | str) -> int:
    """Return how many bytes ``size`` is: a number of them, or one with a unit, such as "5GB".

    Raises: CheckpointError for another text, for less than one byte, and for a text that says few bytes without a
    unit: who writes "5" means gigabytes.
    """
    match = _SIZE.fullmatch(str(size).strip())
    count = int(float(match["number"]) * _UNITS[(match["unit"] or "").upper()]) if match else 0
    if count < 1:
        raise CheckpointError(f"'{size}' is no size of a file; expected one like 5GB, 500MB or a number of bytes")
    if match and not match["unit"] and isinstance(size, str) and count < FEW_BYTES:
        raise CheckpointError(f"'{size}' is {count} bytes; did you mean {match['number']}GB? Write the unit")
    return count


def _shard(file: str, jobs: Sequence[Job], metadata: Mapping[str, str]) -> Shard:
    """Give every piece its place: wider numbers first, so that all are aligned, as safetensors does."""
    order = sorted((piece for job in jobs for piece in job.pieces), key=lambda piece: -BITS[piece.dtype])
    offsets: dict[str, int] = {}
    end = 0
    for piece in order:
        offsets[piece.name] = end
        end += piece.size
    header = _header(order, offsets, metadata)
    placed = (
        replace(job, pieces=tuple(replace(one, start=len(header) + offsets[one.name]) for one in job.pieces))
        for job in jobs
    )
    return Shard(file, header, tuple(placed))


def _header(pieces: Iterable[Piece], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    entries = {
        one.name: {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [offsets[one.name], offsets[one.name] + one.size],
        }
        for one in pieces
    }
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
