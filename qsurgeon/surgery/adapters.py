"""Which peft adapters compute past their layer, and which use a packed weight's codes as values.

peft has no way to ask, so that this is what was measured of peft 0.20 and 0.21; tests/test_peft.py measures it again.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from qsurgeon.errors import SurgeryError
from qsurgeon.installed import is_before
from qsurgeon.layers import QuantLayer, packed_layers, quant_layers
from qsurgeon.layers.compiling import HELD

_HELD = ".base_layer"
# Their forward reads the weight and multiplies with it itself, changed or not, and never calls the layer.
_READ_THE_WEIGHT = {"frod", "glora", "hra", "shira", "supertuning", "trainable_tokens"}
# Until peft 0.21 OSF did so too, and AdaMSS was not seen to call its layer.
_UNTIL_0_21 = {"osf", "adamss"}
# So do these with ``init_weights='bat'``, which their layers keep under this name. Bone was in peft until 0.18.
_BAT = {"miss": "miss_fn", "bone": "bone_fn"}
# Those compute with the weight's values beside the layer that they call.
_COMPUTE_WITH_THE_WEIGHT = {"hira", "loha", "lokr", "peanut"}
# Fields of a LoraConfig that make LoRA do so.
_ON_VALUES = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "target_parameters": "LoRA with target_parameters",
}

# What variants of LoRA do to the weight. Older peft has no KaSA.
_VARIANTS = {
    "DoraLinearVariant": "DoRA) computes with its weight",
    "KasaLinearVariant": "KaSA) replaces its weight",
}


def bypassed(model: nn.Module) -> dict[str, str]:
    """Return how adapters compute past the wrapped layers of ``model``, by the paths of those that they do that to."""
    found = {path: bypass(model, path) for path in quant_layers(model)}
    return {path: how for path, how in found.items() if how is not None}


def bypass(model: nn.Module, path: str) -> str | None:
    """Return how an adapter on the module at ``path`` computes past it; None if all of them call it."""
    return _first(model, path, _past_what_it_holds)


def misread(model: nn.Module) -> dict[str, str]:
    """Return how adapters take the codes of packed weights for values, by the paths of those that they do that to."""
    found = {path: misreading(model, path) for path in packed_layers(model)}
    return {path: how for path, how in found.items() if how is not None}


def misreading(model: nn.Module, path: str) -> str | None:
    """Return how an adapter on the module at ``path`` would take codes for values; None if it leaves them alone."""
    return _first(model, path, _into_what_it_holds)


def unmerged(model: nn.Module) -> dict[str, str]:
    """Return how adapters stay apart from wrapped layers that are to merge them, by the paths of these layers."""
    merging = (path for path, layer in quant_layers(model).items() if merges(layer))
    found = {path: staying_apart(model, path) for path in merging}
    return {path: how for path, how in found.items() if how is not None}


def staying_apart(model: nn.Module, path: str) -> str | None:
    """Return why an adapter on the module at ``path`` cannot be added to its weight; None if all can."""
    return _first(model, path, _beside_what_it_holds)


def merges(layer: QuantLayer) -> bool:
    """Return whether a rule of ``layer`` says that adapters are added to its weight before it is rounded."""
    return any(how.behavior.adapters == "merged" for how in layer.quantizations.values())


def refuse_adapters(model: nn.Module) -> None:
    """Do nothing if all adapters call the wrapped layers they sit on, and merge where a rule says so.

    Raises: SurgeryError with the first others.
    """
    for found, what in (
        (bypassed(model), "would have no effect"),
        (misread(model), "have codes that would be misread"),
        (unmerged(model), "say adapters: merged, and have adapters that cannot be"),
    ):
        if found:
            name, how = next(iter(found.items()))
            raise SurgeryError(f"{len(found)} wrapped modules {what}, such as {name}: {how}")


def method_of(config: Any) -> str:
    """Return of which of peft's methods a config is."""
    return type(config).__module__.removeprefix("peft.tuners.").partition(".")[0]


