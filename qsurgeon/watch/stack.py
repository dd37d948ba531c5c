"""Stacked samples of one kind, so that one operation handles all layers of that kind."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from qsurgeon.formats import Format, Quantized, kernels
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.packing import pack
from qsurgeon.formats.rotation import rotated
from qsurgeon.formats.tensor_scale import kept_by_row
from qsurgeon.watch.sample import Sample

T = TypeVar("T")


class Stack:
    """Samples that can be rounded together. rows: (layers, rows, k), as they were taken; turned: rotated, if at all."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.rows = torch.stack([one.rows for one in samples])
        self._samples = samples
        self.turned = rotated(self.rows, samples[0].rotation)

    @property
    def is_rounded(self) -> bool:
        """Whether the samples have a format."""
        return self._samples[0].format is not None

    @cached_property
    def quantized(self) -> Quantized:
        """The codes, (layers, rows, k), of rows that are rotated where there is a rotation."""
        if self._samples[0].format is None:
            raise ValueError("samples without a format have no codes")
        format = self._samples[0].format.without_rotation.without_number
        if format.rounding == "stochastic":
            return _stochastic(self.turned, self._samples, format)
        if self._samples[0].above is None:
            return format.quantize(self.turned)
        above = _joined([one.above for one in self._samples])
        data, scale, _ = kernels.quantize(self.turned, format, above)
        return _quantized(data, scale, above, format, self.turned)

    @cached_property
    def values(self) -> Tensor:
        """What a wrapped layer multiplies, float32, (layers, rows, k)."""
        return (self.turned if self._samples[0].format is None else self.quantized.dequantize()).float()

    @property
    def noise(self) -> Tensor:
        """The squares of what rounding changed, over those of the values, (layers,); 0 where it changed nothing."""
        noise = energy(self.values - self.turned)
        return torch.where(noise == 0, noise, noise / energy(self.turned))


def alike(of: Mapping[str, T], kind: Callable[[T], Hashable]) -> Iterator[tuple[list[str], list[T]]]:
    """Yield the names and the things of each kind."""
    groups: dict[Hashable, list[str]] = {}
    for name, one in of.items():
        groups.setdefault(kind(one), []).append(name)
    for names in groups.values():
        yield names, [of[name] for name in names]


def energy(x: Tensor) -> Tensor:
    """Return the sum of the squares of each layer, (layers,), summed in float64."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=wide)
    return norm.square()


def _stochastic(turned: Tensor, samples: Sequence[Sample], format: Format) -> Quantized:
    """Return the codes of rows with the random numbers that they get where they stand, a band of blocks a time."""
    height = format.block_shape[0]
    codes, scales, aboves = [], [], []
    for rows, one in zip(turned, samples, strict=True):
        above = arithmetic.tensor_scale(rows, format) if one.above is None else one.above
        for first in range(0, len(rows), height):
            band = slice(first, first + height)
            part = above if above is None or above.numel() == 1 else above[band]
            code, scale = arithmetic.quantize(rows[band], part, format, (one.at[first], 0))
            codes.append(code)
            scales.append(scale)
        aboves.append(above)
    layers = len(samples)
    data = pack(torch.cat(codes).reshape(turned.shape), format.element.bits)
    found = [one for one in scales if one is not None]
    scale = torch.cat(found).reshape(layers, -1, found[0].shape[-1]) if found else None
    return _quantized(data, scale, _joined(aboves), format, turned)


def _joined(aboves: Sequence[Tensor | None]) -> Tensor | None:
    """Return the tensor scales of all layers, (layers, rows or 1, 1)."""
    found = [one for one in aboves if one is not None]
    return torch.stack(found) if found else None


def _quantized(data: Tensor, scale: Tensor | None, above: Tensor | None, format: Format, turned: Tensor) -> Quantized:
    by_row = None if above is None else kept_by_row(above, turned.shape[:-1])
    return Quantized(data, scale, by_row, format, turned.dtype, turned.shape[-1])
