"""Which implementation of a format's arithmetic runs; all of them give the same bits.

On a CPU it is native.cpp, compiled for the format; on a GPU the operations of arithmetic.py, compiled by torch.compile
into one Triton kernel each (compiled.py); where there is no compiler, the same operations one by one (pieces.py).
``QSURGEON_KERNELS`` (native, compile, eager) takes the choice away from this module. Inside a model that is itself
being compiled, a CPU sees one opaque operator and a GPU the operations, to fuse them with others.

Under ``torch.set_flush_denormal(True)``, which belongs to a thread, native code computes in the mode of the thread that
called it, as the other kinds do on one thread: subnormal values are rounded as zeros. Torch's own operations on several
threads flush on some of them.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats.fields import Fields
from qsurgeon.formats.kernels import arithmetic, compiled, native, pieces
from qsurgeon.formats.kernels.pieces import Above, empty_codes, matrices, per_row_of
from qsurgeon.formats.packing import pack, unpack

Kind = Literal["native", "compile", "eager"]
KINDS: tuple[Kind, ...] = ("native", "compile", "eager")
GPUS = ("cuda", "xpu")  # devices for which torch.compile makes Triton kernels
VARIABLE = "QSURGEON_KERNELS"


def kind_for(rows: Tensor, fields: Fields) -> Kind:
    """Return which implementation takes ``rows``. Raises: FormatError for a word that QSURGEON_KERNELS cannot be."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in KINDS:
        raise FormatError(f"{VARIABLE} is '{wanted}'; {nearest(wanted, KINDS)}")
    plain = type(rows) in (Tensor, torch.nn.Parameter) and rows.layout == torch.strided and not _is_traced(rows)
    if plain and rows.device.type == "cpu" and rows.dtype in native.DTYPES and wanted in ("", "native"):
        return "native" if native.library(fields, rows.dtype) is not None else "eager"
    if wanted == "compile" or (not wanted and rows.device.type in GPUS):
        return "compile"
    return "eager"


def fake_quantize(rows: Tensor, fields: Fields) -> Tensor:
    """Return ``rows`` (…, rows, columns) rounded, contiguous, in their own dtype."""
    return _routed(rows, fields, _fake_quantize_op, arithmetic.fake_quantize, _fake_quantize)


def _routed(
    rows: Tensor,
    fields: Fields,
    operator: Callable[..., Tensor],
    traced: Callable[[Tensor, Above, Fields], Tensor],
    computed: Callable[[Tensor, Fields], Tensor],
) -> Tensor:
    """Return what is computed of ``rows``: by an operator where torch.compile may not look, else as it is traced."""
    if is_opaque(rows):
        return operator(rows, fields.name, fields.without_number.key, fields.static_scale)
    if torch.compiler.is_compiling():
        return traced(rows, arithmetic.tensor_scale(rows, fields), fields)
    return computed(rows, fields)


def _fake_quantize(rows: Tensor, fields: Fields) -> Tensor:
    return fake_quantize_under(rows, arithmetic.tensor_scale(rows, fields), fields)


