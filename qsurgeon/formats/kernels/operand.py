"""An operand of a product on a CPU, rounded by one call of compiled code: what a layer asks for at each call.

The other way leads through a format's checks, the choice of an implementation, a tensor scale made of several torch
operations, and a call of the kernel: for a few thousand values that takes longer than rounding them. Here it is decided
once, for each format and dtype, what the call is told; the values are the same to the bit. Where anything is unusual
(a tracer, a subclass, another device, a kernel that was chosen by hand, a compiler that is missing), these functions
return None, and the other way is taken.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsurgeon.formats.fields import Fields
from qsurgeon.formats.kernels import choosing, native
from qsurgeon.formats.packing import packed_length
from qsurgeon.torch_private import is_stand_in

# os.environ.get takes longer than all other questions here; this is the mapping below it (CPython, on Linux and macOS).
_environment: Mapping[Any, Any] = getattr(os.environ, "_data", os.environb if os.supports_bytes_environ else {})
_CHOICE = choosing.VARIABLE.encode() if os.supports_bytes_environ else choosing.VARIABLE
_NATIVE = (None, b"", b"native", "", "native")
_PLAIN = (Tensor, torch.nn.Parameter)
_NONE, _WHOLE, _ROWS, _GIVEN, _GIVEN_ROWS = range(5)  # as operand.cpp numbers them


class Written(NamedTuple):
    """An operand's values beside the codes and scales that they are, shaped as ``Format.quantize`` has them."""

    values: Tensor
    data: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None


class Call(NamedTuple):
    """What the compiled code of one format and dtype is told at each call."""

    run: Callable[..., None]
    read: Callable[..., None]
    kind: int
    number: float
    seed: int


def is_usual(x: Tensor) -> bool:
    """Return whether ``x`` is memory of a CPU that compiled code may read, and nobody watches what is done with it."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu
        and x.layout is torch.strided
        and choosing.BACKENDS[0] is native.NATIVE
        and not is_stand_in(x)
        and _environment.get(_CHOICE) in _NATIVE
    )


def values(x: Tensor, fields: Fields) -> Tensor | None:
    """Return ``x`` (..., k) rounded, as ``Format.fake_quantize`` does it; None where this is not the way.

    The format does not rotate, and knows what its tensor scale is of (``as_input``, ``as_weight``).
    """
    call = _call(fields, x.dtype)
    columns = x.shape[-1] if x.dim() else 0
    if call is None or not columns or not x.numel():
        return None
    x = x.contiguous()
    out = torch.empty_like(x)
    at = x.data_ptr()
    if not at:
        return None
    _run(call, x, at, out.data_ptr(), None, None, None, columns)
    return out


def written(x: Tensor, fields: Fields) -> Written | None:
    """Return what ``values`` returns, with the codes and scales of it; None where this is not the way."""
    call = _call(fields, x.dtype)
    if call is None or not x.dim() or not x.numel():
        return None
    x = x.contiguous()
    at, columns, rows, lead = x.data_ptr(), x.shape[-1], x.shape[-2] if x.dim() > 1 else 1, x.shape[:-1]
    if not at:
        return None
    out = torch.empty_like(x)
    data = torch.empty((*lead, packed_length(columns, fields.element.bits)), dtype=torch.uint8)
    scale = above = None
    if fields.scale is not None:
        height, width = fields.block_shape
        shape = (-(-columns // width),) if x.dim() == 1 else (*x.shape[:-2], -(-rows // height), -(-columns // width))
        scale = torch.empty(shape, dtype=fields.scale.dtype)
    if call.kind:
        by_row = call.kind in (_ROWS, _GIVEN_ROWS)
        above = torch.empty(lead if by_row else (), dtype=torch.float32)
    places = [None if one is None else one.data_ptr() for one in (scale, above)]
    _run(call, x, at, out.data_ptr(), data.data_ptr(), places[0], places[1], columns)
    return Written(out, data, scale, above)


def read(
    data: Tensor, scale: Tensor | None, tensor_scale: Tensor | None, fields: Fields, length: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the values of what ``written`` returned, in rows of ``length``; None where this is not the way.

    Its tensors have the shapes that the format gives them; nothing here checks them.
    """
    call = _call(fields, dtype)
    parts = [one for one in (data, scale, tensor_scale) if one is not None]
    if call is None or not data.numel() or data.dtype is not torch.uint8:
        return None
    if not all(is_usual(one) and one.is_contiguous() for one in parts):
        return None
    at = data.data_ptr()
    above = None if tensor_scale is None else tensor_scale.data_ptr()
    if not at or above == 0:
        return None
    out = torch.empty((*data.shape[:-1], length), dtype=dtype)
    rows, count = data.shape[-2] if data.dim() > 1 else 1, out.numel()
    step = 0 if tensor_scale is None or tensor_scale.numel() == 1 else 1
    scales = None if scale is None else scale.data_ptr()
    threads = 1 if count < native.SMALL else torch.get_num_threads()
    call.read(at, scales, out.data_ptr(), count // (rows * length), rows, length, above, step, threads)
    return out


def _run(call: Call, x: Tensor, at: int, out: Any, data: Any, scale: Any, above: Any, columns: int) -> None:
    count, lead = x.numel(), x.shape
    rows = lead[-2] if len(lead) > 1 else 1
    threads = 1 if count < native.SMALL else torch.get_num_threads()
    matrices = count // (rows * columns)
    call.run(at, out, data, scale, above, matrices, rows, columns, call.kind, call.number, call.seed, threads)


# ---- what is decided once

_calls: dict[tuple[str, str, torch.dtype], Call | None] = {}


def _call(fields: Fields, dtype: torch.dtype) -> Call | None:
    if choosing.BACKENDS[0] is not native.NATIVE:
        return None  # another backend is asked first
    key = (fields.key, fields.kernel_key, dtype)
    try:
        return _calls[key]
    except KeyError:
        return _calls.setdefault(key, _decided(fields, dtype))


def _decided(fields: Fields, dtype: torch.dtype) -> Call | None:
    number = fields.static_scale
    if fields.depends_on_role or (fields.tensor_scale == "static" and number is None):
        return None
    kinds = {"none": _NONE, "tensor": _WHOLE, "row": _ROWS, "static": _GIVEN_ROWS if fields.has_row_scales else _GIVEN}
    kind = kinds.get(fields.tensor_scale)  # one that operand.cpp does not find goes the other way
    library = None if kind is None else native.library(fields, dtype)
    if library is None or kind is None:
        return None
    return Call(library.direct.operand, library.direct.dequantize, kind, number or 0.0, fields.seed)
