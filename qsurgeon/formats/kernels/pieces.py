"""The operations of arithmetic.py one after the other, in pieces that bound the memory of what is made in between."""

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from qsurgeon.formats.fields import Fields
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.packing import pack, packed_length, unpack

PIECE = 2**17  # values worked on at a time, so that what is made in between stays in a CPU's cache
GPU_PIECE = 2**24  # a GPU wants many at a time; this bounds the memory
FEW = 2**12  # values of which all that is made in between is too little to work on less of them

# A tensor scale above the blocks: None, or float32 (…, rows, 1) or (1, …, 1); see arithmetic.tensor_scale.
Above = Tensor | None


def fake_quantize(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    """Return ``rows`` rounded, contiguous, in their own dtype."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    flat, into, per_row = matrices(rows), matrices(out), per_row_of(above, rows)
    for m, r, c in _pieces(flat, fields):
        piece = flat[m, r, c]
        into[m, r, c] = arithmetic.fake_quantize(piece, _piece(per_row, flat, m, r), fields, _corner(flat, m, r, c))
    return out


def quantize(rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
    """Return the packed codes (…, rows, bytes) of ``rows``, and their block scales' (…, rows, blocks)."""
    data, scale = empty_codes(rows, fields)
    flat, codes, height = matrices(rows), matrices(data), fields.block_shape[0]
    scales, per_row = None if scale is None else matrices(scale), per_row_of(above, rows)
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
    out = torch.empty(*data.shape[:-1], length, dtype=dtype, device=data.device)
    codes, into, (height, width) = matrices(data), matrices(out), fields.block_shape
    scales, per_row = None if scale is None else matrices(scale), per_row_of(above, out)
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


def saturates(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    """Return where (bool) a value of ``rows`` exceeds the largest that its block can hold, contiguous."""
    out = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    flat, into, per_row = matrices(rows), matrices(out), per_row_of(above, rows)
    for m, r, c in _pieces(flat, fields):
        into[m, r, c] = arithmetic.saturates(flat[m, r, c], _piece(per_row, flat, m, r), fields)
    return out


def empty_codes(rows: Tensor, fields: Fields) -> tuple[Tensor, Tensor | None]:
    """Return memory for the codes of ``rows``, and for those of their block scales, if there are such."""
    *lead, r, c = rows.shape
    length = packed_length(c, fields.element.bits)
    data = torch.empty(*lead, r, length, dtype=torch.uint8, device=rows.device)
    if fields.scale is None:
        return data, None
    height, width = fields.block_shape
    return data, torch.empty(*lead, -(-r // height), -(-c // width), dtype=fields.scale.dtype, device=rows.device)


def matrices(rows: Tensor) -> Tensor:
    """Return ``rows`` as (matrices, rows, columns)."""
    return rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:])


def _pieces(flat: Tensor, fields: Fields) -> Iterator[tuple[int, slice, slice]]:
    """Yield (matrix, rows, columns) that cover ``flat``; no block and no byte of packed codes is in two pieces."""
    many, rows, columns = flat.shape
    height, width = fields.block_shape
    # A piece takes 16 bytes a value of it; a quarter of the tensor at a time takes 4 bytes a value of all.
    size = min(PIECE if flat.device.type == "cpu" else GPU_PIECE, max(FEW, flat.numel() // 4))
    unit = math.lcm(width or 1, 8)
    if height * columns <= size:
        across, down = max(columns, 1), max(height, size // max(columns, 1) // height * height)
    else:
        across, down = max(unit, size // height // unit * unit), height
    for m, r, c in product(range(many), range(0, rows, down), range(0, columns, across)):
        yield m, slice(r, r + down), slice(c, c + across)


def _corner(flat: Tensor, matrix: int, rows: slice, columns: slice) -> arithmetic.At:
    return matrix * flat.shape[1] + rows.start, columns.start


def per_row_of(above: Above, rows: Tensor) -> Above:
    """Return the tensor scale as one number, (1,), or one a row of all matrices, contiguous."""
    if above is None or above.numel() == 1:
        return None if above is None else above.reshape(1)
    return above.expand(*rows.shape[:-1], 1).reshape(-1).contiguous()


def _piece(per_row: Above, flat: Tensor, matrix: int, part: slice) -> Above:
    """Return the tensor scale of a piece's rows, (rows, 1) or (1, 1)."""
    if per_row is None or per_row.numel() == 1:
        return None if per_row is None else per_row[:, None]
    return per_row.view(flat.shape[:2])[matrix, part, None]
