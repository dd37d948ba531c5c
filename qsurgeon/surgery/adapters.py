"""Which adapters of peft compute past the layer they sit on: what is rounded there would have no effect.

peft has no way to ask, so that this is what was measured of peft 0.21; tests/test_peft.py measures it again.
"""

import sys

from torch import nn

from qsurgeon.layers import QuantLinear, quant_linears

_HELD = ".base_layer"
# Their forward reads the weight and multiplies with it itself, changed or not, and never calls the layer.
_READ_THE_WEIGHT = {"frod", "glora", "hra", "shira", "supertuning"}


def bypassed(model: nn.Module) -> dict[str, str]:
    """Return how adapters compute past the QuantLinears of ``model``, by the paths of those that they do that to."""
    found = {path: bypass(model, path) for path in quant_linears(model)}
    return {path: how for path, how in found.items() if how is not None}


def bypass(model: nn.Module, path: str) -> str | None:
    """Return how an adapter on the module at ``path`` computes past it; None if all of them call it."""
    while path.endswith(_HELD):
        path = path.removesuffix(_HELD)
        how = _past_what_it_holds(model.get_submodule(path))
        if how is not None:
            return how
    return None


def _past_what_it_holds(layer: nn.Module) -> str | None:
    tuners, variants = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.tuners.lora.variants")
    if tuners is None or not isinstance(layer, tuners.BaseTunerLayer):
        return None
    kind = type(layer).__name__
    modules = [one.__module__ for one in type(layer).__mro__]
    methods = {name.split(".")[2] for name in modules if name.startswith("peft.tuners.")}
    if methods & _READ_THE_WEIGHT:
        method = min(methods & _READ_THE_WEIGHT)
        return f"the adapter on it ({kind} of peft's {method}) multiplies with its weight itself and never calls it"
    if "miss" in methods and getattr(layer, "miss_fn", None) == "bat":
        return f"the adapter on it ({kind}, init_weights='bat') multiplies with its weight itself and never calls it"
    if "ln_tuning" in methods:
        copies: nn.ModuleDict = layer.ln_tuning_layers
        if not all(isinstance(one, QuantLinear) for one in copies.values()):
            return f"the adapter on it ({kind}) trains a copy of it in full precision, and calls that instead"
    if "lora" in methods and variants is not None:
        for adapter, variant in getattr(layer, "lora_variant", {}).items():
            dropout = layer.lora_dropout[adapter]
            if isinstance(variant, variants.DoraLinearVariant) and not isinstance(dropout, nn.Identity):
                return (
                    "the adapter on it (DoRA with lora_dropout) multiplies with its weight itself while it trains; "
                    "set lora_dropout=0"
                )
    return None
