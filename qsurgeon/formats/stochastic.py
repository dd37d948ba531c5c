"""Uniform numbers without a state: a hash of the seed, of where a value stands, and of the value itself.

So the same tensor is rounded to the same values whenever it is (recomputed under gradient checkpointing, resumed,
packed and unpacked), and a weight that an optimizer changed, or the next batch, gets fresh numbers. The mixing
function is lowbias32 of Chris Wellons (public domain, https://nullprogram.com/blog/2018/07/31/). The noise of
``layers/noise/`` is made by the same function.
"""

import torch
from torch import Tensor

WEYL = 0x9E3779B9  # 2^32 over the golden ratio: neighbouring columns land far apart


def signed(x: int) -> int:
    """Return 32 bits as torch's int32 has them."""
    return x - 2**32 if x >= 2**31 else x


def shifted(x: Tensor, by: int) -> Tensor:
    """Return ``x >> by`` (int32) with zeros coming in, as of an unsigned number."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def mixed(x: Tensor) -> Tensor:
    """Return 32 bits (int32) that each depend on all of ``x``'s; products wrap around."""
    x = (x ^ shifted(x, 16)) * 0x7FEB352D
    x = (x ^ shifted(x, 15)) * signed(0x846CA68B)
    return x ^ shifted(x, 16)


def spread(columns: Tensor) -> Tensor:
    """Return 32 bits (int32) for each of ``columns`` (int64), such that neighbors have nothing in common."""
    offsets = (columns * WEYL).bitwise_and_(2**32 - 1)
    return torch.where(offsets >= 2**31, offsets - 2**32, offsets).to(torch.int32)


def uniform(x: Tensor, row: int, column: int, seed: int) -> Tensor:
    """Return numbers in [0, 1) (float32, multiples of 2^-24) for ``x`` (float32, (..., rows, columns)).

    ``row`` and ``column`` say where ``x`` begins in the whole tensor, rows of all leading dimensions counted on.
    """
    count = x.numel() // x.shape[-1] if x.shape[-1] else 0
    rows = torch.arange(row, row + count, dtype=torch.int64, device=x.device).to(torch.int32)
    keys = mixed(rows + seed).reshape(*x.shape[:-1], 1)
    offsets = spread(torch.arange(column, column + x.shape[-1], dtype=torch.int64, device=x.device))
    # One zero has one number: negating a tensor must only change signs.
    bits = x.view(torch.int32).bitwise_and(0x7FFFFFFF)
    return shifted(mixed((keys + offsets) ^ bits), 8).to(torch.float32).mul_(2.0**-24)
