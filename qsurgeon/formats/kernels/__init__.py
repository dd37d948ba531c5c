"""A format's arithmetic: what it does to numbers (arithmetic.py), and the backends that compute it, to the same bit."""

from qsurgeon.formats.kernels.backend import Backend, Coded, Operation
from qsurgeon.formats.kernels.choosing import BACKENDS, KINDS, VARIABLE, backend_for, is_opaque, kind_for
from qsurgeon.formats.kernels.operations import dequantize, fake_quantize, product, quantize, saturates

__all__ = [
    "BACKENDS",
    "KINDS",
    "VARIABLE",
    "Backend",
    "Coded",
    "Operation",
    "backend_for",
    "dequantize",
    "fake_quantize",
    "is_opaque",
    "kind_for",
    "product",
    "quantize",
    "saturates",
]