def objection(config: Any, *, is_packed: bool) -> str | None:
    """Return why an adapter of peft with this config may not be put on a wrapped layer; None if it may.

    Also None for what a config does not tell. is_packed: the layer's weight is packed.
    """
    method = method_of(config)
    if method in _UNTIL_0_21 and is_before("peft", "0.21"):
        return f"{method} computes past it in peft before 0.21"
    past = "multiplies with its weight itself and never calls it"
    if method in _READ_THE_WEIGHT:
        return f"{method} {past}"
    if method in _BAT and config.init_weights == "bat":
        return f"{method} with init_weights='bat' {past}"
    is_dora = method == "lora" and config.use_dora
    if is_packed:
        found = [name for field, name in _ON_VALUES.items() if method == "lora" and getattr(config, field, None)]
        if found or method in _COMPUTE_WITH_THE_WEIGHT:
            return f"{found[0] if found else method} computes with the weight of what it sits on, which is packed"
    if is_dora and config.lora_dropout and not config.inference_mode:
        return f"DoRA with lora_dropout {past} while it trains; set lora_dropout=0"
    return None


def _first(model: nn.Module, path: str, ask: Callable[[nn.Module], str | None]) -> str | None:
    """Return the first answer of the adapters around the module at ``path``, from the inside out."""
    while (path := path.removesuffix(f".{HELD}")).endswith(_HELD):
        path = path.removesuffix(_HELD)
        how = ask(model.get_submodule(path))
        if how is not None:
            return how
    return None


def _methods(layer: Any) -> set[str]:
    """Return of which of peft's methods a layer is; none if it is not peft's."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not isinstance(layer, tuners.BaseTunerLayer):
        return set()
    modules = [one.__module__ for one in type(layer).__mro__]
    return {name.split(".")[2] for name in modules if name.startswith("peft.tuners.")}


def _beside_what_it_holds(layer: Any) -> str | None:
    methods, kind = _methods(layer), type(layer).__name__
    if not methods:
        return None
    lora = sys.modules.get("peft.tuners.lora")
    if lora is None or not isinstance(layer, lora.Linear) or _methods(layer.base_layer):
        return f"the adapter on it ({kind} of peft's {min(methods)}) is no plain LoRA of a Linear"
    for adapter in layer.lora_A:
        if adapter in layer.lora_variant:
            variant = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
            return f"the adapter on it ({variant}) is no plain LoRA"
        if not isinstance(layer.lora_dropout[adapter], nn.Identity):
            return "lora_dropout drops inputs of the adapter alone, and merged it has none; set lora_dropout=0"
        if layer.lora_bias[adapter]:
            return "lora_bias adds to the output, not to the weight; set lora_bias=False"
    return None


def _into_what_it_holds(layer: Any) -> str | None:
    methods, kind = _methods(layer), type(layer).__name__
    variants = sys.modules.get("peft.tuners.lora.variants")
    if methods & _COMPUTE_WITH_THE_WEIGHT:
        method = min(methods & _COMPUTE_WITH_THE_WEIGHT)
        return f"the adapter on it ({kind} of peft's {method}) computes with its weight, which is packed"
    if "lora" in methods and kind == "ParamWrapper":
        return "the adapter on it (LoRA's target_parameters) adds to its weight, which is packed"
    if "lora" in methods and variants is not None:
        for variant in getattr(layer, "lora_variant", {}).values():
            for name, how in _VARIANTS.items():
                if isinstance(variant, getattr(variants, name, ())):
                    return f"the adapter on it ({how}, which is packed"
    return None


def _past_what_it_holds(layer: Any) -> str | None:
    methods, kind = _methods(layer), type(layer).__name__
    variants = sys.modules.get("peft.tuners.lora.variants")
    if methods & _UNTIL_0_21 and is_before("peft", "0.21"):
        return f"the adapter on it ({kind}) computes past it in peft before 0.21"
    if methods & _READ_THE_WEIGHT:
        method = min(methods & _READ_THE_WEIGHT)
        return f"the adapter on it ({kind} of peft's {method}) multiplies with its weight itself and never calls it"
    if any(getattr(layer, _BAT[method], None) == "bat" for method in methods & _BAT.keys()):
        return f"the adapter on it ({kind}, init_weights='bat') multiplies with its weight itself and never calls it"
    if "ln_tuning" in methods:
        copies: nn.ModuleDict = layer.ln_tuning_layers
        if not all(isinstance(one, QuantLayer) for one in copies.values()):
            return f"the adapter on it ({kind}) trains a copy of it in full precision, and calls that instead"
    if "lora" in methods and variants is not None:
        for adapter, variant in getattr(layer, "lora_variant", {}).items():
            drops = not isinstance(layer.lora_dropout[adapter], nn.Identity)
            trains = layer.lora_A[adapter].weight.requires_grad
            if isinstance(variant, variants.DoraLinearVariant) and drops and trains:
                return (
                    "the adapter on it (DoRA with lora_dropout) multiplies with its weight itself while it trains; "
                    "set lora_dropout=0"
                )
    return None
