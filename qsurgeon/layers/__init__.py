"""Modules that compute in a number format, and the gradient they pass on."""

from qsurgeon.layers.linear import AS_IT_IS, Quantization, QuantLinear, quant_linears
from qsurgeon.layers.straight_through import straight_through

__all__ = ["AS_IT_IS", "QuantLinear", "Quantization", "quant_linears", "straight_through"]
