"""How an operand of a product is rounded, once it is rotated: below a tensor scale of its own, or one from outside.

From outside comes the number of a static scale to a compiled graph, and what the processes agree on that each have a
part of the operand.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qsurgeon.formats import Format, Quantized, under
from qsurgeon.formats.kernels import operand
from qsurgeon.formats.kernels.arithmetic import largest, scale_of

Agree = Callable[[Tensor], Tensor]  # from the largest magnitudes in a part to those in the whole


class Agreement(NamedTuple):
    """How processes that have parts of a product's operands find the largest magnitudes in the whole of each."""

    input: Agree | None = None
    weight: Agree | None = None


ALONE = Agreement()


def above_of(rotated: Tensor, grid: Format | None, number: Tensor | None, agree: Agree | None) -> Tensor | None:
    """Return the tensor scale of an operand (..., k), if it comes from outside; None if the format finds it itself."""
    if grid is None or (number is None and agree is None) or grid.tensor_scale == "none":
        return None
    if number is None and grid.tensor_scale == "static" and grid.static_scale is None:
        return None  # the format says that it has no number
    top = largest(rotated if rotated.dim() > 1 else rotated[None], grid)
    return scale_of(top if agree is None else agree(top), grid, number)


def rounded(rotated: Tensor, grid: Format | None, above: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return an operand rounded, as ``dtype``."""
    if grid is None:
        return rotated.to(dtype)
    if above is None and operand.is_usual(rotated) and (found := operand.values(rotated, grid)) is not None:
        return found.to(dtype)
    values = grid.fake_quantize(rotated) if above is None else under.fake_quantize(rotated, above, grid.without_number)
    return values.to(dtype)


def coded(rotated: Tensor, grid: Format, above: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Quantized]:
    """Return an operand rounded, as ``dtype``, and the codes and scales that it is."""
    if above is None and operand.is_usual(rotated) and (found := operand.written(rotated, grid)) is not None:
        codes = Quantized(found.data, found.scale, found.tensor_scale, grid, rotated.dtype, rotated.shape[-1])
        return found.values.to(dtype), codes
    codes = grid.quantize(rotated) if above is None else under.quantize(rotated, above, grid.without_number)
    return codes.dequantize().to(dtype), codes


def dequantized(codes: Quantized) -> Tensor:
    """Return the values of codes that nothing rotates. Raises: ShapeError as ``Quantized.dequantize``."""
    if not torch.compiler.is_compiling():
        parts = codes.data, codes.scale, codes.tensor_scale
        found = operand.read(*parts, codes.format, codes.length, codes.dtype)
        if found is not None:
            return found
    return codes.dequantize()


def saturated(rotated: Tensor, grid: Format, above: Tensor | None) -> Tensor:
    """Return where (bool) an operand's values exceed the largest that their block can hold."""
    return grid.saturates(rotated) if above is None else under.saturates(rotated, above, grid.without_number)


def bits_of(mask: Tensor) -> Tensor:
    """Return ``mask`` (..., k), bool, as bytes (..., ceil(k / 8))."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8))
    groups = padded.reshape(*padded.shape[:-1], padded.shape[-1] // 8, 8).to(torch.uint8)
    return (groups << _places(mask)).sum(-1, dtype=torch.uint8)


def mask_of(bits: Tensor, length: int) -> Tensor:
    """Return the first ``length`` bits of each row of ``bits``, as bool."""
    return (bits[..., None] >> _places(bits)).bitwise_and_(1).flatten(-2)[..., :length].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
