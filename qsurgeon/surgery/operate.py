"""The only place that replaces modules of a live model."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from qsurgeon.errors import FormatError, SurgeryError
from qsurgeon.formats import Storage
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, quant_linears
from qsurgeon.surgery.adapters import bypass, misreading
from qsurgeon.surgery.inventory import inventory, plain_model


def operate(
    model: nn.Module,
    quantizations: Mapping[str, Quantization],
    *,
    untie: bool = False,
    storage: Storage = "master",
) -> int:
    """Wrap the modules that ``quantizations`` names (in the plain model), in place; return how many.

    Nothing is changed unless all of them can be. ``untie`` gives a wrapped module whose weight is tied to another's
    a copy of its own. ``storage: packed`` packs each weight that has a format, one after the other.

    Raises: SurgeryError if the model is wrapped already, or a module is missing or cannot be wrapped, or has an adapter
    that would compute past it, or take its codes for values.
    """
    wrapped = quant_linears(model)
    if wrapped:
        raise SurgeryError(
            f"the model is wrapped already: {len(wrapped)} QuantLinear modules, the first is {next(iter(wrapped))}; "
            "apply a recipe to a model as it was loaded from a plain checkpoint"
        )
    modules = {module.name: module for module in inventory(model)}
    missing = [name for name in quantizations if name not in modules]
    if missing:
        raise SurgeryError(f"the model has no module {missing[0]} ({len(missing)} of {len(quantizations)} are missing)")
    linears = {name: model.get_submodule(modules[name].path) for name in quantizations}
    for name, linear in linears.items():
        try:
            if _is_packed(quantizations[name], storage):
                PackedLinear.check_packing(linear, quantizations[name])
            else:
                QuantLinear.check(linear)
        except (FormatError, SurgeryError) as error:
            raise SurgeryError(f"{name} cannot be wrapped: {error}") from error
        path = modules[name].path
        wrong = bypass(model, path)
        if wrong is None and _is_packed(quantizations[name], storage):
            wrong = misreading(model, path)
        if wrong is not None:
            raise SurgeryError(f"{name} cannot be wrapped: {wrong}")
    times = Counter(map(id, linears.values()))
    twice = [name for name, linear in linears.items() if times[id(linear)] > 1]
    if twice:
        raise SurgeryError(f"{twice[0]} and {twice[1]} are one and the same module; exclude one of them")
    root = plain_model(model)[1]
    owners = {module.tied_to for module in modules.values()}
    for name, linear in linears.items():
        kind = PackedLinear if _is_packed(quantizations[name], storage) else QuantLinear
        kind.wrap(linear, quantizations[name], name)
        if untie and (modules[name].tied_to or name in owners):
            _untie(linear, name, root)
    return len(linears)


def _is_packed(how: Quantization, storage: Storage) -> bool:
    return storage == "packed" and how.weight is not None


def _untie(linear: nn.Module, name: str, root: Any) -> None:
    """Give ``linear`` a weight of its own, and the model no reason to tie it again when it is saved or loaded."""
    if not isinstance(linear, PackedLinear):  # whose codes are its own
        weight = linear.get_parameter("weight")
        linear.register_parameter("weight", nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    if hasattr(root, "config"):
        root.config.tie_word_embeddings = False
        root.config.get_text_config().tie_word_embeddings = False
    ties = getattr(root, "all_tied_weights_keys", {})
    for key in [key for key, value in ties.items() if f"{name}.weight" in (key, value)]:
        del ties[key]
