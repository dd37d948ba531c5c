"""Rounding below a tensor scale that is given, and not found in the tensor.

It is what a compiled graph is told as an input, and what several processes agree on that each have a part of a tensor.
``above`` has the shape that ``arithmetic.tensor_scale`` returns it in: (..., rows, 1), or (1, ..., 1).
"""

import torch
from torch import Tensor

from qsurgeon.formats import kernels
from qsurgeon.formats.block import Format, Quantized
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.kernels.pieces import empty_codes
from qsurgeon.formats.packing import pack


def fake_quantize(x: Tensor, above: Tensor, format: Format) -> Tensor:
    """Return ``x`` (..., k) rounded, as ``format.fake_quantize`` does it; the format does not rotate."""
    rows = x if x.dim() > 1 else x[None]
    if kernels.is_opaque(rows):
        values: Tensor = _fake_quantize_op(rows, above, format.name, format.without_number.key)
    elif torch.compiler.is_compiling():
        values = arithmetic.fake_quantize(rows, above, format)
    else:
        values = kernels.fake_quantize_under(rows, above, format)
    return values.reshape(x.shape)


def quantize(x: Tensor, above: Tensor, format: Format) -> Quantized:
    """Return the packed codes and scales of ``x`` (..., k), as ``format.quantize`` does it; it does not rotate."""
    rows, lead = x if x.dim() > 1 else x[None], x.shape[:-1]
    scale: Tensor | None
    if kernels.is_opaque(rows):
        data, scale = _quantize_op(rows, above, format.name, format.without_number.key)
        scale = scale if format.scale else None
    elif torch.compiler.is_compiling():
        codes, scale = arithmetic.quantize(rows, above, format)
        data = pack(codes, format.element.bits)
    else:
        data, scale = kernels.quantize_under(rows, above, format)
    data = data.reshape(*lead, data.shape[-1])
    scale = None if scale is None else scale.reshape(*lead, scale.shape[-1])
    kept = above.reshape(lead) if format.has_row_scales else above.reshape(())
    return Quantized(data, scale, kept, format, x.dtype, x.shape[-1])


def saturates(x: Tensor, above: Tensor, format: Format) -> Tensor:
    """Return where (bool) a value of ``x`` (..., k) exceeds the largest that its block can hold; nothing rotates."""
    rows = x if x.dim() > 1 else x[None]
    if rows.device.type == "cpu":
        marked: Tensor = _saturates_op(rows, above, format.name, format.key)
        return marked.reshape(x.shape)
    return arithmetic.saturates(rows, above, format).reshape(x.shape)


# ---- what torch.compile sees of the CPU's kernels


@torch.library.custom_op("qsurgeon::fake_quantize_under", mutates_args=())
def _fake_quantize_op(rows: Tensor, above: Tensor, name: str, key: str) -> Tensor:
    return kernels.fake_quantize_under(rows, above, Format.from_key(name, key))


@_fake_quantize_op.register_fake
def _(rows: Tensor, above: Tensor, name: str, key: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


# An operator returns tensors only: what a format does not have is an empty one.
@torch.library.custom_op("qsurgeon::quantize_under", mutates_args=())
def _quantize_op(rows: Tensor, above: Tensor, name: str, key: str) -> tuple[Tensor, Tensor]:
    data, scale = kernels.quantize_under(rows, above, Format.from_key(name, key))
    return data, rows.new_empty(0) if scale is None else scale


@_quantize_op.register_fake
def _(rows: Tensor, above: Tensor, name: str, key: str) -> tuple[Tensor, Tensor]:
    data, scale = empty_codes(rows, Format.from_key(name, key))
    return data, rows.new_empty(0) if scale is None else scale


@torch.library.custom_op("qsurgeon::saturates_under", mutates_args=())
def _saturates_op(rows: Tensor, above: Tensor, name: str, key: str) -> Tensor:
    return arithmetic.saturates(rows, above, Format.from_key(name, key)).contiguous()


@_saturates_op.register_fake
def _(rows: Tensor, above: Tensor, name: str, key: str) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
