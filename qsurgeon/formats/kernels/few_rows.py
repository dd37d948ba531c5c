"""The product of a few rows with a weight that stays packed: on a CPU, by one call of compiled code (product.cpp).

It reads a quarter of the bytes that a bfloat16 weight has, which is what the time of so few rows is. The weight's
values are those of ``Quantized.dequantize``. Products and sums are float32, in another order than that of torch's
linear, so that results differ from it in their last bits, as those of different numbers of rows do.
"""

import torch
from torch import Tensor

from qsurgeon.formats.block import Quantized
from qsurgeon.formats.kernels import native, operand

MOST_ROWS = 8  # above it, dequantizing once costs less than the multiplications gain
FEWEST_VALUES = 2**16  # of a weight below which a product is a matter of calls, not of memory


def few_rows(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor | None:
    """Return x · Wᵀ + b, (..., outputs), in the dtype of ``x`` (..., inputs); None where this is not the way.

    ``weight`` (outputs, inputs) is a matrix whose codes run along its rows, and rotates nothing.
    """
    rows, inputs = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    if not 0 < rows <= MOST_ROWS or weight.data.shape[0] * inputs < FEWEST_VALUES or x.dtype not in native.DTYPES:
        return None
    if weight.data.dtype is not torch.uint8:
        return None
    parts = [one for one in (x, weight.data, weight.scale, weight.tensor_scale, bias) if one is not None]
    library = native.library(weight.format, x.dtype) if all(map(operand.is_usual, parts)) else None
    if (
        library is None
        or not library.direct.has_product
        or not all(one.is_contiguous() for one in parts[1:])
        or (bias is not None and bias.dtype != x.dtype)
    ):
        return None
    x, outputs = x.contiguous(), weight.data.shape[0]
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    places = [
        None if one is None else one.data_ptr() for one in (x, weight.data, weight.scale, weight.tensor_scale, bias)
    ]
    if not all(places[:2]):
        return None
    step = 0 if weight.tensor_scale is None or weight.tensor_scale.numel() == 1 else 1
    threads = 1 if outputs * inputs < native.SMALL else torch.get_num_threads()
    at, data, scale, above, added = places
    library.direct.product(at, data, scale, above, step, added, out.data_ptr(), rows, outputs, inputs, threads)
    return out
