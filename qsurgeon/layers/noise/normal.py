"""Normally distributed numbers without a state: each is made of the seed, the step, the norm, and its own place.

So all processes have the same, a resumed run goes on with what it would have had, and a forward pass that gradient
checkpointing computes again has what it had the first time. They are made on the CPU, for all norms at once.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qsurgeon.formats.stochastic import mixed, shifted, signed, spread

Key = tuple[int, int]  # 64 bits, as two numbers of int32


def key_of(seed: int, step: int, name: str) -> Key:
    """Return what the numbers of one norm at one step begin from."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    first, second = (signed(int.from_bytes(digest[at : at + 4], "little")) for at in (0, 4))
    return first, second


def normals(keys: Sequence[Key], sizes: Sequence[int]) -> list[Tensor]:
    """Return for each key as many numbers as its size says (float32, on the CPU), of mean 0 and deviation 1.

    Box and Muller's transform of two uniform numbers for each; none is beyond 5.8.
    """
    columns = spread(torch.cat([torch.arange(size, device="cpu") for size in sizes]))
    counts = torch.tensor(sizes, device="cpu")
    radius, angle = (
        shifted(
            mixed(columns + torch.tensor(half, dtype=torch.int32, device="cpu").repeat_interleave(counts)), 8
        ).double()
        for half in zip(*keys, strict=True)
    )
    values = torch.sqrt(-2 * torch.log((radius + 1) * 2.0**-24)) * torch.cos(angle * (2 * math.pi * 2.0**-24))
    return list(values.float().split(list(sizes)))
