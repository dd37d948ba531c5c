"""What a format does to numbers, in torch operations: the definition that every faster implementation must equal.

Works on rows, (..., rows, columns), the contraction dimension last. It runs eagerly in pieces that stay in the
cache, and whole where torch.compile makes one loop of it.
"""

import torch
from torch import Tensor

from qsurgeon.errors import FormatError
from qsurgeon.formats.fields import SMALLEST_TENSOR_SCALE, Fields
from qsurgeon.formats.scale import PowerOfTwoScale
from qsurgeon.formats.stochastic import uniform

At = tuple[int, int]  # the row and column of the whole tensor where a piece begins


def split(rows: Tensor, fields: Fields) -> Tensor:
    """Return ``rows`` as blocks, what is missing at the ends filled with zeros.

    (..., r, c) -> (..., r, n, block), or (..., m, n, block rows · block columns) for two-dimensional blocks.
    """
    height, width = fields.block_shape
    width = width or rows.shape[-1]
    below, right = -rows.shape[-2] % height, -rows.shape[-1] % max(width, 1)
    if below or right:
        rows = torch.nn.functional.pad(rows, (0, right, 0, below))
    *lead, r, c = rows.shape
    count = c // width if width else 1
    if height == 1:
        return rows.reshape(*lead, r, count, width)
    tiles = rows.reshape(*lead, r // height, height, count, width)
    return tiles.transpose(-3, -2).reshape(*lead, r // height, count, height * width)


def join(blocks: Tensor, shape: torch.Size, fields: Fields) -> Tensor:
    """Return the rows, of ``shape``, that ``split`` made ``blocks`` of."""
    height, width = fields.block_shape
    if height == 1:
        return blocks.flatten(-2)[..., : shape[-1]]
    *lead, m, n, _ = blocks.shape
    rows = blocks.reshape(*lead, m, n, height, width).transpose(-3, -2).reshape(*lead, m * height, n * width)
    return rows[..., : shape[-2], : shape[-1]]


def tensor_scale(rows: Tensor, fields: Fields) -> Tensor | None:
    """Return the FP32 scale that gives the largest value the format's ``top``, or the static one.

    (..., rows, 1) where each row has its own, (1, …, 1) where the tensor has one, None where there is none. Without
    blocks, it is NaN wherever what shares it is not finite: nothing else would say so.
    """
    if fields.tensor_scale == "none":
        return None
    return scale_of(largest(rows, fields), fields)


def largest(rows: Tensor, fields: Fields) -> Tensor:
    """Return the largest magnitudes (float32) among what shares a tensor scale, in the shape that these have."""
    shape = [*rows.shape[:-1], 1] if fields.has_row_scales else [1] * rows.dim()
    if not rows.numel():
        return rows.new_zeros(shape, dtype=torch.float32)
    if fields.has_row_scales:
        return widened(torch.maximum(rows.amax(-1), -rows.amin(-1))).reshape(shape)
    if fields.tensor_scale == "static":  # it depends on no value
        return rows.new_zeros(shape, dtype=torch.float32)
    low, high = torch.aminmax(rows)
    return widened(torch.maximum(high, -low)).reshape(shape)


def scale_of(top: Tensor, fields: Fields, number: Tensor | None = None) -> Tensor:
    """Return the tensor scales of what has the largest magnitudes ``top`` (float32), in the same shape.

    number: the static scale as a tensor, (), which takes the place of the format's own.
    """
    scale = (top / fields.top).clamp_min(SMALLEST_TENSOR_SCALE)
    if fields.tensor_scale == "static":
        if number is None:
            scale = torch.full_like(scale, fields.static_scale or 0.0)
        else:
            scale = torch.zeros_like(scale) + number
    return scale if fields.scale else torch.where(top.isfinite(), scale, torch.nan)


def fake_quantize(rows: Tensor, above: Tensor | None, fields: Fields, at: At = (0, 0)) -> Tensor:
    """Return ``rows`` rounded, in their dtype; ``above`` is the tensor scale as ``tensor_scale`` has it."""
    wide = widened(rows)
    blocks = split(wide, fields)
    scale = product(block_scales(blocks, above, fields), above)
    values = _rounded(blocks, scale, wide, fields, at).mul_(scale)
    return narrowed(join(values, rows.shape, fields), rows.dtype)


def quantize(rows: Tensor, above: Tensor | None, fields: Fields, at: At = (0, 0)) -> tuple[Tensor, Tensor | None]:
    """Return the codes (uint8, the shape of ``rows``) and the codes of the block scales (..., rows, blocks)."""
    wide = widened(rows)
    blocks = split(wide, fields)
    scale = block_scales(blocks, above, fields)
    values = _rounded(blocks, product(scale, above), wide, fields, at)
    codes = join(fields.element.encode(values), rows.shape, fields)
    return codes, fields.scale.encode(scale).squeeze(-1) if fields.scale else None


def dequantize(codes: Tensor, scale: Tensor | None, above: Tensor | None, fields: Fields, dtype: torch.dtype) -> Tensor:
    """Return the values of what ``quantize`` returned, in ``dtype``."""
    blocks = split(fields.element.decode(codes), fields)
    if fields.scale is not None and scale is not None:
        blocks *= product(fields.scale.decode(scale)[..., None], above)
    elif above is not None:
        blocks *= above[..., None]
    return narrowed(join(blocks, codes.shape, fields), dtype)


def saturates(rows: Tensor, above: Tensor | None, fields: Fields) -> Tensor:
    """Return where (bool) a value exceeds the largest that its block can hold."""
    blocks = split(widened(rows), fields)
    limit = product(block_scales(blocks, above, fields), above) * fields.element.max
    if above is not None:
        limit = limit * (1 + 2.0**-20)  # that FP32 rounds the scales' product is no saturation
    found = join(blocks.abs() > limit, rows.shape, fields)
    return found | _exceeds_float32(rows) if rows.dtype == torch.float64 else found


def block_scales(blocks: Tensor, above: Tensor | None, fields: Fields) -> Tensor:
    """Return the value of each block's scale, (..., n, 1); the tensor scale is divided out."""
    if fields.scale is None or fields.rule is None:
        return blocks.new_ones(*blocks.shape[:-1], 1)
    largest = blocks.abs().amax(-1, keepdim=True) if blocks.shape[-1] else blocks.new_zeros(*blocks.shape[:-1], 1)
    # Under a static scale that is too small for it, the quotient may be infinite: then the scale saturates.
    amax = largest if above is None else largest / above[..., None]
    scale = _clamped(fields.rule.find(amax, fields.element, fields.scale), fields)
    if fields.four_over_six and not isinstance(fields.scale, PowerOfTwoScale):
        wider = _clamped(fields.scale.round(amax / fields.element.magnitudes[-2]), fields)
        better = _error(blocks, product(wider, above), fields) < _error(blocks, product(scale, above), fields)
        scale = torch.where(better, wider, scale)
    # NaN from the values, not as a constant, which equals nothing: torch.compile would not see that three layers round
    # the same input in the same way.
    return torch.where(largest.isfinite(), scale, largest - largest)


def _clamped(scale: Tensor, fields: Fields) -> Tensor:
    """Return ``scale`` within its range; one that comes out as zero would lose the block."""
    return scale.clamp(fields.scale.smallest, fields.largest_scale) if fields.scale else scale


def _error(blocks: Tensor, scale: Tensor, fields: Fields) -> Tensor:
    """Return the sum of squared errors of each block, (..., n, 1), always summed in the same order."""
    values = fields.element.round_(_divided(blocks, scale)).mul_(scale)
    square = values.sub_(blocks).square_()
    while (length := square.shape[-1]) > 1:
        half = (length + 1) // 2
        low, high = square[..., :half], square[..., half:]
        square = torch.cat((low[..., : length - half] + high, low[..., length - half :]), dim=-1)
    return square


def _rounded(blocks: Tensor, scale: Tensor, rows: Tensor, fields: Fields, at: At) -> Tensor:
    """Return ``blocks / scale`` rounded to the element; ``rows`` are the values that the blocks were split from."""
    numbers = None if fields.rounding == "nearest" else split(uniform(rows, *at, fields.seed), fields)
    return _to_element(_divided(blocks, scale), numbers, fields)


def round_each(values: Tensor, scale: Tensor, fields: Fields, at: At) -> Tensor:
    """Return ``values / scale`` (float32, (rows, columns)) rounded to the element; each value has its own scale."""
    numbers = None if fields.rounding == "nearest" else uniform(values, *at, fields.seed)
    return _to_element(_divided(values, scale), numbers, fields)


def _to_element(quotients: Tensor, numbers: Tensor | None, fields: Fields) -> Tensor:
    match fields.rounding, numbers:
        case "nearest", None:
            return fields.element.round_(quotients)
        case "stochastic", Tensor():
            return fields.element.round_stochastic(quotients, numbers)
    raise FormatError(f"no arithmetic for rounding '{fields.rounding}'")


def product(scale: Tensor, above: Tensor | None) -> Tensor:
    """Return the blocks' scales times the tensor scale above them, which has one dimension less."""
    return scale if above is None else scale * above[..., None]


def _divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """Return ``blocks / scale``; a zero block stays 0 also where denormals are flushed and its scale reads as 0."""
    return blocks / torch.where(scale == 0, 1, scale)


def widened(rows: Tensor) -> Tensor:
    """Return ``rows`` in float32; what float64 has beyond its largest number saturates, only infinity is infinite."""
    if rows.dtype != torch.float64:
        return rows.to(torch.float32)
    limit = torch.finfo(torch.float32).max
    return torch.where(_exceeds_float32(rows), rows.clamp(-limit, limit), rows).to(torch.float32)


def _exceeds_float32(rows: Tensor) -> Tensor:
    return (rows.abs() > torch.finfo(torch.float32).max) & rows.isfinite()


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return FP32 ``values`` in ``dtype``; rounding up the largest of a narrow one must not make infinity."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.clamp(-limit, limit).to(dtype)
