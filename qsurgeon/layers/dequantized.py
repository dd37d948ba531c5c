"""The two products with a packed weight.

It is dequantized for each of them, and lives no longer than that. For a few rows that no gradient is wanted of, as
those of a token that is generated, a product may read the codes themselves: see formats/kernels/few_rows.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from qsurgeon.errors import FormatError
from qsurgeon.formats import Format, Quantized
from qsurgeon.formats.kernels.few_rows import few_rows
from qsurgeon.layers.codes import plain
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.rounding import dequantized
from qsurgeon.storage.packed import from_stored, stored_shapes


def packed_format(how: Quantization) -> Format:
    """Return the format of a packed weight's codes. Raises: FormatError if the weight has no format."""
    grid = how.weight_grid
    if grid is None:
        raise FormatError("a weight without a format cannot be packed")
    return grid


def forward_product(
    values: Tensor, stored: Sequence[Tensor], bias: Tensor | None, how: Quantization, *, reads_codes: bool = False
) -> Tensor:
    """Return values · Wᵀ + b in the dtype of ``values`` (..., inputs), for a weight stored as in storage/packed.py.

    reads_codes: whether the product of few rows may be one that reads codes, which adds up in another order.
    """
    grid = packed_format(how)
    bias = bias if bias is None else bias.to(values.dtype)
    if torch.compiler.is_compiling():
        key = grid.without_number.key
        result: Tensor = _forward_op(values, bias, list(stored), grid.name, key, reads_codes)
        return result
    return _forward(values, bias, stored, grid, reads_codes)


def _forward(values: Tensor, bias: Tensor | None, stored: Sequence[Tensor], grid: Format, reads_codes: bool) -> Tensor:
    weight = _quantized(stored, grid, values.shape[-1], values.dtype)
    if reads_codes and (found := few_rows(values, weight, bias)) is not None:
        return found
    return linear(values, dequantized(weight), bias)


def backward_product(grad: Tensor, stored: Sequence[Tensor], how: Quantization, inputs: int) -> Tensor:
    """Return grad · W, (rows, inputs), in the dtype of ``grad`` (rows, outputs)."""
    grid = packed_format(how)
    if torch.compiler.is_compiling():
        result: Tensor = _backward_op(grad, list(stored), grid.name, grid.without_number.key, inputs)
        return result
    return grad @ dequantized(_quantized(stored, grid, inputs, grad.dtype))


def _quantized(stored: Sequence[Tensor], grid: Format, inputs: int, dtype: torch.dtype) -> Quantized:
    """Return the weight (outputs, inputs) of ``dtype``. Raises: ShapeError for tensors that are not the format's."""
    names = stored_shapes(grid, 0, 0)
    return from_stored(dict(zip(names, map(plain, stored), strict=True)), grid, inputs, dtype)


# Opaque to torch.compile, which would otherwise dequantize a weight once for forward and backward, and keep it between.


@torch.library.custom_op("qsurgeon::times_opened", mutates_args=())
def _forward_op(
    values: Tensor, bias: Tensor | None, stored: list[Tensor], name: str, key: str, reads_codes: bool
) -> Tensor:
    return _forward(values, bias, stored, Format.from_key(name, key), reads_codes)


@_forward_op.register_fake
def _(values: Tensor, bias: Tensor | None, stored: list[Tensor], name: str, key: str, reads_codes: bool) -> Tensor:
    return values.new_empty(*values.shape[:-1], stored[0].shape[0])


@torch.library.custom_op("qsurgeon::opened_times", mutates_args=())
def _backward_op(grad: Tensor, stored: list[Tensor], name: str, key: str, inputs: int) -> Tensor:
    return grad @ _quantized(stored, Format.from_key(name, key), inputs, grad.dtype).dequantize()


@_backward_op.register_fake
def _(grad: Tensor, stored: list[Tensor], name: str, key: str, inputs: int) -> Tensor:
    return grad.new_empty(grad.shape[0], inputs)
