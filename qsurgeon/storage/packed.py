"""A packed weight as tensors with names: bytes all of them, so that nothing that casts a model can change a value.

``weight``: the codes, see ``packing``. ``weight_scale``: the blocks' scales. ``weight_tensor_scale``: FP32, one or one
a row, as its four bytes. A model's ``.to(dtype)``, FSDP's mixed precision and autocast leave bytes alone, and would
round an FP32 scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError
from qsurgeon.formats.block import Format, Quantized
from qsurgeon.formats.packing import packed_length
from qsurgeon.formats.tensor_scale import bytes_of, bytes_shape, of_bytes
from qsurgeon.storage.encoding import Encoding, Slot, register

WEIGHT, SCALE, TENSOR_SCALE = "weight", "weight_scale", "weight_tensor_scale"

Shapes = dict[str, tuple[int, int]]


def stored_shapes(format: Format, rows: int, columns: int) -> Shapes:
    """Return the shapes, all of uint8, that a weight (rows, columns) takes in ``format``, by name."""
    shapes: Shapes = {WEIGHT: (rows, packed_length(columns, format.element.bits))}
    if format.scale is not None:
        height, width = format.block_shape
        shapes[SCALE] = (-(-rows // height), -(-columns // width) * format.scale.dtype.itemsize)
    if format.tensor_scale != "none":
        shapes[TENSOR_SCALE] = bytes_shape(rows, format)
    return shapes


def stored_bytes(format: Format, rows: int, columns: int) -> int:
    """Return how many bytes a weight (rows, columns) takes in ``format``."""
    return sum(height * width for height, width in stored_shapes(format, rows, columns).values())


def to_stored(weight: Quantized) -> dict[str, Tensor]:
    """Return the tensors of a quantized matrix, by name; they share its memory."""
    stored = {WEIGHT: weight.data}
    if weight.scale is not None:
        stored[SCALE] = weight.scale.view(torch.uint8)
    if weight.tensor_scale is not None:
        stored[TENSOR_SCALE] = bytes_of(weight.tensor_scale)
    return stored


def from_stored(stored: Mapping[str, Tensor], format: Format, columns: int, dtype: torch.dtype) -> Quantized:
    """Return the quantized matrix whose tensors are ``stored``; it shares their memory, and opens as ``dtype``.

    Raises: ShapeError if they are not those of ``format`` with ``columns`` columns.
    """
    data = stored[WEIGHT]
    expected = stored_shapes(format, data.shape[0], columns)
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if found != expected:
        raise ShapeError(f"a weight in format '{format.name}' is {expected}, got {found}")
    scale = None if format.scale is None else _as(stored[SCALE], format.scale.dtype)
    above = None
    if format.tensor_scale != "none":
        above = of_bytes(_as(stored[TENSOR_SCALE], torch.float32), format)
    return Quantized(data, scale, above, format, dtype, columns)


def _as(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values whose bytes are ``data``, which may lie anywhere in a file that was mapped into memory."""
    if dtype.itemsize > 1 and data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


class Packed(Encoding):
    """The encoding of this module."""

    name = "packed"
    stored = "stored as the codes and scales of their formats"
    elsewhere = "transformers cannot load it"

    def slots(self, format: Format, rows: int, columns: int) -> dict[str, Slot]:
        """Return the tensors of a matrix, see ``stored_shapes``; a tensor scale that is one for all has one row."""
        shapes = stored_shapes(format, rows, columns)
        shared = not format.has_row_scales
        return {
            name: Slot(torch.uint8, shape, None if name == TENSOR_SCALE and shared else 0)
            for name, shape in shapes.items()
        }

    def names(self, format: Format) -> tuple[str, ...]:
        """Return what the tensors of a matrix in ``format`` are called; a layer asks in each call."""
        scale = (SCALE,) if format.scale is not None else ()
        return (WEIGHT, *scale, TENSOR_SCALE) if format.tensor_scale != "none" else (WEIGHT, *scale)

    def encode(self, weight: Quantized) -> dict[str, Tensor]:
        """Return the tensors of a quantized matrix; they share its memory."""
        return to_stored(weight)

    def decode(self, stored: Mapping[str, Tensor], format: Format, columns: int, dtype: torch.dtype) -> Quantized:
        """Return the quantized matrix whose tensors are ``stored``. Raises: as ``from_stored``."""
        return from_stored(stored, format, columns, dtype)


PACKED = register(Packed())
