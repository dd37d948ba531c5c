"""How near a format comes to what it rounds: the ratio of signal to quantization noise, measured."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qsurgeon.formats.block import Format
from qsurgeon.formats.kernels import arithmetic

SHAPE = (512, 512)
_SEED = 0


def sqnr(x: Tensor, rounded: Tensor) -> float:
    """Return 10 · log10(Σx² / Σ(rounded − x)²), in dB, summed in float64; infinity where nothing was lost."""
    return decibels(energy(x), energy(rounded.double() - x.double()))


def energy(x: Tensor) -> float:
    """Return Σx², summed in float64."""
    return x.double().square().sum().item()


def decibels(signal: float, noise: float) -> float:
    """Return 10 · log10(signal / noise); infinity without noise, minus infinity where there is only noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def gaussian() -> Tensor:
    """Return standard normal values, always the same."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(_SEED))


def heavy_tailed() -> Tensor:
    """Return values of Student's t distribution with 4 degrees of freedom, always the same."""
    generator = torch.Generator().manual_seed(_SEED + 1)
    normal, others = torch.randn(SHAPE, generator=generator), torch.randn(4, *SHAPE, generator=generator)
    return normal / others.square().mean(0).sqrt()


SAMPLES: Mapping[str, Callable[[], Tensor]] = {"gaussian": gaussian, "t(4)": heavy_tailed}


def reached(format: Format, x: Tensor) -> float:
    """Return the SQNR of ``x`` (rows, columns), in dB, that ``format`` reaches as a weight's.

    In plain torch operations: a table of all formats should not wait for a compiler.
    """
    fields = format.as_weight
    rows = x if fields.rotation is None else fields.rotation(x)
    return sqnr(rows, arithmetic.fake_quantize(rows, arithmetic.tensor_scale(rows, fields), fields))
