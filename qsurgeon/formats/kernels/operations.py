"""The operations of a format on rows (…, rows, columns), by whichever backend takes them; and what tracers see of them.

A tensor scale (``above``) is found here, or given: then it is (…, rows, 1) or (1, …, 1), see arithmetic.tensor_scale.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qsurgeon.formats.fields import Fields
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.kernels.backend import Above, Coded
from qsurgeon.formats.kernels.choosing import backend_for, is_opaque, product_backend_for
from qsurgeon.formats.kernels.pieces import empty_codes
from qsurgeon.formats.packing import pack, unpack


def fake_quantize(rows: Tensor, fields: Fields, above: Above = None) -> Tensor:
    """Return ``rows`` rounded, contiguous, in their own dtype."""
    return _routed(rows, fields, above, _fake_quantize_op, arithmetic.fake_quantize, _fake_quantize)


def _routed(
    rows: Tensor,
    fields: Fields,
    above: Above,
    operator: Callable[..., Tensor],
    traced: Callable[[Tensor, Above, Fields], Tensor],
    computed: Callable[[Tensor, Fields, Above], Tensor],
) -> Tensor:
    """Return what is computed of ``rows``: by an operator where torch.compile may not look, else as it is traced."""
    if is_opaque(rows):
        return operator(rows, above, fields.name, fields.without_number.key, fields.static_scale)
    if torch.compiler.is_compiling():
        return traced(rows, _above(rows, fields, above), fields)
    return computed(rows, fields, above)


def _fake_quantize(rows: Tensor, fields: Fields, above: Above) -> Tensor:
    if not rows.numel():
        return torch.empty_like(rows, memory_format=torch.contiguous_format)
    rows, above = rows.resolve_neg(), _above(rows, fields, above)
    return backend_for(rows, fields, "fake_quantize").fake_quantize(rows, above, fields)


def _above(rows: Tensor, fields: Fields, above: Above) -> Above:
    return arithmetic.tensor_scale(rows, fields) if above is None else above


def quantize(rows: Tensor, fields: Fields, above: Above = None) -> tuple[Tensor, Tensor | None, Above]:
    """Return the packed codes (…, rows, bytes) of ``rows``, their block scales' (…, rows, blocks), the tensor scale."""
    if is_opaque(rows):
        key, number = fields.without_number.key, fields.static_scale
        data, scale, top = _quantize_op(rows, above, fields.name, key, number)
        top = None if fields.tensor_scale == "none" else top if above is None else above
        return data, scale if fields.scale else None, top
    above = _above(rows, fields, above)
    if not torch.compiler.is_compiling():
        return *_quantize(rows, fields, above), above
    codes, block_scale = arithmetic.quantize(rows, above, fields)
    return pack(codes, fields.element.bits), block_scale, above


def _quantize(rows: Tensor, fields: Fields, above: Above) -> tuple[Tensor, Tensor | None]:
    if not rows.numel():
        return empty_codes(rows, fields)
    rows = rows.resolve_neg()
    return backend_for(rows, fields, "quantize").quantize(rows, above, fields)


def dequantize(
    data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
) -> Tensor:
    """Return the values (…, rows, length), contiguous, of what ``quantize`` returned, in ``dtype``."""
    if is_opaque(data):
        name, key = fields.name, fields.without_number.key
        values: Tensor = _dequantize_op(data, scale, above, name, key, length, dtype)
        return values
    if not torch.compiler.is_compiling():
        return _dequantize(data, scale, above, fields, length, dtype)
    return arithmetic.dequantize(unpack(data, fields.element.bits, length), scale, above, fields, dtype)


def _dequantize(
    data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
) -> Tensor:
    like = data.new_empty(0, dtype=dtype)
    if not data.numel():
        return like.new_empty(*data.shape[:-1], length)
    backend = backend_for(like, fields, "dequantize")
    return backend.dequantize(data, scale, above, fields, length, dtype)


