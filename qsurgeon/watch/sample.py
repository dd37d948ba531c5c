"""A sample of a tensor: whole rows of a weight, or tokens of an input, and how they are rounded."""

import random
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from qsurgeon.formats import Format
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.rotation import Rotation, rotated
from qsurgeon.layers import PackedLayer, Quantization, QuantLayer, Weight
from qsurgeon.torch_private import writes

_SEED = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of a tensor, and how a wrapped layer rounds them.

    at: where they stand in it. format: None leaves them as they are, but for the rotation. above: the tensor scale of
    the whole tensor, or the static one. state: the tensor's place in memory, and autograd's count of writes to it.
    """

    rows: Tensor
    at: tuple[int, ...]
    format: Format | None
    rotation: Rotation | None
    above: Tensor | None
    state: tuple[int, int] | None

    @property
    def kind(self) -> Hashable:
        """What is the same of samples that can be rounded together."""
        format = None if self.format is None else self.format.without_number.key
        return format, self.rotation, self.rows.shape, self.rows.dtype, self.rows.device


def sample(
    x: Tensor, format: Format | None, rotation: Rotation | None, rows: tuple[int, ...], known: Sample | None = None
) -> Sample:
    """Return a copy of some rows of ``x``, (rows, k), with what says how they are rounded.

    The scale of a whole tensor costs a pass over it; that of ``known`` is taken if the tensor is the same, by its
    place, by autograd's count of writes to it, and by what these rows hold.
    """
    taken = x.index_select(0, places(rows, x.device))  # a copy: what is kept of them must not keep the rest
    above = state = None
    if format is not None and format.tensor_scale == "static":
        above = arithmetic.tensor_scale(rotated(taken, rotation), format)
    elif format is not None and format.tensor_scale == "tensor":
        state = None if x.is_inference() else (x.data_ptr(), writes(x))
        if (
            known is not None
            and known.state == state is not None
            and known.format == format
            and _same(known, taken, rows)
        ):
            above = known.above
        else:
            above = arithmetic.tensor_scale(rotated(x, rotation), format)
    return Sample(taken, rows, format, rotation, above, state)


def as_it_is(rows: Tensor, at: tuple[int, ...]) -> Sample:
    """Return some rows, (rows, k), that are neither rounded nor rotated any more."""
    return Sample(rows, at, None, None, None, None)


def local(parameter: Tensor) -> Tensor:
    """Return the tensor itself; of a DTensor, this process's shard."""
    parameter = parameter.detach()
    shard: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return shard


def how_of(layer: nn.Module, weight: Weight) -> Quantization | None:
    """Return how a weight computes; also of a layer that has become a plain one since, if its attributes are there."""
    if isinstance(layer, QuantLayer):
        return layer.quantizations.get(weight.name)
    how: Quantization | None = vars(layer).get("quantization")
    return how


def rows_in(layer: QuantLayer, weight: Weight) -> Tensor:
    """Return a view of a weight as (outputs, inputs), or its codes, (outputs, bytes); of a DTensor, of its shard."""
    tensor = local(getattr(layer, weight.name))
    return tensor if isinstance(layer, PackedLayer) else weight.rows(tensor)


@lru_cache(256)
def rows_of(count: int, rows: int, height: int) -> tuple[int, ...]:
    """Return which of ``count`` rows are sampled: whole bands of ``height``, drawn at random, always the same.

    Evenly spaced ones could be the same place of every attention head.
    """
    bands = -(-count // height)
    drawn = random.Random(_SEED).sample(range(bands), min(bands, -(-rows // height)))  # nothing is secret
    return tuple(row for band in sorted(drawn) for row in range(band * height, min(count, (band + 1) * height)))


@lru_cache(256)
def places(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ``rows`` as an index that is on ``device`` already."""
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device=device)


def _same(known: Sample, rows: Tensor, at: tuple[int, ...]) -> bool:
    count = len(rows)
    return known.at[:count] == at and known.rows.dtype == rows.dtype and torch.equal(known.rows[:count], rows)
