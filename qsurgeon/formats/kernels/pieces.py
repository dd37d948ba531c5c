"""The operations of arithmetic.py one after the other, in pieces that bound the memory of what is made in between."""

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from qsurgeon.formats.fields import Fields
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.kernels.backend import Above, Backend, Operation
from qsurgeon.formats.packing import pack, packed_length, unpack
from qsurgeon.formats.tensor_scale import of_rows, per_row

PIECE = 2**17  # values worked on at a time, so that what is made in between stays in a CPU's cache
GPU_PIECE = 2**24  # a GPU wants many at a time; this bounds the memory
FEW = 2**12  # values of which all that is made in between is too little to work on less of them


class Eager(Backend):
    """Runs everywhere, and supports every format: what no other backend takes."""

    name = "eager"

    def supports(self, fields: Fields, dtype: torch.dtype, device: str, operation: Operation) -> bool:
        """Return True: it runs the operations that say what a format is."""
        return True

    def fake_quantize(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """Return ``rows`` rounded, contiguous, in their own dtype."""
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        flat, into, rows_above = matrices(rows), matrices(out), per_row(above, rows)
        for m, r, c in pieces_of(flat, fields):
            piece = flat[m, r, c]
            into[m, r, c] = arithmetic.fake_quantize(
                piece, of_rows(rows_above, flat.shape, m, r), fields, _corner(flat, m, r, c)
            )
        return out

    def quantize(self, rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Return the packed codes (…, rows, bytes) of ``rows``, and their block scales' (…, rows, blocks)."""
        data, scale = empty_codes(rows, fields)
        flat, codes, height = matrices(rows), matrices(data), fields.block_shape[0]
        scales, rows_above = None if scale is None else matrices(scale), per_row(above, rows)
        for m, r, c in pieces_of(flat, fields):
            one, piece = arithmetic.quantize(
                flat[m, r, c], of_rows(rows_above, flat.shape, m, r), fields, _corner(flat, m, r, c)
            )
            packed = pack(one, fields.element.bits)
            first = c.start * fields.element.bits // 8
            codes[m, r, first : first + packed.shape[-1]] = packed
            if scales is not None and piece is not None:
                row, column = r.start // height, c.start // fields.block_shape[1]
                scales[m, row : row + piece.shape[-2], column : column + piece.shape[-1]] = piece
        return data, scale

    def dequantize(
        self, data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the values (…, rows, length), contiguous, of what ``quantize`` returned, in ``dtype``."""
        out = torch.empty(*data.shape[:-1], length, dtype=dtype, device=data.device)
        codes, into, (height, width) = matrices(data), matrices(out), fields.block_shape
        scales, rows_above = None if scale is None else matrices(scale), per_row(above, out)
        bits = fields.element.bits
        for m, r, c in pieces_of(into, fields):
            count = min(c.stop, out.shape[-1]) - c.start
            part = codes[m, r, c.start * bits // 8 : c.start * bits // 8 + packed_length(count, bits)]
            piece = None
            if scales is not None:
                last = -(-min(r.stop, into.shape[1]) // height), -(-(c.start + count) // width)
                piece = scales[m, r.start // height : last[0], c.start // width : last[1]]
            values = arithmetic.dequantize(
                unpack(part, bits, count), piece, of_rows(rows_above, into.shape, m, r), fields, dtype
            )
            into[m, r, c] = values
        return out

    def saturates(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """Return where (bool) a value of ``rows`` exceeds the largest that its block can hold, contiguous."""
        out = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
        flat, into, rows_above = matrices(rows), matrices(out), per_row(above, rows)
        for m, r, c in pieces_of(flat, fields):
            into[m, r, c] = arithmetic.saturates(flat[m, r, c], of_rows(rows_above, flat.shape, m, r), fields)
        return out


EAGER = Eager()


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


def pieces_of(flat: Tensor, fields: Fields) -> Iterator[tuple[int, slice, slice]]:
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
