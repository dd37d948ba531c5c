"""What computes a format's operations: a backend says what it supports, and computes that to the bit as arithmetic.py.

Backends are entered in ``choosing.BACKENDS``. What one does not support runs by another.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qsurgeon.formats.fields import Fields

# A tensor scale above the blocks: None, or float32 (…, rows, 1) or (1, …, 1); see arithmetic.tensor_scale.
Above = Tensor | None
Operation = Literal["fake_quantize", "quantize", "dequantize", "saturates"]


@dataclass(frozen=True)
class Coded:
    """An operand of a product as codes.

    data: packed, (rows, bytes). scale: of the blocks, (rows of blocks, blocks), None without. above: the tensor scale.
    length: values in a row.
    """

    data: Tensor
    scale: Tensor | None
    above: Above
    fields: Fields
    length: int


class Backend(ABC):
    """Computes operations on tensors (…, rows, columns), the contraction dimension last, all of them with values.

    ``above`` is a tensor scale that was found before. Results are contiguous.
    """

    name: str  # what QSURGEON_KERNELS calls it
    preferred_on: frozenset[str] | None = None  # the types of device where it runs unasked; None: all
    reads_memory: bool = False  # takes only tensors whose own memory holds their values: strided, and under no tracer

    @abstractmethod
    def supports(self, fields: Fields, dtype: torch.dtype, device: str, operation: Operation) -> bool:
        """Return whether it computes ``operation`` of a format.

        Of values in ``dtype`` on a type of device, to the bit as arithmetic.py. The answer is kept.
        """

    def is_ready(self, fields: Fields, dtype: torch.dtype) -> bool:
        """Return whether what it supports can run here, making it ready if it never was."""
        return True

    @abstractmethod
    def fake_quantize(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """Return ``rows`` rounded, in their own dtype."""

    @abstractmethod
    def quantize(self, rows: Tensor, above: Above, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Return the packed codes (…, rows, bytes) of ``rows``, and their block scales' (…, rows, blocks)."""

    @abstractmethod
    def dequantize(
        self, data: Tensor, scale: Tensor | None, above: Above, fields: Fields, length: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the values (…, rows, length) of what ``quantize`` returned, in ``dtype``."""

    @abstractmethod
    def saturates(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        """Return where (bool) a value of ``rows`` exceeds the largest that its block can hold."""

    # ---- what few backends do

    def supports_product(self, input: Fields | None, weight: Fields, dtype: torch.dtype, device: str) -> bool:
        """Return whether it multiplies codes: a weight's with an input's, or with values in ``dtype`` for None."""
        return False

    def product(self, input: Tensor | Coded, weight: Coded, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return input · weightᵀ + bias, (rows, rows of the weight), in ``dtype``; codes stay codes in memory.

        None for sizes that are multiplied faster once they are dequantized. Sums may be in another order than torch's;
        each factor is what ``dequantize`` returns.
        """
        raise NotImplementedError(f"backend {self.name} multiplies no codes")
