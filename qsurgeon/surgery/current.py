"""What a live model computes with at this moment, as a record.

A config object can be shared by several models, and modules come and go after a recipe was applied: heads are resized,
layers dropped, parts saved alone. So each module carries what was decided about it, and the record of a model is made
from its modules whenever one is needed, with names that are relative to that model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers import PackedLinear, QuantLinear, quant_linears
from qsurgeon.storage import MASTER
from qsurgeon.surgery.inventory import inventory, plain_model
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
    """Let the modules of ``model`` carry where their wrapping came from, and what ``excluded`` them, by plain name."""
    for layer in quant_linears(model).values():
        vars(layer)[_ORIGIN] = origin
    for module in inventory(model):
        if module.name in excluded:
            vars(model.get_submodule(module.path))[_EXCLUDED] = excluded[module.name]


def inherit(module: nn.Module, before: nn.Module) -> None:
    """Let ``module`` carry what ``before``, whose place it takes, carries."""
    vars(module).update({key: value for key, value in vars(before).items() if key in (_ORIGIN, _EXCLUDED)})


def exclusions(model: nn.Module) -> dict[str, Excluded]:
    """Return what excluded each module that a rule named and did not take, by its name in the plain model."""
    found = ((module.name, vars(model.get_submodule(module.path)).get(_EXCLUDED)) for module in inventory(model))
    return {name: fate for name, fate in found if fate is not None}


def current_record(model: nn.Module) -> Record | None:
    """Return the record of what is wrapped in ``model`` now, under names relative to it; None if nothing is.

    Raises: SurgeryError if some weights are packed and others, which have a format too, are not.
    """
    _, root = plain_model(model)
    paths = {module.path: module.name for module in inventory(root)}
    layers = {paths[path]: layer for path, layer in quant_linears(root).items()}
    if not layers:
        return None
    origins = list(dict.fromkeys(vars(layer).get(_ORIGIN, Origin()) for layer in layers.values()))
    return make_record(
        Header(
            __version__,
            _storage(layers),
            "" if len({one.source for one in origins}) > 1 else origins[0].source,
            "\n---\n".join(dict.fromkeys(one.recipe for one in origins if one.recipe)),
        ),
        {name: layer.quantization for name, layer in layers.items()},
        exclusions(root),
    )


def _storage(layers: Mapping[str, QuantLinear]) -> Storage:
    packed = {name: layer for name, layer in layers.items() if isinstance(layer, PackedLinear)}
    if not packed:
        return MASTER
    master = [name for name, layer in layers.items() if name not in packed and layer.quantization.weight is not None]
    if master:
        raise SurgeryError(
            f"the weight of {next(iter(packed))} is packed and that of {master[0]} is not; a checkpoint has one "
            "storage: apply recipes with the same storage to both"
        )
    names = list(dict.fromkeys(layer.encoding.name for layer in packed.values()))
    if names[1:]:
        raise SurgeryError(
            f"some weights are stored as {names[0]} and some as {names[1]}; a checkpoint has one storage: apply "
            "recipes with the same storage"
        )
    return names[0]
