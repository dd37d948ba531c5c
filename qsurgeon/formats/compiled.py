"""The operations of arithmetic.py as one compiled kernel each: what a GPU runs outside of a model that is compiled.

Blocks are counted in one dimension, so that one kernel serves every shape. Where torch.compile does not work, which is
said once, pieces.py computes the same.
"""

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from qsurgeon.formats import arithmetic, pieces
from qsurgeon.formats.fields import Fields
from qsurgeon.formats.native import say
from qsurgeon.formats.packing import pack, unpack
from qsurgeon.formats.pieces import Above, per_row_of


def fake_quantize(rows: Tensor, above: Above, fields: Fields) -> Tensor:
    """As ``pieces.fake_quantize``."""
    found = _run(_fake_quantize, fields, (), *_operands(rows, above, fields))
    return pieces.fake_quantize(rows, above, fields) if found is None else _as(found, rows, rows.shape[-1])


def quantize(rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
    """As ``pieces.quantize``."""
    first, own = _operands(rows, above, fields)
    found = _run(_quantize, fields, (), first, own)
    if found is None:
        return pieces.quantize(rows, above, fields)
    data, scale = found
    if first is rows:
        return data, scale
    many = rows.shape[-1] // first.shape[-1]
    return _as(data, rows, many * data.shape[-1]), None if scale is None else _as(scale, rows, many)


def dequantize(
    data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
) -> Tensor:
    """As ``pieces.dequantize``."""
    width, bits = _width(length, fields), fields.element.bits
    if not width:
        found = _run(_dequantize, fields, (length, dtype), data, scale, above)
    else:
        blocks = None if scale is None else scale.reshape(-1, 1)
        operands = data.reshape(-1, width * bits // 8), blocks, _by_block(above, data, width * bits // 8)
        found = _run(_dequantize, fields, (width, dtype), *operands)
    return pieces.dequantize(data, scale, above, fields, length, dtype) if found is None else _as(found, data, length)


def _operands(rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Above]:
    """Return what is to be rounded: the blocks and the tensor scale of each; both as they are where that cannot be."""
    width = _width(rows.shape[-1], fields) if fields.rounding == "nearest" else 0
    return (rows.reshape(-1, width), _by_block(above, rows, width)) if width else (rows, above)


def _as(blocks: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Return what was computed block by block as rows again, (…, columns)."""
    return blocks.view(*rows.shape[:-1], columns)


def _width(columns: int, fields: Fields) -> int:
    """Return the width of the blocks that ``columns`` can be cut into, and their codes into bytes; 0 if they cannot."""
    height, width = fields.block_shape
    fits = height == 1 and width and columns % width == 0 and width * fields.element.bits % 8 == 0
    return width if fits else 0


def _by_block(above: Above, rows: Tensor, width: int) -> Above:
    """Return the tensor scale of each block of ``width`` columns, (blocks, 1); (1, 1) where all share one."""
    per_row = per_row_of(above, rows)
    if per_row is None or len(per_row) == 1:
        return None if per_row is None else per_row[:, None]
    return per_row[:, None].repeat_interleave(rows.shape[-1] // width, 0)


# ---- what is compiled


def _fake_quantize(fields: Fields, rows: Tensor, above: Above) -> Tensor:
    return arithmetic.fake_quantize(rows, above, fields)


def _quantize(fields: Fields, rows: Tensor, above: Above) -> tuple[Tensor, Tensor | None]:
    codes, scale = arithmetic.quantize(rows, above, fields)
    return pack(codes, fields.element.bits), scale


def _dequantize(
    fields: Fields, length: int, dtype: torch.dtype, data: Tensor, scale: Tensor | None, above: Above
) -> Tensor:
    return arithmetic.dequantize(unpack(data, fields.element.bits, length), scale, above, fields, dtype)


def _run(act: Callable[..., Any], fields: Fields, fixed: tuple[Any, ...], first: Tensor, *others: Tensor | None) -> Any:
    """Return what ``act``, compiled, returns of tensors; None where there is no compiler, or too little to compute."""
    if _no_compiler or len(first) < 2:
        return None  # torch.compile takes a size of 1 for a constant
    for operand in (first, *others):
        if operand is not None and len(operand) > 1:
            torch._dynamo.maybe_mark_dynamic(operand, 0)
    try:
        return _kernel(act, fields.without_number.key, fixed)(first, *others)
    except RuntimeError as error:
        # Asked by name: importing its exceptions takes a second, in every process.
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        say(f"torch.compile fails here, so that slower torch operations compute the same values: {reason}")
        _no_compiler.append(reason)
        return None


@cache
def _kernel(act: Callable[..., Any], key: str, fixed: tuple[Any, ...]) -> Callable[..., Any]:
    fields = Fields.from_key("compiled", key)

    def run(*operands: Tensor | None) -> Any:
        return act(fields, *fixed, *operands)

    # torch.compile keeps what it learnt, and counts recompilations, by code object: each kernel needs one of its own.
    run.__code__ = run.__code__.replace(co_name=f"{act.__name__}_{next(_numbers)}")
    return torch.compile(run)


_numbers = count()
_no_compiler: list[str] = []  # why torch.compile does not work here, once it was tried
