"""The header of a safetensors file: eight bytes of length, JSON, and the tensors' data without gaps.

The header is parsed here, and more strictly than safetensors does it, from ordinary reads: a mapped file that is cut
short, or a disk that fails, would kill the process instead of raising an error.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from qsurgeon.errors import CheckpointError, nearest
from qsurgeon.reading import MOST_JSON, open_regular, parse_json

LENGTH = 8
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}
MOST_VALUES = 2**64 - 1
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
# What an encoded weight may consist of.
DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip
# What a weight in full precision is.
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file's header describes it.

    ``start``: where its data begins in the file, in bytes. ``size``: how many bytes it has.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """All that stands before a file's data.

    ``raw``: its bytes, from the first of the file to the last before the data. ``metadata``: text by key, empty if
    there is none. ``tensors``: in the order of their data.
    """

    file: Path
    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]


def read_header(file: Path) -> Header:
    """Return the header of a safetensors file; no tensor is read.

    Raises: CheckpointError if the file cannot be read, is cut short, or is not safetensors in every detail.
    """
    try:
        raw, size = _read(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        entries = parse_json(raw[LENGTH:])
    except ValueError as error:
        _refuse(file, f"its header {error}")
    metadata = _metadata(entries.pop(METADATA, None), file)
    tensors = [_tensor(name, entry, file, len(raw)) for name, entry in entries.items()]
    tensors.sort(key=lambda one: (one.start, one.start + one.size))
    _check_gaps(tensors, file, len(raw), size)
    return Header(file, raw, metadata, tuple(tensors))


def _read(file: Path) -> tuple[bytes, int]:
    """Return what stands before the data, and how many bytes the whole file has."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size < LENGTH:
            _refuse(file, f"it has {size} bytes, its header's length alone takes {LENGTH}")
        start = opened.read(LENGTH)
        length = int.from_bytes(start, "little")
        if length > size - LENGTH:
            _refuse(file, f"its header has {length:,} bytes, the file has {size:,}")
        if length > MOST_JSON:
            _refuse(file, f"its header has {length:,} bytes; at most {MOST_JSON:,} are read")
        raw = start + opened.read(length)
    if len(raw) != LENGTH + length:
        _refuse(file, "it was cut short while it was read")
    return raw, size


def _metadata(found: Any, file: Path) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        _refuse(file, f"{METADATA} expects an object, got {_shown(found)}")
    for key, value in found.items():
        if not isinstance(value, str):
            _refuse(file, f"{METADATA}: '{key}' expects text, got {_shown(value)}")
    return found


def _tensor(name: str, entry: Any, file: Path, data: int) -> Tensor:
    """Return the tensor that ``entry`` describes; ``data`` is where the file's data begins."""
    if not isinstance(entry, dict):
        _refuse(file, f"tensor {name} expects an object, got {_shown(entry)}")
    if missing := sorted(FIELDS - entry.keys()):
        _refuse(file, f"tensor {name} has no {missing[0]}")
    if extra := sorted(entry.keys() - FIELDS):
        _refuse(file, f"tensor {name} has a field '{extra[0]}'; {nearest(extra[0], FIELDS)}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS:
        hint = nearest(dtype.upper() if isinstance(dtype, str) else "", BITS)
        _refuse(file, f"tensor {name} has dtype {_shown(dtype)}; {hint}")
    shape = _counts(entry["shape"], f"tensor {name}: its shape", file)
    offsets = _counts(entry["data_offsets"], f"tensor {name}: data_offsets", file)
    if len(offsets) != 2:
        _refuse(file, f"tensor {name}: data_offsets expects 2 numbers, got {len(offsets)}")
    start, end = offsets
    if end < start:
        _refuse(file, f"tensor {name} ends at byte {end:,}, before it starts at {start:,}")
    bits = _values(shape, name, file) * BITS[dtype]
    if bits != 8 * (end - start):
        _refuse(
            file, f"tensor {name}: {dtype} {list(shape)} takes {_bytes(bits)}, its offsets leave room for {end - start}"
        )
    return Tensor(name, file, shape, dtype, data + start, end - start)


def _counts(found: Any, what: str, file: Path) -> tuple[int, ...]:
    if not isinstance(found, list):
        _refuse(file, f"{what} expects a list of numbers, got {_shown(found)}")
    for one in found:
        if type(one) is not int:
            _refuse(file, f"{what} expects whole numbers, got {_shown(one)}")
        if not 0 <= one <= MOST_VALUES:
            _refuse(file, f"{what} cannot have {one}; expected 0 to 2**64 - 1")
    return tuple(found)


def _values(shape: tuple[int, ...], name: str, file: Path) -> int:
    """Return the number of values. A product of sizes overflows where safetensors' does, whatever 0 comes later."""
    values = 1
    for one in shape:
        values *= one
        if values > MOST_VALUES:
            _refuse(file, f"tensor {name}: its shape {list(shape)} has more than 2**64 - 1 values")
    return values


def _bytes(bits: int) -> str:
    return f"{bits // 8:,} bytes" if bits % 8 == 0 else f"{bits:,} bits, which is no number of bytes"


def _check_gaps(tensors: list[Tensor], file: Path, data: int, size: int) -> None:
    """Refuse data that overlaps, that no tensor owns, or that is not there; ``data`` is where it begins."""
    end = data
    for one in tensors:
        if one.start < end:
            _refuse(file, f"tensor {one.name} begins at byte {one.start - data:,}, inside the one before it")
        if one.start > end:
            _refuse(file, f"bytes {end - data:,} to {one.start - data:,}, before tensor {one.name}, belong to none")
        end = one.start + one.size
    if size < end:
        _refuse(file, f"it is cut short: {end - size:,} of {end:,} bytes are missing")
    if size > end:
        _refuse(file, f"its last {size - end:,} bytes belong to no tensor")


def _shown(value: Any) -> str:
    """Return a short word for a JSON value, whatever its size."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return f"'{value[:40]}'"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) or math.isfinite(value) else "a number beyond all"


def _refuse(file: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{file}: is not a whole safetensors file: {why}")
