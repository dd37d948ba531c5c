"""Modules that compute in a number format, and the gradient they pass on."""

import warnings
from typing import Any

from qsurgeon.layers.dequantized import packed_format
from qsurgeon.layers.layer import QuantLayer, QuantProduct, Weight, quant_layers
from qsurgeon.layers.linear import QuantLinear
from qsurgeon.layers.packed import PackedLayer, PackedLinear, disabled, kept_bytes, pack, packed_layers, uncounted
from qsurgeon.layers.phases import current_phase, generation, is_active, phase, rollout_unless_told, rounded_once
from qsurgeon.layers.phases.around import around
from qsurgeon.layers.phases.keeping import keep_at_most
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
    "generation",
    "is_active",
    "keep_at_most",
    "kept_bytes",
    "pack",
    "packed_format",
    "packed_layers",
    "phase",
    "quant_layers",
    "rollout_unless_told",
    "rounded_once",
    "straight_through",
    "uncounted",
]

_NAMES_OF_0_1 = {"quant_linears": "quant_layers", "packed_linears": "packed_layers"}


def __getattr__(name: str) -> Any:
    """Return what a program written for 0.1 asks for by its name of then, and say its name of now."""
    if name not in _NAMES_OF_0_1:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    now = _NAMES_OF_0_1[name]
    warnings.warn(f"qsurgeon.layers.{name} is called {now} since 0.2", DeprecationWarning, stacklevel=2)
    return globals()[now]
