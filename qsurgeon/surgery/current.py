"""What a live model computes with at this moment, as a record.

A config object can be shared by several models, and modules come and go after a recipe was applied: heads are resized,
layers dropped, parts saved alone. So each module carries what was decided about it, and the record of a model is made
from its modules whenever one is needed, with names that are relative to that model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers import PackedLayer, quant_layers
from qsurgeon.storage import MASTER
from qsurgeon.surgery.inventory import inventory, plain_model, quantizations
from qsurgeon.surgery.noisy import noise_in
from qsurgeon.surgery.plan import Excluded
from qsurgeon.surgery.record import Header, Record, make_record
from qsurgeon.version import __version__
from qsurgeon.words import Storage

_ORIGIN, _EXCLUDED = "_qsurgeon_origin", "_qsurgeon_excluded"


@dataclass(frozen=True)
class Origin:
    """Where the wrapping of a module came from: the model that the recipe was applied to, and the recipe's text."""

    source: str = ""
    recipe: str = ""


def mark(model: nn.Module, origin: Origin, excluded: Mapping[str, Excluded]) -> None:
    """Let the modules of ``model`` carry where their wrapping came from, and what ``excluded`` weights, by name."""
    for layer in quant_layers(model).values():
        vars(layer)[_ORIGIN] = origin
    for module in inventory(model):
        if module.name in excluded:
            own = vars(model.get_submodule(module.path))
            own[_EXCLUDED] = {**own.get(_EXCLUDED, {}), module.weight: excluded[module.name]}


def inherit(module: nn.Module, before: nn.Module) -> None:
    """Let ``module`` carry what ``before``, whose place it takes, carries."""
    vars(module).update({key: value for key, value in vars(before).items() if key in (_ORIGIN, _EXCLUDED)})


def exclusions(model: nn.Module) -> dict[str, Excluded]:
    """Return what excluded each weight that a rule named and did not take, by its name in the inventory."""
    found = ((module, vars(model.get_submodule(module.path)).get(_EXCLUDED, {})) for module in inventory(model))
    return {module.name: fates[module.weight] for module, fates in found if module.weight in fates}


def current_record(model: nn.Module) -> Record | None:
    """Return the record of what is wrapped in ``model`` now, under names relative to it; None if nothing is.

    Raises: SurgeryError if some weights are packed and others, which have a format too, are not, or if norms have noise
    of several recipes.
    """
    _, root = plain_model(model)
    layers = quant_layers(root).values()
    if not layers:
        return None
    origins = list(dict.fromkeys(vars(layer).get(_ORIGIN, Origin()) for layer in layers))
    return make_record(
        Header(
            __version__,
            _storage(root),
            "" if len({one.source for one in origins}) > 1 else origins[0].source,
            "\n---\n".join(dict.fromkeys(one.recipe for one in origins if one.recipe)),
        ),
        quantizations(root),
        exclusions(root),
        noise_in(root),
    )


def _storage(root: nn.Module) -> Storage:
    layers = quant_layers(root)
    packed = {path: layer for path, layer in layers.items() if isinstance(layer, PackedLayer)}
    if not packed:
        return MASTER
    master = [
        path
        for path, layer in layers.items()
        if path not in packed and any(how.weight is not None for how in layer.quantizations.values())
    ]
    if master:
        named = {module.path: module.module for module in inventory(root)}
        raise SurgeryError(
            f"the weight of {named[next(iter(packed))]} is packed and that of {named[master[0]]} is not; a checkpoint "
            "has one storage: apply recipes with the same storage to both"
        )
    names = list(dict.fromkeys(layer.encoding.name for layer in packed.values()))
    if names[1:]:
        raise SurgeryError(
            f"some weights are stored as {names[0]} and some as {names[1]}; a checkpoint has one storage: apply "
            "recipes with the same storage"
        )
    return names[0]