def fake_quantize_under(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    """Return ``rows`` rounded, contiguous, below a tensor scale that is given; not compiled."""
    if not rows.numel():
        return torch.empty_like(rows, memory_format=torch.contiguous_format)
    rows = rows.resolve_neg()
    return _FAKE_QUANTIZE[kind_for(rows, fields)](rows, above, fields)


def is_opaque(rows: Tensor) -> bool:
    """Return whether what watches torch operations is to see one of ours instead of those that it is made of."""
    return rows.device.type == "cpu" and (torch.compiler.is_compiling() or _is_traced(rows))


def _is_traced(rows: Tensor) -> bool:
    """Return whether ``rows`` is a stand-in whose memory says nothing: under a tracer, torch.func, or lazily zero."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(rows)
        or torch._is_functional_tensor(rows)
        or rows._is_zerotensor()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def quantize(rows: Tensor, fields: Fields) -> tuple[Tensor, Tensor | None, Above]:
    """Return the packed codes (…, rows, bytes) of ``rows``, their block scales' (…, rows, blocks), the tensor scale."""
    if is_opaque(rows):
        data, scale, top = _quantize_op(rows, fields.name, fields.without_number.key, fields.static_scale)
        return data, scale if fields.scale else None, None if fields.tensor_scale == "none" else top
    above = arithmetic.tensor_scale(rows, fields)
    if not torch.compiler.is_compiling():
        return *quantize_under(rows, above, fields), above
    codes, block_scale = arithmetic.quantize(rows, above, fields)
    return pack(codes, fields.element.bits), block_scale, above


def quantize_under(rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
    """Return the codes of ``rows`` and of their block scales, below a tensor scale that is given; not compiled."""
    if not rows.numel():
        return empty_codes(rows, fields)
    rows = rows.resolve_neg()
    return _QUANTIZE[kind_for(rows, fields)](rows, above, fields)


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
    return _DEQUANTIZE[kind_for(like, fields)](data, scale, above, fields, length, dtype)


def saturates(rows: Tensor, fields: Fields) -> Tensor:
    """Return where (bool) a value of ``rows`` (…, rows, columns) exceeds the largest that its block can hold."""
    return _routed(rows, fields, _saturates_op, arithmetic.saturates, _saturates)


def _saturates(rows: Tensor, fields: Fields) -> Tensor:
    if not rows.numel():
        return torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    rows = rows.resolve_neg()
    return _SATURATES[kind_for(rows, fields)](rows, arithmetic.tensor_scale(rows, fields), fields)


# ---- native.cpp


def _native_fake_quantize(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    flat = matrices(rows).contiguous()
    out = torch.empty_like(flat)
    _library(rows, fields).fake_quantize(flat, out, per_row_of(above, rows), fields.seed)
    return out.view(rows.shape)


def _native_quantize(rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
    data, scale = empty_codes(rows, fields)
    _library(rows, fields).quantize(matrices(rows).contiguous(), data, scale, per_row_of(above, rows), fields.seed)
    return data, scale


def _native_dequantize(
    data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(*data.shape[:-1], length, dtype=dtype)
    contiguous = None if scale is None else scale.contiguous()
    _library(out, fields).dequantize(data.contiguous(), contiguous, per_row_of(above, out), matrices(out))
    return out


def _native_saturates(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    flat = matrices(rows).contiguous()
    out = torch.empty(rows.shape, dtype=torch.bool)
    _library(rows, fields).saturates(flat, out, per_row_of(above, rows))
    return out


def _library(rows: Tensor, fields: Fields) -> native.Library:
    library = native.library(fields, rows.dtype)
    if library is None:
        raise FormatError(f"no native kernel for format '{fields.name}' in {rows.dtype}")
    return library


_FAKE_QUANTIZE: dict[Kind, Callable[[Tensor, Above, Fields], Tensor]] = {
    "native": _native_fake_quantize,
    "compile": compiled.fake_quantize,
    "eager": pieces.fake_quantize,
}
_QUANTIZE: dict[Kind, Callable[[Tensor, Above, Fields], tuple[Tensor, Tensor | None]]] = {
    "native": _native_quantize,
    "compile": compiled.quantize,
    "eager": pieces.quantize,
}
_DEQUANTIZE: dict[Kind, Callable[[Tensor, Tensor | None, Above, Fields, int, torch.dtype], Tensor]] = {
    "native": _native_dequantize,
    "compile": compiled.dequantize,
    "eager": pieces.dequantize,
}

_SATURATES: dict[Kind, Callable[[Tensor, Above, Fields], Tensor]] = {
    "native": _native_saturates,
    "compile": compiled.saturates,
    "eager": pieces.saturates,
}


# ---- what torch.compile sees of the CPU's kernels


def _numbered(key: str, name: str, static_scale: float | None) -> Fields:
    fields = Fields.from_key(name, key)
    return fields if static_scale is None else replace(fields, static_scale=static_scale)


@torch.library.custom_op("qsurgeon::fake_quantize", mutates_args=())
def _fake_quantize_op(rows: Tensor, name: str, key: str, static_scale: float | None) -> Tensor:
    return _fake_quantize(rows, _numbered(key, name, static_scale))


@_fake_quantize_op.register_fake
def _(rows: Tensor, name: str, key: str, static_scale: float | None) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@torch.library.custom_op("qsurgeon::saturates", mutates_args=())
def _saturates_op(rows: Tensor, name: str, key: str, static_scale: float | None) -> Tensor:
    return _saturates(rows, _numbered(key, name, static_scale))


@_saturates_op.register_fake
def _(rows: Tensor, name: str, key: str, static_scale: float | None) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.bool, device=rows.device)


# An operator returns tensors only: what a format does not have is an empty one.
@torch.library.custom_op("qsurgeon::quantize", mutates_args=())
def _quantize_op(rows: Tensor, name: str, key: str, static_scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    fields = _numbered(key, name, static_scale)
    above = arithmetic.tensor_scale(rows, fields)
    data, scale = quantize_under(rows, above, fields)
    return data, rows.new_empty(0) if scale is None else scale, rows.new_empty(0) if above is None else above


@_quantize_op.register_fake
def _(rows: Tensor, name: str, key: str, static_scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    fields = _numbered(key, name, static_scale)
    data, scale = empty_codes(rows, fields)
    above = arithmetic.tensor_scale(rows, fields)
    return data, rows.new_empty(0) if scale is None else scale, rows.new_empty(0) if above is None else above


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
