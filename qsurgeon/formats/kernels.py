"""Which implementation of a format's arithmetic runs; all of them give the same bits.

On a CPU it is native.cpp, compiled for the format; on a GPU the operations of arithmetic.py, compiled by
torch.compile into one Triton kernel; where there is no compiler, the same operations one by one, in pieces that stay
in the cache. ``QSURGEON_KERNELS`` (native, compile, eager) takes the choice away from this module. Inside a model
that is itself being compiled, a CPU sees one opaque operator and a GPU the operations, to fuse them with others.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats import arithmetic, native
from qsurgeon.formats.fields import Fields
from qsurgeon.formats.native import say
from qsurgeon.formats.packing import pack, packed_length, unpack

Kind = Literal["native", "compile", "eager"]
KINDS: tuple[Kind, ...] = ("native", "compile", "eager")
PIECE = 2**17  # values worked on at a time, so that what is made in between stays in a CPU's cache
GPU_PIECE = 2**24  # a GPU wants many at a time; this bounds the memory
FEW = 2**12  # values of which all that is made in between is too little to work on less of them
GPUS = ("cuda", "xpu")  # devices for which torch.compile makes Triton kernels
VARIABLE = "QSURGEON_KERNELS"

# A tensor scale above the blocks: None, or float32 (…, rows, 1) or (1, …, 1); see arithmetic.tensor_scale.
Above = Tensor | None


def kind_for(rows: Tensor, fields: Fields) -> Kind:
    """Return which implementation takes ``rows``. Raises: FormatError for a word that QSURGEON_KERNELS cannot be."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in KINDS:
        raise FormatError(f"{VARIABLE} is '{wanted}'; {nearest(wanted, KINDS)}")
    plain = type(rows) in (Tensor, torch.nn.Parameter) and rows.layout == torch.strided and not _is_traced(rows)
    if plain and rows.device.type == "cpu" and rows.dtype in native.DTYPES and wanted in ("", "native"):
        return "native" if native.library(fields, rows.dtype) is not None else "eager"
    if wanted == "compile" or (not wanted and rows.device.type in GPUS):
        return "compile"
    return "eager"


def fake_quantize(rows: Tensor, fields: Fields) -> Tensor:
    """Return ``rows`` (…, rows, columns) rounded, contiguous, in their own dtype."""
    if _is_opaque(rows):
        rounded: Tensor = _fake_quantize_op(rows, fields.name, fields.without_number.key, fields.static_scale)
        return rounded
    if torch.compiler.is_compiling():
        return arithmetic.fake_quantize(rows, arithmetic.tensor_scale(rows, fields), fields)
    return _fake_quantize(rows, fields)


def _fake_quantize(rows: Tensor, fields: Fields) -> Tensor:
    if not rows.numel():
        return torch.empty_like(rows, memory_format=torch.contiguous_format)
    rows = rows.resolve_neg()
    return _FAKE_QUANTIZE[kind_for(rows, fields)](rows, arithmetic.tensor_scale(rows, fields), fields)


def _is_opaque(rows: Tensor) -> bool:
    """Return whether what watches torch operations is to see one of ours instead of those that it is made of."""
    return rows.device.type == "cpu" and (torch.compiler.is_compiling() or _is_traced(rows))


def _is_traced(rows: Tensor) -> bool:
    """Return whether ``rows`` is a stand-in whose memory says nothing: under a tracer, torch.func, or lazily zero."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(rows)
        or torch._is_functional_tensor(rows)
        or rows._is_zerotensor()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def quantize(rows: Tensor, fields: Fields) -> tuple[Tensor, Tensor | None, Above]:
    """Return the packed codes (…, rows, bytes) of ``rows``, their block scales' (…, rows, blocks), the tensor scale."""
    if _is_opaque(rows):
        data, scale, top = _quantize_op(rows, fields.name, fields.without_number.key, fields.static_scale)
        return data, scale if fields.scale else None, None if fields.tensor_scale == "none" else top
    above = arithmetic.tensor_scale(rows, fields)
    if not torch.compiler.is_compiling():
        return *quantize_under(rows, above, fields), above
    codes, block_scale = arithmetic.quantize(rows, above, fields)
    return pack(codes, fields.element.bits), block_scale, above


