"""The block Hadamard rotation: runs of values along the contraction dimension, with random signs.

Rotating both operands of a product leaves the product alone, x·Wᵀ = (xR)·(WR)ᵀ with RRᵀ = 1, and spreads an outlier
over its run, so that it no longer sets the scale alone (as in arXiv 2502.20586 and 2509.23202).
R = diag(signs) · H / √size, H Sylvester's Hadamard matrix.
"""

import math
import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError


@dataclass(frozen=True)
class Rotation:
    """Rotate runs of ``size`` values; ``seed`` gives each place in a run its sign."""

    size: int
    seed: int

    def __post_init__(self) -> None:
        _ = self.signs  # computed now: torch.compile cannot trace the generator

    def check(self, length: int) -> None:
        """Do nothing if runs of this size fill ``length`` values. Raises: ShapeError."""
        if length % self.size:
            raise ShapeError(f"hadamard {self.size} does not divide the {length} values of a row")

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (..., k) rotated, in float32. Raises: ShapeError if the size does not divide k."""
        return self._butterflies(rows.to(torch.float32), rows.shape[-1], signs_first=True)

    def back(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (..., k) as they were before the rotation, in float32. Raises: as the rotation."""
        return self._butterflies(rows.to(torch.float32), rows.shape[-1], signs_first=False)

    @cached_property
    def signs(self) -> tuple[float, ...]:
        """The sign of each place in a run, from Python's generator: a checkpoint's seed must mean the same for good."""
        source = random.Random(self.seed)  # nothing is secret
        return tuple(1.0 if source.random() < 0.5 else -1.0 for _ in range(self.size))

    def _butterflies(self, rows: Tensor, length: int, *, signs_first: bool) -> Tensor:
        """Multiply with H by sums and differences: their order, and so every bit, is the same everywhere."""
        self.check(length)
        runs = rows.reshape(*rows.shape[:-1], length // self.size, self.size)
        signs = torch.tensor(self.signs, dtype=torch.float32, device=rows.device)
        if signs_first:
            runs = runs * signs
        half = 1
        while half < self.size:
            pairs = runs.reshape(*runs.shape[:-1], self.size // (2 * half), 2, half)
            low, high = pairs.select(-2, 0), pairs.select(-2, 1)
            runs = torch.stack((low + high, low - high), dim=-2).reshape(runs.shape)
            half *= 2
        runs = runs * (1 / math.sqrt(self.size))
        return (runs if signs_first else runs * signs).reshape(rows.shape)


def rotated(rows: Tensor, rotation: Rotation | None) -> Tensor:
    """Return ``rows`` (..., k) rotated, in float32; themselves without a rotation. Raises: as the rotation."""
    return rows if rotation is None else rotation(rows)
