"""Rounding below a tensor scale that is given, and not found in the tensor.

It is what a compiled graph is told as an input, and what several processes agree on that each have a part of a tensor.
``above`` has the shape that ``arithmetic.tensor_scale`` returns it in: (..., rows, 1), or (1, ..., 1). Nothing is
rotated here.
"""

from torch import Tensor

from qsurgeon.formats import kernels
from qsurgeon.formats.block import Format, Quantized
from qsurgeon.formats.tensor_scale import kept


def fake_quantize(x: Tensor, above: Tensor, format: Format) -> Tensor:
    """Return ``x`` (..., k) rounded, as ``format.fake_quantize`` does it."""
    return kernels.fake_quantize(x if x.dim() > 1 else x[None], format, above).reshape(x.shape)


def quantize(x: Tensor, above: Tensor, format: Format) -> Quantized:
    """Return the packed codes and scales of ``x`` (..., k), as ``format.quantize`` does it."""
    rows, lead = x if x.dim() > 1 else x[None], x.shape[:-1]
    data, scale, _ = kernels.quantize(rows, format, above)
    data = data.reshape(*lead, data.shape[-1])
    scale = None if scale is None else scale.reshape(*lead, scale.shape[-1])
    return Quantized(data, scale, kept(above, lead, format), format, x.dtype, x.shape[-1])


def saturates(x: Tensor, above: Tensor, format: Format) -> Tensor:
    """Return where (bool) a value of ``x`` (..., k) exceeds the largest that its block can hold."""
    return kernels.saturates(x if x.dim() > 1 else x[None], format, above).reshape(x.shape)
