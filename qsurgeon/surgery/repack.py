"""Convert a model with master weights to packed weights without changing what it computes.

Master weights may have been trained since they were wrapped, so that the model that they came from is not the model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from qsurgeon.errors import CheckpointError, SurgeryError
from qsurgeon.formats import Format
from qsurgeon.layers import Quantization, QuantLayer, packed_layers, quant_layers
from qsurgeon.surgery.plan import Plan, Step
from qsurgeon.surgery.record import Record
from qsurgeon.words import FIELDS

_SHOWN = 3


def repacked(plan: Plan, record: Record, name: str) -> Plan:
    """Return ``plan`` for a model that has ``record``: the same, with the static scales that were found for it.

    Raises: CheckpointError, calling the model ``name``, if its weights are packed already, or if the plan would change
    anything but the storage.
    """
    if record.encoding is not None:
        raise CheckpointError(f"{name} was rewritten by qsurgeon already; apply the recipe to the model it came from")
    if plan.recipe.encoding is None:
        raise CheckpointError(
            f"{name} was rewritten by qsurgeon already; apply the recipe to the model it came from. If it was trained "
            "since: a recipe that says the same and 'storage: packed' packs its weights as they are now, and without "
            "the quantization_config in its config.json they are an ordinary model's, in full precision"
        )
    differences = list(_differences(plan, record))
    if differences:
        more = f" (and {len(differences) - _SHOWN} more)" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"{name} was rewritten by qsurgeon already, and the recipe is not the one that its weights are rounded by: "
            f"{'; '.join(differences[:_SHOWN])}{more}. To pack them, take the recipe in its config.json and change "
            "nothing but the storage. To round them otherwise, which is another model than was trained, remove "
            "quantization_config from the config.json of a copy: they are in full precision"
        )
    before = record.quantizations()
    return replace(plan, steps=tuple(_as_recorded(step, before) for step in plan.steps))


def _as_recorded(step: Step, before: Mapping[str, Quantization]) -> Step:
    """Return ``step`` with the formats that its module has, with their numbers."""
    how = step.quantization
    if how is None:
        return step
    was = before[step.module.name]
    return replace(step, fate=replace(how, weight=was.weight, input=was.input))


def _differences(plan: Plan, record: Record) -> Iterator[str]:
    """Yield what ``plan`` would have modules compute with that they do not compute with now, in words."""
    before = record.quantizations()
    after = {step.module.name: step.quantization for step in plan.wrapped if step.quantization is not None}
    for name in after:
        if name not in before:
            yield f"{name} is not wrapped, and would be"
    for name, was in before.items():
        new = after.get(name)
        if new is None:
            yield f"{name} is wrapped, and would not be"
            continue
        for role, one, other in (("weight", was.weight, new.weight), ("input", was.input, new.input)):
            if not _same(one, other):
                yield f"the {role} of {name} is rounded to {_named(one)}, and would be to {_named(other)}"
        told, asked = was.behavior.fields, new.behavior.fields
        for field in (one.name for one in FIELDS if one.shown.forward):
            if told[field] != asked[field]:
                yield f"{field} of {name} is {told[field]}, and would be {asked[field]}"
    if plan.noise != record.noise:
        old, now = (
            "none" if one is None else f"{one} on {len(one.modules)} norms" for one in (record.noise, plan.noise)
        )
        yield f"the noise is {old}, and would be {now}"


def _same(was: Format | None, new: Format | None) -> bool:
    """Return whether two formats round alike, whatever they are called; a number that is not said is taken over."""
    if was is None or new is None:
        return was is new
    old, fields = was.to_dict(), new.to_dict()
    if new.static_scale is None:
        fields["static_scale"] = old["static_scale"]
    return bool(old == fields)


def _named(format: Format | None) -> str:
    return "nothing" if format is None else f"{format.name} ({_fields(format)})"


def _fields(format: Format) -> str:
    return ", ".join(
        f"{key} {value}" for key, value in format.to_dict().items() if key in ("element", "block", "scale")
    )


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Let the wrapped layers of ``model`` be plain again inside the block, so that they can be wrapped once more.

    What is not wrapped at the end of the block, or all if it fails, is a wrapped layer as it was.

    Raises: SurgeryError for packed weights.
    """
    if packed := packed_layers(model):
        raise SurgeryError(f"the weight of {next(iter(packed))} is packed: it cannot become a plain layer's again")
    layers = list(quant_layers(model).values())
    before: list[tuple[nn.Module, type[QuantLayer], Mapping[str, Quantization], str]] = []
    try:
        for layer in layers:
            before.append((layer, type(layer), layer.quantizations, layer.name))
            layer.unwrap()
        yield
    finally:
        for module, layer_class, hows, name in before:
            if type(module) is layer_class.source:
                layer_class.take(module, hows, name)
