"""Modules that compute in a number format, and the gradient they pass on."""

from qsurgeon.layers.layer import QuantLayer, QuantProduct, Weight, quant_layers
from qsurgeon.layers.linear import QuantLinear
from qsurgeon.layers.packed import PackedLayer, PackedLinear, disabled, pack, packed_layers, uncounted
from qsurgeon.layers.phases import current_phase, is_active, phase, rollout_unless_told
from qsurgeon.layers.phases.around import around
from qsurgeon.layers.product import packed_format
from qsurgeon.layers.quantization import AS_IT_IS, Quantization
from qsurgeon.layers.straight_through import straight_through

__all__ = [
    "AS_IT_IS",
    "PackedLayer",
    "PackedLinear",
    "QuantLayer",
    "QuantLinear",
    "QuantProduct",
    "Quantization",
    "Weight",
    "around",
    "current_phase",
    "disabled",
    "is_active",
    "pack",
    "packed_format",
    "packed_layers",
    "phase",
    "quant_layers",
    "rollout_unless_told",
    "straight_through",
    "uncounted",
]
