"""The block Hadamard rotation: runs of values along the contraction dimension, with random signs.

Rotating both operands of a product leaves the product alone, x·Wᵀ = (xR)·(WR)ᵀ with RRᵀ = 1, and spreads an outlier
over its run, so that it no longer sets the scale alone (as in arXiv 2502.20586 and 2509.23202).
R = diag(signs) · H / √size, H Sylvester's Hadamard matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError


@dataclass(frozen=True)
class Rotation:
    """Rotate runs of ``size`` values; ``seed`` gives each place in a run its sign."""

    size: int
    seed: int

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

    def _signs(self, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        bits = torch.randint(0, 2, (self.size,), generator=generator, device="cpu")
        return (bits * 2 - 1).to(device, torch.float32)

    def _butterflies(self, rows: Tensor, length: int, *, signs_first: bool) -> Tensor:
        """Multiply with H by sums and differences: their order, and so every bit, is the same everywhere."""
        self.check(length)
        runs = rows.reshape(*rows.shape[:-1], length // self.size, self.size)
        signs = self._signs(rows.device)
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