def saturates(rows: Tensor, fields: Fields, above: Above = None) -> Tensor:
    """Return where (bool) a value of ``rows`` (…, rows, columns) exceeds the largest that its block can hold."""
    return _routed(rows, fields, above, _saturates_op, arithmetic.saturates, _saturates)


def _saturates(rows: Tensor, fields: Fields, above: Above) -> Tensor:
    if not rows.numel():
        return torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    rows = rows.resolve_neg()
    return backend_for(rows, fields, "saturates").saturates(rows, _above(rows, fields, above), fields)


def product(input: Tensor | Coded, weight: Coded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return input · weightᵀ + bias, (rows, rows of the weight), in ``dtype``; not compiled, and without a gradient.

    By a backend that multiplies codes, if one claims these formats; else from dequantized operands.
    """
    fields = input.fields if isinstance(input, Coded) else None
    backend = product_backend_for(fields, weight.fields, dtype, weight.data.device.type)
    found = None if backend is None else backend.product(input, weight, bias, dtype)
    if found is not None:
        return found
    values = _values(input, dtype) if isinstance(input, Coded) else input.to(dtype)
    return torch.nn.functional.linear(values, _values(weight, dtype), bias)


def _values(coded: Coded, dtype: torch.dtype) -> Tensor:
    return dequantize(coded.data, coded.scale, coded.above, coded.fields, coded.length, dtype)


# ---- what torch.compile sees of the CPU's kernels


def _numbered(key: str, name: str, static_scale: float | None) -> Fields:
    fields = Fields.from_key(name, key)
    return fields if static_scale is None else replace(fields, static_scale=static_scale)


@torch.library.custom_op("qsurgeon::fake_quantize", mutates_args=())
def _fake_quantize_op(rows: Tensor, above: Tensor | None, name: str, key: str, static_scale: float | None) -> Tensor:
    return _fake_quantize(rows, _numbered(key, name, static_scale), above)


@_fake_quantize_op.register_fake
def _(rows: Tensor, above: Tensor | None, name: str, key: str, static_scale: float | None) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@torch.library.custom_op("qsurgeon::saturates", mutates_args=())
def _saturates_op(rows: Tensor, above: Tensor | None, name: str, key: str, static_scale: float | None) -> Tensor:
    return _saturates(rows, _numbered(key, name, static_scale), above)


@_saturates_op.register_fake
def _(rows: Tensor, above: Tensor | None, name: str, key: str, static_scale: float | None) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.bool, device=rows.device)


# An operator returns tensors only, none of them one that it was given: what there is not to say is an empty one.
@torch.library.custom_op("qsurgeon::quantize", mutates_args=())
def _quantize_op(
    rows: Tensor, above: Tensor | None, name: str, key: str, static_scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    fields = _numbered(key, name, static_scale)
    found = None if above is not None else arithmetic.tensor_scale(rows, fields)
    data, scale = _quantize(rows, fields, found if above is None else above)
    return data, rows.new_empty(0) if scale is None else scale, rows.new_empty(0) if found is None else found


@_quantize_op.register_fake
def _(
    rows: Tensor, above: Tensor | None, name: str, key: str, static_scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    fields = _numbered(key, name, static_scale)
    data, scale = empty_codes(rows, fields)
    found = None if above is not None else arithmetic.tensor_scale(rows, fields)
    return data, rows.new_empty(0) if scale is None else scale, rows.new_empty(0) if found is None else found


@torch.library.custom_op("qsurgeon::dequantize", mutates_args=())
def _dequantize_op(
    data: Tensor, scale: Tensor | None, above: Tensor | None, name: str, key: str, length: int, dtype: torch.dtype
) -> Tensor:
    return _dequantize(data, scale, above, Fields.from_key(name, key), length, dtype)


@_dequantize_op.register_fake
def _(
    data: Tensor, scale: Tensor | None, above: Tensor | None, name: str, key: str, length: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty(*data.shape[:-1], length, dtype=dtype)
