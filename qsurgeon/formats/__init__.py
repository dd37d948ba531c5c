"""Number formats: what values a tensor may take, and how to round to them. Knows tensors, nothing of models."""

from qsurgeon.formats.block import Format, Quantized
from qsurgeon.formats.catalog import CATALOG, get_format
from qsurgeon.formats.fields import check_operands
from qsurgeon.formats.given import Scales

__all__ = [
    "CATALOG",
    "Format",
    "Quantized",
    "Scales",
    "check_operands",
    "get_format",
]
