"""The operations of arithmetic.py as one compiled kernel each: what a GPU runs outside of a model that is compiled.

Blocks are counted in one dimension, so that one kernel serves every shape. A kernel sees whole blocks only: what is
missing at the ends of rows is added before it, and cut off after it. Where torch.compile does not work, which is said
once, pieces.py computes the same.
"""

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from qsurgeon.formats.fields import Fields
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.kernels.backend import Above, Backend, Operation
from qsurgeon.formats.kernels.pieces import EAGER
from qsurgeon.formats.packing import pack, unpack
from qsurgeon.formats.tensor_scale import of_blocks, per_row
from qsurgeon.telling import say
from qsurgeon.torch_private import EXACT_TRITON, is_compiler_error, let_size_vary


class Compiled(Backend):
    """torch.compile, preferred where it makes Triton kernels."""

    name = "compile"
    preferred_on = frozenset({"cuda", "xpu"})

    def supports(self, fields: Fields, dtype: torch.dtype, device: str, operation: Operation) -> bool:
        """Return True: it compiles the operations that say what a format is."""
        return True

    def fake_quantize(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """As the eager backend."""
        found = None
        if not _moves(rows.shape, fields):
            found = _run(_fake_quantize, fields, (), *_operands(rows, above, fields))
        return EAGER.fake_quantize(rows, above, fields) if found is None else _cut(found, rows.shape, fields)

    def quantize(self, rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """As the eager backend."""
        found, packs = None, _packs(rows.shape, fields)
        if not _moves(rows.shape, fields):
            found = _run(_quantize, fields, (packs,), *_operands(rows, above, fields))
        if found is None:
            return EAGER.quantize(rows, above, fields)
        data, scale = found
        data = data.view(*rows.shape[:-1], -1) if packs else pack(_cut(data, rows.shape, fields), fields.element.bits)
        if scale is not None:
            scale = scale.view(*rows.shape[:-2], -(-rows.shape[-2] // fields.block_shape[0]), -1)
        return data, scale

    def dequantize(
        self, data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
    ) -> Tensor:
        """As the eager backend."""
        shape, bits, (height, width) = torch.Size((*data.shape[:-1], length)), fields.element.bits, fields.block_shape
        by_block = height == 1 and width > 0
        scales = scale.reshape(-1, 1) if scale is not None and by_block else scale
        if not _packs(shape, fields):
            codes, own = _laid(unpack(data, bits, length), above, fields, by_block)
            found = _run(_decode, fields, (dtype,), codes, scales, own)
        elif by_block:
            own = of_blocks(per_row(above, data), length // width)
            found = _run(_dequantize, fields, (width, dtype), data.reshape(-1, width * bits // 8), scales, own)
        else:
            found = _run(_dequantize, fields, (length, dtype), data, scales, above)
        return (
            EAGER.dequantize(data, scale, above, fields, length, dtype) if found is None else _cut(found, shape, fields)
        )

    def saturates(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """As the eager backend."""
        found = _run(_saturates, fields, (), *_operands(rows, above, fields))
        return EAGER.saturates(rows, above, fields) if found is None else _cut(found, rows.shape, fields)


COMPILED = Compiled()


# ---- whole blocks

# Inductor compiles a loop that reads one scale for ``block`` values as a loop over blocks, without what the block
# leaves over (``try_loop_split`` of its C++ backend in torch 2.13): the end of each row would stay unwritten.


def _missing(shape: torch.Size, fields: Fields) -> tuple[int, int]:
    """Return how many rows and columns the last blocks lack."""
    height, width = fields.block_shape
    return -shape[-2] % height, -shape[-1] % max(width, 1)


def _packs(shape: torch.Size, fields: Fields) -> bool:
    """Return whether a kernel can pack the codes too: no block is short, and none ends within a byte."""
    height, width = fields.block_shape
    return _missing(shape, fields) == (0, 0) and (height > 1 or width * fields.element.bits % 8 == 0)


def _moves(shape: torch.Size, fields: Fields) -> bool:
    """Return whether adding rows gives others another place, which is what decides how they are rounded."""
    return fields.rounding != "nearest" and _missing(shape, fields)[0] > 0 and len(shape) > 2


def _operands(rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Above]:
    """Return what is to be rounded, and its tensor scale: as blocks, or as rows where their places decide."""
    by_block = fields.block_shape[0] == 1 and fields.block is not None and fields.rounding == "nearest"
    return _laid(rows, above, fields, by_block)


def _laid(rows: Tensor, above: Above, fields: Fields, by_block: bool) -> tuple[Tensor, Above]:
    """Return ``rows`` in whole blocks, as (blocks, width), (rows, columns) or (…, rows, columns) of squares."""
    height, width = fields.block_shape
    below, right = _missing(rows.shape, fields)
    whole = torch.nn.functional.pad(rows, (0, right, 0, below)) if below or right else rows
    if height > 1:
        return whole.contiguous(), above
    width = width if by_block else whole.shape[-1]
    return whole.reshape(-1, width), of_blocks(per_row(above, rows), whole.shape[-1] // width)


def _cut(found: Tensor, shape: torch.Size, fields: Fields) -> Tensor:
    """Return what was computed of whole blocks in the shape (…, rows, columns) of what they were made of."""
    below, right = _missing(shape, fields)
    whole = found.view(*shape[:-2], shape[-2] + below, shape[-1] + right)
    return whole[..., : shape[-2], : shape[-1]].contiguous() if below or right else whole


# ---- what is compiled


def _fake_quantize(fields: Fields, rows: Tensor, above: Above) -> Tensor:
    return arithmetic.fake_quantize(rows, above, fields)


def _quantize(fields: Fields, packs: bool, rows: Tensor, above: Above) -> tuple[Tensor, Tensor | None]:
    codes, scale = arithmetic.quantize(rows, above, fields)
    return pack(codes, fields.element.bits) if packs else codes, scale


def _dequantize(
    fields: Fields, length: int, dtype: torch.dtype, data: Tensor, scale: Tensor | None, above: Above
) -> Tensor:
    return arithmetic.dequantize(unpack(data, fields.element.bits, length), scale, above, fields, dtype)


def _decode(fields: Fields, dtype: torch.dtype, codes: Tensor, scale: Tensor | None, above: Above) -> Tensor:
    return arithmetic.dequantize(codes, scale, above, fields, dtype)


def _saturates(fields: Fields, rows: Tensor, above: Above) -> Tensor:
    return arithmetic.saturates(rows, above, fields)


def _run(act: Callable[..., Any], fields: Fields, fixed: tuple[Any, ...], first: Tensor, *others: Tensor | None) -> Any:
    """Return what ``act``, compiled, returns of tensors; None where there is no compiler, or too little to compute."""
    if _no_compiler or len(first) < 2:
        return None  # torch.compile takes a size of 1 for a constant
    operands = [None if one is None else one.detach() for one in (first, *others)]
    for operand in operands:
        if operand is not None and len(operand) > 1:
            let_size_vary(operand, 0)
    try:
        with torch.no_grad():  # one kernel, whether autograd records around it or not
            kernel = _kernel(act, fields.without_number.key, fields.kernel_key, fixed, first.dtype, first.device.type)
            return kernel(*operands)
    except RuntimeError as error:
        if not is_compiler_error(error):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        say(f"torch.compile fails here, so that slower torch operations compute the same values: {reason}")
        _no_compiler.append(reason)
        return None


@cache
def _kernel(
    act: Callable[..., Any], key: str, kernel_key: str, fixed: tuple[Any, ...], dtype: torch.dtype, device: str
) -> Any:
    """Return the kernel of an operation; kernel_key says by numbers what ``key`` says by names."""
    fields = Fields.from_key("compiled", key)

    def run(*operands: Tensor | None) -> Any:
        return act(fields, *fixed, *operands)

    # torch.compile keeps what it learnt, and counts recompilations, by code object: each kernel needs one of its own.
    run.__code__ = run.__code__.replace(co_name=f"{act.__name__}_{next(_numbers)}")
    return torch.compile(run) if device == "cpu" else torch.compile(run, options=EXACT_TRITON)


_numbers = count()
_no_compiler: list[str] = []  # why torch.compile does not work here, once it was tried
