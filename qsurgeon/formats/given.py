"""Scales as a value, and rounding under scales that are given: what GPTQ, scale search and learned scales build on.

One implementation in torch operations, on every device: the arithmetic of kernels/arithmetic.py with the scale of each
value in place of its block's. So it takes any columns of a tensor, also a part of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qsurgeon.errors import FormatError, GradientError, ShapeError
from qsurgeon.formats.fields import LARGEST_TENSOR_SCALE, SMALLEST_TENSOR_SCALE, Fields, shown
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.kernels.pieces import matrices, pieces_of
from qsurgeon.formats.tensor_scale import of_rows
from qsurgeon.torch_private import is_traced

At = arithmetic.At


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of a tensor in a format, as numbers.

    block: float32, one a block, blocks along ``dim``; NaN where a block has none; None without blocks. tensor: the FP32
    scale above the blocks, () or one a row, or None. Each is a number that the format can store:
    ``Format.nearest_scales`` finds these for numbers of your own.

    Raises: FormatError for other numbers, and for parts that the format does not have; GradientError for scales that
    take part in autograd.
    """

    block: Tensor | None
    tensor: Tensor | None
    format: Fields
    dim: int = -1

    def __post_init__(self) -> None:
        has = {"block": self.format.scale is not None, "tensor": self.format.tensor_scale != "none"}
        for name, part in (("block", self.block), ("tensor", self.tensor)):
            if (part is not None) != has[name]:
                raise FormatError(f"format '{self.format.name}' has {'a' if has[name] else 'no'} {name} scale")
            if part is not None:
                _check(name, part, self.format)


def _check(name: str, part: Tensor, fields: Fields) -> None:
    if part.dtype != torch.float32:
        raise FormatError(f"{name} scales of {part.dtype}; expected torch.float32")
    if part.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            f"{name} scales that require a gradient: rounding under them has none; detach them, and give the scales a "
            "gradient of their own (torch.autograd.Function)"
        )
    if torch.compiler.is_compiling() or is_traced(part) or part.device.type == "meta":
        return
    near = nearest_block(part, fields) if name == "block" else nearest_tensor(part)
    wrong = (part != near) & ~part.isnan()
    if wrong.any():
        raise FormatError(
            f"{name} scale {part[wrong][0].item():.9g} is none that format '{fields.name}' can store; the nearest is "
            f"{near[wrong][0].item():.9g} (Format.nearest_scales finds it)"
        )


def nearest_block(block: Tensor, fields: Fields) -> Tensor:
    """Return the block scales that ``fields`` can store, nearest to ``block``; NaN stays."""
    if fields.scale is None:
        raise FormatError(f"format '{fields.name}' has no block scale")
    near = fields.scale.round(block.to(torch.float32).clamp(fields.scale.smallest, fields.largest_scale))
    return torch.where(block.isnan(), torch.nan, near)


def nearest_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor scales nearest to ``tensor``; NaN and infinity stay: a tensor with infinity has such a one."""
    near = tensor.to(torch.float32).clamp(SMALLEST_TENSOR_SCALE, LARGEST_TENSOR_SCALE)
    return torch.where(tensor.isfinite(), near, tensor.abs())


def fake_quantize(rows: Tensor, scales: Scales, fields: Fields, at: At) -> Tensor:
    """Return ``rows`` (…, rows, columns), which lie ``at`` a row and column of the whole, rounded, in their dtype."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    into = matrices(out)
    for place, piece, scale, corner in _pieces(rows, scales, fields, at):
        values = arithmetic.round_each(piece, scale, fields, corner).mul_(scale)
        into[place] = arithmetic.narrowed(values, rows.dtype)
    return out


def codes(rows: Tensor, scales: Scales, fields: Fields, at: At) -> Tensor:
    """Return the codes (uint8, one a value) of ``rows``, which lie ``at`` a row and column of the whole."""
    out = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    into = matrices(out)
    for place, piece, scale, corner in _pieces(rows, scales, fields, at):
        into[place] = fields.element.encode(arithmetic.round_each(piece, scale, fields, corner))
    return out


def _pieces(
    rows: Tensor, scales: Scales, fields: Fields, at: At
) -> Iterator[tuple[tuple[int, slice, slice], Tensor, Tensor, At]]:
    """Yield where each piece of all matrices lies, its values (float32), the scale of each, and its place."""
    _check_fits(rows, scales, fields, at)
    flat = matrices(rows)
    block = None if scales.block is None else matrices(_at_least_rows(scales.block.movedim(scales.dim, -1)))
    above = None if scales.tensor is None else _above(scales.tensor, rows, at)
    for m, r, c in pieces_of(flat, fields):
        piece = arithmetic.widened(flat[m, r, c])
        own = of_rows(above, flat.shape, m, r)
        place = at[0] + r.start, at[1] + c.start
        scale = piece.new_ones(piece.shape) if block is None else _spread(block[m], fields, place, piece.shape)
        scale = scale if own is None else scale * own
        yield (m, r, c), piece, scale, (m * flat.shape[1] + place[0], place[1])


def _spread(block: Tensor, fields: Fields, at: At, shape: torch.Size) -> Tensor:
    """Return the scale of each value of a part, of ``shape``, of the matrix whose block scales are ``block``."""
    height, width = fields.block_shape
    down = torch.arange(at[0], at[0] + shape[0], device=block.device) // height
    across = torch.arange(at[1], at[1] + shape[1], device=block.device) // width
    return block[down[:, None], across]


def _above(tensor: Tensor, rows: Tensor, at: At) -> Tensor:
    """Return the tensor scale as one number, (1,), or one for each of ``rows``."""
    if tensor.dim() == 0:
        return tensor.reshape(1)
    return tensor[at[0] : at[0] + rows.shape[0]] if rows.dim() == 2 else tensor.reshape(-1)


def _check_fits(rows: Tensor, scales: Scales, fields: Fields, at: At) -> None:
    """Refuse scales of another format, and rows that do not lie in what the scales are of."""
    other = scales.format
    for name in ("element", "block", "scale", "hadamard"):
        one, two = getattr(other, name), getattr(fields, name)
        if one != two:
            raise FormatError(
                f"scales of format '{other.name}', {name} {_said(one)}, cannot be those of format '{fields.name}', "
                f"{name} {_said(two)}"
            )
    (row, column), (*lead, height, width) = at, rows.shape
    place = f"rows {row} to {row + height} and columns {column} to {column + width}"
    if min(at) < 0 or (row and lead):
        raise ShapeError(f"at is {at}; expected a row and a column from 0 up, the row 0 of more than a matrix")
    if scales.block is not None:
        block = _at_least_rows(scales.block.movedim(scales.dim, -1))
        down, across = block.shape[-2] * fields.block_shape[0], block.shape[-1] * fields.block_shape[1]
        if list(block.shape[:-2]) != lead or row + height > down or column + width > across:
            raise ShapeError(f"{place} of {tuple(rows.shape)} are not in the blocks of scales {tuple(block.shape)}")
    tensor = scales.tensor
    if tensor is None or not tensor.dim():
        return
    if list(tensor.shape[:-1]) != lead or row + height > tensor.shape[-1]:
        raise ShapeError(f"{place} of {tuple(rows.shape)} are not in the rows of scales {tuple(tensor.shape)}")


def _said(value: object) -> str:
    if value is None or isinstance(value, tuple | int):
        return shown(value)
    return str(getattr(value, "name", value))


def _at_least_rows(x: Tensor) -> Tensor:
    return x if x.dim() > 1 else x[None]
