"""How other tools store a quantized weight: the names, dtypes and shapes of its tensors, and their bytes.

The codes and scales are those of ``storage.packed``, which has the layout of all of them: the earlier code in the lower
bits of the earlier byte. What differs are names and dtypes, whether the tensor scale is a divisor, and integers that
are stored with an offset.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError
from qsurgeon.formats import Format, Quantized
from qsurgeon.storage import PACKED, Encoding, Slot
from qsurgeon.storage.packed import SCALE, TENSOR_SCALE, WEIGHT

_STORED = "stored as another tool has them"
_ELSEWHERE = "the tools that it was written for load it"


@dataclass(frozen=True)
class Above:
    """How the tensor scale is stored.

    name: of its tensor. shape: of one that is one for all: () or (1,); one a row is (rows, 1). divides: whether what is
    stored is its reciprocal, which values are divided by. dtype: some tools narrow it.
    """

    name: str
    shape: tuple[int, ...] = (1,)
    divides: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Renamed(Encoding):
    """Codes and scales under other names, in other dtypes.

    codes: the name and the dtype of the codes. scale: the name and the dtype of the blocks' scales, if there are
    blocks. above: the tensor scale, if there is one. flips: the bits of each byte of codes that are inverted: two's
    complement and offset binary differ in the sign's bit alone. exact: of a tensor scale that is stored as a divisor,
    the scale and the divisor, where one is not the other's reciprocal as FP32 rounds it.
    """

    codes: tuple[str, torch.dtype]
    scale: tuple[str, torch.dtype] | None = None
    above: Above | None = None
    flips: int = 0
    exact: tuple[float, float] | None = None

    name = "renamed"
    stored = _STORED
    elsewhere = _ELSEWHERE

    def names(self, format: Format) -> tuple[str, ...]:
        """Return what the tensors of a matrix in ``format`` are called."""
        scale = () if self.scale is None else (self.scale[0],)
        return (self.codes[0], *scale) if self.above is None else (self.codes[0], *scale, self.above.name)

    def slots(self, format: Format, rows: int, columns: int) -> dict[str, Slot]:
        """Return the tensors of a matrix (rows, columns) in ``format``, by name."""
        packed = PACKED.slots(format, rows, columns)
        found = {self.codes[0]: _as(packed[WEIGHT], self.codes[1])}
        if self.scale is not None:
            found[self.scale[0]] = _as(packed[SCALE], self.scale[1])
        if self.above is not None:
            by_row = format.has_row_scales
            shape = (rows, 1) if by_row else self.above.shape
            found[self.above.name] = Slot(self.above.dtype, shape, 0 if by_row else None)
        return found

    def encode(self, weight: Quantized) -> dict[str, Tensor]:
        """Return the tensors of a quantized matrix, or of a slab of it."""
        data = weight.data ^ self.flips if self.flips else weight.data
        found = {self.codes[0]: data.view(self.codes[1])}
        if self.scale is not None and weight.scale is not None:
            found[self.scale[0]] = weight.scale.view(self.scale[1])
        if self.above is not None and weight.tensor_scale is not None:
            shape = (-1, 1) if weight.format.has_row_scales else self.above.shape
            found[self.above.name] = self._outwards(weight.tensor_scale).reshape(shape).to(self.above.dtype)
        return found

    def decode(self, stored: Mapping[str, Tensor], format: Format, columns: int, dtype: torch.dtype) -> Quantized:
        """Return the quantized matrix whose tensors are ``stored``. Raises: ShapeError if ``format`` has others."""
        data = stored[self.codes[0]].view(torch.uint8)
        found = {WEIGHT: data ^ self.flips if self.flips else data}
        if self.scale is not None:
            found[SCALE] = _bytes(stored[self.scale[0]])
        if self.above is not None:
            number = self._inwards(stored[self.above.name].to(torch.float32))
            found[TENSOR_SCALE] = _bytes(number.reshape(-1, 1))
        return PACKED.decode(found, format, columns, dtype)

    def beside(self, weight: Quantized, before: float | None = None) -> float | None:
        """Return the tensor scale, if it is one for all: engines want it to agree, and a divisor loses bits of it."""
        if self.above is None or weight.tensor_scale is None or weight.format.has_row_scales:
            return None
        return float(weight.tensor_scale)

    def _outwards(self, scale: Tensor) -> Tensor:
        if self.above is None or not self.above.divides:
            return scale
        if self.exact is not None and float(scale) == self.exact[0]:
            return torch.full_like(scale, self.exact[1])
        return scale.reciprocal()

    def _inwards(self, number: Tensor) -> Tensor:
        if self.above is None or not self.above.divides:
            return number
        if self.exact is not None and float(number) == self.exact[1]:
            return torch.full_like(number, self.exact[0])
        return number.reciprocal()


@dataclass(frozen=True)
class Values(Encoding):
    """The values of a quantized weight, in a dtype; ``transposed``: as (columns, rows).

    again: a format that the values will be rounded to; how many of them that changes is kept beside them.
    """

    dtype: torch.dtype
    transposed: bool = False
    again: Format | None = None

    name = "values"
    stored = "stored as their values"
    elsewhere = "any tool loads it"

    def slots(self, format: Format, rows: int, columns: int) -> dict[str, Slot]:
        """Return the one tensor of a matrix (rows, columns)."""
        shape = (columns, rows) if self.transposed else (rows, columns)
        return {WEIGHT: Slot(self.dtype, shape, 1 if self.transposed else 0)}

    def encode(self, weight: Quantized) -> dict[str, Tensor]:
        """Return the values of a quantized matrix, or of a slab of it, computed in float32."""
        values = _wide(weight).dequantize().to(self.dtype)
        return {WEIGHT: values.mT if self.transposed else values}

    def beside(self, weight: Quantized, before: float | None = None) -> float | None:
        """Return how many values another rounding changes, in all slabs so far."""
        if self.again is None:
            return None
        values = _wide(weight).dequantize()
        return (before or 0) + int((self.again.fake_quantize(values) != values).sum())

    def decode(self, stored: Mapping[str, Tensor], format: Format, columns: int, dtype: torch.dtype) -> Quantized:
        """Refuse: values have no codes until they are rounded. Raises: ShapeError."""
        raise ShapeError(f"the values of a weight have no codes of format '{format.name}'")


def reciprocal(number: float) -> float:
    """Return 1 / ``number`` as FP32 rounds it."""
    return float(torch.tensor(number, dtype=torch.float32).reciprocal())


def _wide(weight: Quantized) -> Quantized:
    return Quantized(
        weight.data, weight.scale, weight.tensor_scale, weight.format, torch.float32, weight.length, weight.dim
    )


def _as(slot: Slot, dtype: torch.dtype) -> Slot:
    """Return the slot of the same bytes in another dtype."""
    rows, columns = slot.shape
    if columns % dtype.itemsize:
        raise ShapeError(f"{columns} bytes a row are no whole numbers of {dtype}")
    return Slot(dtype, (rows, columns // dtype.itemsize), slot.rows)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
