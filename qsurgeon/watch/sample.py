"""A sample of what a QuantLinear computes with: whole rows of its weight, tokens of its input, what came out."""

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from qsurgeon.formats import Format, Quantized, arithmetic, kernels
from qsurgeon.formats.packing import pack
from qsurgeon.formats.rotation import Rotation, rotated
from qsurgeon.layers import PackedLinear, QuantLinear

_SEED = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of a tensor and where they stand in it, their format, and the whole tensor's scale where it has one."""

    rows: Tensor
    at: tuple[int, ...]
    format: Format
    above: Tensor | None

    @cached_property
    def quantized(self) -> Quantized:
        """The codes, of rows that are rotated where the format says so."""
        rows, format = rotated(self.rows, self.format.rotation), self.format.without_rotation
        if format.rounding == "stochastic":
            return _stochastic(rows, self.at, self.above, format)
        if self.above is None:
            return format.quantize(rows)
        data, scale = kernels.quantize_under(rows, self.above, format)
        return Quantized(data, scale, self.above.reshape(()), format, rows.dtype, rows.shape[-1])

    @property
    def noise(self) -> Tensor:
        """The squares of what rounding changed, over those of the values; 0 where it changed nothing."""
        values, rounded = _wide(rotated(self.rows, self.format.rotation)), _wide(self.quantized.dequantize())
        noise = (rounded - values).square().sum()
        return torch.where(noise == 0, noise, noise / values.square().sum())


class Call:
    """A sample of what goes into a layer's call, weight and bias included, and of what comes out."""

    def __init__(self, layer: QuantLinear, x: Tensor, rows: int) -> None:
        how, tokens, weight = layer.quantization, x.detach().reshape(-1, x.shape[-1]), local(layer.weight)
        self._tokens = rows_of(len(tokens), rows, 1)
        self._outputs = rows_of(len(weight), rows, how.weight.block_shape[0] if how.weight else 1)
        self._rotation = how.rotation
        self.input = None if how.input is None else sample(tokens, how.input.as_input, self._tokens)
        self._is_packed = isinstance(layer, PackedLinear)
        self._weight = None
        if how.weight is not None and not self._is_packed:
            self._weight = sample(weight, how.weight.as_weight, self._outputs)
        self._x = _taken(tokens, self._tokens) if self.input is None else self.input.rows
        if isinstance(layer, PackedLinear):
            self._w = layer.opened_rows(self._outputs)
        else:
            self._w = _taken(weight, self._outputs) if self._weight is None else self._weight.rows
        self._bias = None if layer.bias is None else _taken(local(layer.bias), self._outputs).float()
        self._y: Tensor | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the call returned."""
        return self._y is not None

    def end(self, output: Tensor) -> None:
        """Take the sample of what the call returned."""
        y = _taken(output.detach().reshape(-1, output.shape[-1]), self._tokens)
        self._y = _taken(y.T, self._outputs).T.to(self._x.device)

    def is_rounded(self) -> Tensor:
        """Return whether the outputs are at least as near to the product of the rounded operands as to the plain one.

        Where nothing is lost there is no telling, and True. NaN, which says nothing of rounding, is True too. A packed
        weight is rounded, and rotated, for good.
        """
        if self._y is None or (self.input is None and self._weight is None and not self._is_packed):
            return torch.tensor(False, device=self._x.device)
        y = _wide(self._y)
        whole = rotated(self._x, self._rotation) if self._is_packed else self._x
        plain = torch.nn.functional.linear(whole.float(), self._w.float(), self._bias)
        x = _operand(self._x, self.input, self._rotation)
        w = self._w if self._is_packed else _operand(self._w, self._weight, self._rotation)
        rounded = torch.nn.functional.linear(x, w, self._bias)
        far, near = ((_wide(one) - y).square().sum() for one in (plain, rounded))
        return ~(near > far)


def sample(x: Tensor, format: Format, rows: tuple[int, ...]) -> Sample:
    """Return a copy of some rows of ``x``, with what says how they are rounded."""
    above = None
    if format.tensor_scale == "tensor":
        above = arithmetic.tensor_scale(rotated(x, format.rotation), format)
    return Sample(_taken(x, rows), rows, format, above)


def _stochastic(rows: Tensor, at: tuple[int, ...], above: Tensor | None, format: Format) -> Quantized:
    """Return the codes of ``rows`` with the random numbers that they get where they stand, a band of blocks a time."""
    above, height = arithmetic.tensor_scale(rows, format) if above is None else above, format.block_shape[0]
    codes, scales = [], []
    for first in range(0, len(at), height):
        band = slice(first, first + height)
        part = above if above is None or above.numel() == 1 else above[band]
        one, scale = arithmetic.quantize(rows[band], part, format, (at[first], 0))
        codes.append(one)
        scales.append(scale)
    data = pack(torch.cat(codes), format.element.bits)
    scale = torch.cat([one for one in scales if one is not None]) if format.scale is not None else None
    if above is not None:
        above = above.reshape(()) if above.numel() == 1 and format.tensor_scale != "row" else above.squeeze(-1)
    return Quantized(data, scale, above, format, rows.dtype, rows.shape[-1])


def local(parameter: Tensor) -> Tensor:
    """Return the tensor itself; of a DTensor, this process's shard."""
    parameter = parameter.detach()
    shard: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return shard


@lru_cache(256)
def rows_of(count: int, rows: int, height: int) -> tuple[int, ...]:
    """Return which of ``count`` rows are sampled: whole bands of ``height``, drawn at random, always the same.

    Evenly spaced ones could be the same place of every attention head.
    """
    bands = -(-count // height)
    drawn = random.Random(_SEED).sample(range(bands), min(bands, -(-rows // height)))  # nothing is secret
    return tuple(row for band in sorted(drawn) for row in range(band * height, min(count, (band + 1) * height)))


def _taken(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Return a copy of some rows: what is kept of them must not keep the rest."""
    return x[torch.tensor(rows, dtype=torch.int64, device=x.device)]


def _operand(rows: Tensor, sample: Sample | None, rotation: Rotation | None) -> Tensor:
    """Return what a QuantLinear multiplies, in float32."""
    return (rotated(rows, rotation) if sample is None else sample.quantized.dequantize()).float()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # Apple's GPUs have no float64
