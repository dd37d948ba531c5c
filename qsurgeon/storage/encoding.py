"""How a quantized weight is stored: the names, dtypes and shapes of its tensors, and their bytes.

An encoding is one value. Its name is what ``storage:`` says in a recipe and in a checkpoint's record. Planning,
streaming, packed layers, loading and model cards ask the value, so that a new encoding is one file beside this one that
registers it, and its import in ``__init__``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from torch import Tensor

from qsurgeon.errors import FormatError
from qsurgeon.formats import Format, Quantized

MASTER = "master"  # weights stay in full precision, and no encoding stores them


@dataclass(frozen=True)
class Slot:
    """A tensor of an encoded matrix.

    rows: the dimension in which the matrix' rows follow each other, so that the tensors of slabs of whole rows, joined
    there, are the tensor of the whole; None where all slabs have the same.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int | None = 0

    @property
    def bytes(self) -> int:
        """How many bytes it has."""
        return prod(self.shape) * self.dtype.itemsize


class Encoding(ABC):
    """A way to store quantized matrices (rows, columns), whose blocks run along the columns.

    Tensors go by the names that they have in the module whose weight they are, such as ``weight_scale``.
    """

    name: ClassVar[str]
    stored: ClassVar[str]  # what model cards say of weights: "stored as …"
    elsewhere: ClassVar[str]  # what they say of loading without qsurgeon: "transformers …"

    @abstractmethod
    def slots(self, format: Format, rows: int, columns: int) -> dict[str, Slot]:
        """Return the tensors of a matrix (rows, columns) in ``format``, by name.

        Which names there are depends on the format alone. Raises: FormatError for a format that it cannot store.
        """

    def names(self, format: Format) -> tuple[str, ...]:
        """Return what the tensors of a matrix in ``format`` are called."""
        return tuple(self.slots(format, 1, 1))

    @abstractmethod
    def encode(self, weight: Quantized) -> dict[str, Tensor]:
        """Return the tensors of a quantized matrix, or of a slab of whole rows and blocks of it, by name."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], format: Format, columns: int, dtype: torch.dtype) -> Quantized:
        """Return the quantized matrix whose tensors are ``stored``, which dequantizes as ``dtype``.

        Raises: ShapeError if they are not those of ``format`` with ``columns`` columns.
        """

    def beside(self, weight: Quantized, before: float | None = None) -> float | None:
        """Return a number that is known of a matrix once it, or a slab of it, is quantized, and that its writer keeps.

        before: what was returned for the slabs before. None where there is nothing that the tensors do not say.
        """
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Be the same object when a layer is copied or pickled."""
        return encoding_of, (self.name,)

    def section(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the ``quantization_config`` of a checkpoint that has ``record``, which qsurgeon itself reads."""
        return record

    def bytes(self, format: Format, rows: int, columns: int) -> int:
        """Return how many bytes a matrix (rows, columns) takes in ``format``."""
        return sum(slot.bytes for slot in self.slots(format, rows, columns).values())


ENCODINGS: dict[str, Encoding] = {}


def register(encoding: Encoding) -> Encoding:
    """Make an encoding known by its name, and return it. Raises: FormatError for a name that is taken."""
    if encoding.name in storages():
        raise FormatError(f"'{encoding.name}' is a storage already; name yours otherwise")
    ENCODINGS[encoding.name] = encoding
    return encoding


def storages() -> tuple[str, ...]:
    """Return all that ``storage:`` may say."""
    return (MASTER, *ENCODINGS)


def encoding_of(storage: str) -> Encoding | None:
    """Return how weights are stored under ``storage``; None where they stay in full precision."""
    return None if storage == MASTER else ENCODINGS[storage]


def _check(value: Any) -> Any:
    if not isinstance(value, str) or value not in storages():
        *most, last = map(repr, storages())
        expected = f"{', '.join(most)} or {last}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
    return value


class _Known:
    """The JSON schema of a storage: the names that are registered when it is asked for."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        found: dict[str, Any] = handler(schema)
        return {**found, "enum": list(storages())}


StorageName = Annotated[str, BeforeValidator(_check), _Known]