def quantize_under(rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
    """Return the codes of ``rows`` and of their block scales, below a tensor scale that is given; not compiled."""
    data, scale = _empty_codes(rows, fields)
    rows = rows.resolve_neg()
    if rows.numel() and kind_for(rows, fields) == "native":
        library = _library(rows, fields)
        library.quantize(_matrices(rows).contiguous(), data, scale, _per_row(above, rows), fields.seed)
        return data, scale
    flat, codes, height = _matrices(rows), _matrices(data), fields.block_shape[0]
    scales, per_row = None if scale is None else _matrices(scale), _per_row(above, rows)
    for m, r, c in _pieces(flat, fields):
        one, piece = arithmetic.quantize(flat[m, r, c], _piece(per_row, flat, m, r), fields, _corner(flat, m, r, c))
        packed = pack(one, fields.element.bits)
        first = c.start * fields.element.bits // 8
        codes[m, r, first : first + packed.shape[-1]] = packed
        if scales is not None and piece is not None:
            row, column = r.start // height, c.start // fields.block_shape[1]
            scales[m, row : row + piece.shape[-2], column : column + piece.shape[-1]] = piece
    return data, scale


def dequantize(
    data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
) -> Tensor:
    """Return the values (…, rows, length), contiguous, of what ``quantize`` returned, in ``dtype``."""
    if _is_opaque(data):
        name, key = fields.name, fields.without_number.key
        values: Tensor = _dequantize_op(data, scale, above, name, key, length, dtype)
        return values
    if not torch.compiler.is_compiling():
        return _dequantize(data, scale, above, fields, length, dtype)
    return arithmetic.dequantize(unpack(data, fields.element.bits, length), scale, above, fields, dtype)


def _dequantize(
    data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(*data.shape[:-1], length, dtype=dtype, device=data.device)
    if out.numel() and kind_for(out, fields) == "native":
        contiguous = None if scale is None else scale.contiguous()
        library = _library(out, fields)
        library.dequantize(data.contiguous(), contiguous, _per_row(above, out), _matrices(out))
        return out
    codes, into, (height, width) = _matrices(data), _matrices(out), fields.block_shape
    scales, per_row = None if scale is None else _matrices(scale), _per_row(above, out)
    bits = fields.element.bits
    for m, r, c in _pieces(into, fields):
        count = min(c.stop, out.shape[-1]) - c.start
        part = codes[m, r, c.start * bits // 8 : c.start * bits // 8 + packed_length(count, bits)]
        piece = None
        if scales is not None:
            last = -(-min(r.stop, into.shape[1]) // height), -(-(c.start + count) // width)
            piece = scales[m, r.start // height : last[0], c.start // width : last[1]]
        values = arithmetic.dequantize(unpack(part, bits, count), piece, _piece(per_row, into, m, r), fields, dtype)
        into[m, r, c] = values
    return out


def _empty_codes(rows: Tensor, fields: Fields) -> tuple[Tensor, Tensor | None]:
    *lead, r, c = rows.shape
    length = packed_length(c, fields.element.bits)
    data = torch.empty(*lead, r, length, dtype=torch.uint8, device=rows.device)
    if fields.scale is None:
        return data, None
    height, width = fields.block_shape
    return data, torch.empty(*lead, -(-r // height), -(-c // width), dtype=fields.scale.dtype, device=rows.device)


# ---- in pieces, one operation after the other


def _eager(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    flat, into, per_row = _matrices(rows), _matrices(out), _per_row(above, rows)
    for m, r, c in _pieces(flat, fields):
        piece = flat[m, r, c]
        into[m, r, c] = arithmetic.fake_quantize(piece, _piece(per_row, flat, m, r), fields, _corner(flat, m, r, c))
    return out


def _matrices(rows: Tensor) -> Tensor:
    """Return ``rows`` as (matrices, rows, columns)."""
    return rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:])


def _pieces(flat: Tensor, fields: Fields) -> Iterator[tuple[int, slice, slice]]:
    """Yield (matrix, rows, columns) that cover ``flat``; no block and no byte of packed codes is in two pieces."""
    matrices, rows, columns = flat.shape
    height, width = fields.block_shape
    # A piece takes 16 bytes a value of it; a quarter of the tensor at a time takes 4 bytes a value of all.
    size = min(PIECE if flat.device.type == "cpu" else GPU_PIECE, max(FEW, flat.numel() // 4))
    unit = math.lcm(width or 1, 8)
    if height * columns <= size:
        across, down = max(columns, 1), max(height, size // max(columns, 1) // height * height)
    else:
        across, down = max(unit, size // height // unit * unit), height
    for m, r, c in product(range(matrices), range(0, rows, down), range(0, columns, across)):
        yield m, slice(r, r + down), slice(c, c + across)


def _corner(flat: Tensor, matrix: int, rows: slice, columns: slice) -> arithmetic.At:
    return matrix * flat.shape[1] + rows.start, columns.start


def _per_row(above: Above, rows: Tensor) -> Above:
    """Return the tensor scale as one number, (1,), or one a row of all matrices, contiguous."""
    if above is None or above.numel() == 1:
        return None if above is None else above.reshape(1)
    return above.expand(*rows.shape[:-1], 1).reshape(-1).contiguous()


def _piece(per_row: Above, flat: Tensor, matrix: int, part: slice) -> Above:
    """Return the tensor scale of a piece's rows, (rows, 1) or (1, 1)."""
    if per_row is None or per_row.numel() == 1:
        return None if per_row is None else per_row[:, None]
    return per_row.view(flat.shape[:2])[matrix, part, None]


# ---- native.cpp


def _native(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    flat = _matrices(rows).contiguous()
    out = torch.empty_like(flat)
    _library(rows, fields).fake_quantize(flat, out, _per_row(above, rows), fields.seed)
    return out.view(rows.shape)


def _library(rows: Tensor, fields: Fields) -> native.Library:
    library = native.library(fields, rows.dtype)
    if library is None:
        raise FormatError(f"no native kernel for format '{fields.name}' in {rows.dtype}")
    return library


# ---- torch.compile


def _compiled(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    """Run the operations as one compiled kernel, which serves every shape: blocks are counted in one dimension."""
    height, width = fields.block_shape
    run = _whole(fields.without_number.key)
    if fields.rounding == "stochastic" or height > 1 or not width or rows.shape[-1] % width:
        return run(rows, above)
    blocks = rows.reshape(-1, width)
    per_row = _per_row(above, rows)
    if per_row is not None:
        above = (
            per_row[:, None] if len(per_row) == 1 else per_row[:, None].repeat_interleave(rows.shape[-1] // width, 0)
        )
    if len(blocks) < 2:  # torch.compile takes a size of 1 for a constant
        return _eager(rows, above, fields)
    torch._dynamo.maybe_mark_dynamic(blocks, 0)
    if above is not None and len(above) > 1:
        torch._dynamo.maybe_mark_dynamic(above, 0)
    return run(blocks, above).view(rows.shape)


@cache
def _whole(key: str) -> Callable[[Tensor, Above], Tensor]:
    fields = _fields(key)

    def act(rows: Tensor, above: Above) -> Tensor:
        return arithmetic.fake_quantize(rows, above, fields)

    # torch.compile keeps what it learnt, and counts recompilations, by code object: each format needs one of its own.
    act.__code__ = act.__code__.replace(co_name=f"fake_quantize_{len(_codes)}")
    _codes.append(key)
    run = torch.compile(act)

    def run_or_fall_back(rows: Tensor, above: Above) -> Tensor:
        if _no_compiler:
            return _eager(rows, above, fields)
        try:
            compiled: Tensor = run(rows, above)
        except RuntimeError as error:
            # Asked by name: importing its exceptions takes a second, in every process.
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            say(f"torch.compile fails here, so that slower torch operations compute the same values: {reason}")
            _no_compiler.append(reason)
            return _eager(rows, above, fields)
        return compiled

    return run_or_fall_back


_codes: list[str] = []  # the formats that were compiled so far
_no_compiler: list[str] = []  # why torch.compile does not work here, once it was tried


_FAKE_QUANTIZE: dict[Kind, Callable[[Tensor, Above, Fields], Tensor]] = {
    "native": _native,
    "compile": _compiled,
    "eager": _eager,
}


# ---- what torch.compile sees of the CPU's kernels


@cache
def _fields(key: str, name: str = "compiled") -> Fields:
    values: dict[str, Any] = json.loads(key)
    return Fields.from_dict(name, values)


def _numbered(key: str, name: str, static_scale: float | None) -> Fields:
    fields = _fields(key, name)
    return fields if static_scale is None else replace(fields, static_scale=static_scale)


@torch.library.custom_op("qsurgeon::fake_quantize", mutates_args=())
def _fake_quantize_op(rows: Tensor, name: str, key: str, static_scale: float | None) -> Tensor:
    return _fake_quantize(rows, _numbered(key, name, static_scale))


@_fake_quantize_op.register_fake
def _(rows: Tensor, name: str, key: str, static_scale: float | None) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


# An operator returns tensors only: what a format does not have is an empty one.
@torch.library.custom_op("qsurgeon::quantize", mutates_args=())
def _quantize_op(rows: Tensor, name: str, key: str, static_scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    fields = _numbered(key, name, static_scale)
    above = arithmetic.tensor_scale(rows, fields)
    data, scale = quantize_under(rows, above, fields)
    return data, rows.new_empty(0) if scale is None else scale, rows.new_empty(0) if above is None else above


@_quantize_op.register_fake
def _(rows: Tensor, name: str, key: str, static_scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    fields = _numbered(key, name, static_scale)
    data, scale = _empty_codes(rows, fields)
    above = arithmetic.tensor_scale(rows, fields)
    return data, rows.new_empty(0) if scale is None else scale, rows.new_empty(0) if above is None else above


@torch.library.custom_op("qsurgeon::dequantize", mutates_args=())
def _dequantize_op(
    data: Tensor, scale: Tensor | None, above: Tensor | None, name: str, key: str, length: int, dtype: torch.dtype
) -> Tensor:
    return _dequantize(data, scale, above, _fields(key, name), length, dtype)


@_dequantize_op.register_fake
def _(
    data: Tensor, scale: Tensor | None, above: Tensor | None, name: str, key: str, length: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty(*data.shape[:-1], length, dtype=dtype)
