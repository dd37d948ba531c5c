"""What another tool quantized in a checkpoint: how each weight is stored, and how its inputs are rounded.

A reader for each ``quant_method``. What a reader does not know it refuses: a weight is never taken for another.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor as Values

from qsurgeon.checkpoint.reading.headers import DTYPES, Tensor
from qsurgeon.errors import ExchangeError
from qsurgeon.exchange.encodings import Renamed, reciprocal
from qsurgeon.formats import Format, get_format

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Foreign:
    """A weight that another tool quantized.

    stem: what its module is called in the checkpoint. weight, input: the formats. encoding: how it is stored, in
    ``tensors``, by their names in the module. beside: other tensors of it, which it needs no more.
    exact: by its name, a divisor that is not the reciprocal of its reciprocal.
    """

    stem: str
    weight: Format
    input: Format | None
    encoding: Renamed
    tensors: Mapping[str, Tensor]
    beside: tuple[Tensor, ...]
    columns: int
    exact: Mapping[str, float]

    @property
    def rows(self) -> int:
        """How many outputs it has."""
        return self.tensors[self.encoding.codes[0]].shape[0]


class Reader(ABC):
    """Reads the checkpoints of one ``quant_method``."""

    method: ClassVar[str]

    @abstractmethod
    def weights(self, section: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Foreign]:
        """Yield each quantized weight of a checkpoint that has ``tensors``, and a config with ``section``.

        Raises: ExchangeError for what is not known, and for tensors that are not as the config says.
        """


def number_in(tensor: Tensor) -> float:
    """Return the one number of a tensor in float32, read from its file. Raises: ExchangeError for other tensors."""
    if tensor.dtype not in ("F32", "BF16", "F16") or tensor.size != _TORCH[tensor.dtype].itemsize:
        raise ExchangeError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}; expected one number in float32"
        )
    handle = os.open(tensor.file, os.O_RDONLY)
    try:
        data = os.pread(handle, tensor.size, tensor.start)
    finally:
        os.close(handle)
    number: Values = torch.frombuffer(bytearray(data), dtype=_TORCH[tensor.dtype]).to(torch.float32)
    return float(number)


def is_exact(divisor: float) -> bool:
    """Return whether a divisor is the reciprocal of its reciprocal in float32, so that the scale tells it again."""
    return reciprocal(reciprocal(divisor)) == divisor


def with_static(format: str, number: float) -> Format:
    """Return a format of the catalogue with a static tensor scale, under a name of its own."""
    return replace(get_format(format), name=f"{format}-static", tensor_scale="static", static_scale=number)


def expect(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Do nothing for a tensor of this dtype and shape; one value may have any shape. Raises: ExchangeError."""
    one = all(size == 1 for size in (*tensor.shape, *shape))
    if tensor.dtype != DTYPES[dtype] or not (tensor.shape == shape or one):
        found = f"{tensor.file}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}"
        raise ExchangeError(f"{found}; expected {DTYPES[dtype]} {list(shape)}")


def checked(foreign: Foreign) -> Foreign:
    """Return a weight whose tensors are as its format and encoding say. Raises: ExchangeError for one whose are not."""
    slots = foreign.encoding.slots(foreign.weight.as_weight, foreign.rows, foreign.columns)
    for key, slot in slots.items():
        if key not in foreign.tensors:
            raise ExchangeError(f"{foreign.stem}: has no tensor {key}, which weights in {foreign.weight.name} have")
        expect(foreign.tensors[key], slot.dtype, slot.shape)
    return foreign
