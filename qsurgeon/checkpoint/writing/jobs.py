"""From a plan and a checkpoint's headers to the files that will be written. No value is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsurgeon.checkpoint.kept import kept_names
from qsurgeon.checkpoint.reading.files import SINGLE
from qsurgeon.checkpoint.reading.headers import Tensor
from qsurgeon.checkpoint.reading.index import weight_files
from qsurgeon.checkpoint.reading.naming import Conversion, Names, rows_of
from qsurgeon.checkpoint.reading.quantized import refuse_quantized_weight
from qsurgeon.checkpoint.writing.layout import MAX_SHARD_SIZE, Job, Layout, Packing, copied, mirrored, packed, sharded
from qsurgeon.errors import CheckpointError
from qsurgeon.layers import Weight
from qsurgeon.layers.layer import ONE
from qsurgeon.surgery import Plan, Step

WAS_SINGLE = "model-tied.safetensors"
UNTIED = "model-untied"
_LIVE = "Load the model, apply the recipe to it, and save it"


@dataclass(frozen=True)
class _Source:
    """The checkpoint that weights are looked up in, and the model that it is of, on the meta device."""

    model: Any
    tensors: Mapping[str, Tensor]
    names: Names


@dataclass(frozen=True)
class _Written:
    """A wrapped weight to be written: the tensor that it is made of, the parts of that, and how it is packed.

    weight: what its kind says of it.
    """

    tensor: Tensor
    parts: tuple[Tensor, ...]
    packing: Packing | None
    weight: Weight = ONE


def layout_of(
    plan: Plan, model: Any, tensors: Mapping[str, Tensor], names: Names, source: Path, max_shard_size: int | str | None
) -> Layout:
    """Return what is written of the checkpoint in ``source``, which has ``tensors``, when ``plan`` is carried out.

    Files whose tensors all stay as they are stay as they are too, unless ``max_shard_size`` asks for others.
    ``model``: the one that the plan is of, on the meta device.

    Raises: CheckpointError for a wrapped weight that is missing, is not made of whole rows of stored ones, has another
    shape than the config says, or is no ordinary float.
    """
    here = _Source(model, tensors, names)
    kept = _kept(plan, model)
    weights, split = _wrapped_weights(plan, here, kept)
    untied = {name: one for name, one in weights.items() if name not in tensors and name not in kept}
    if max_shard_size is None and not any(one.packing for one in weights.values()):
        return _copied_files(source, untied)
    gone = {names.stored[name] for name in kept & weights.keys() if name in names.stored} | split
    own = [_job(weights.get(name, _Written(one, (), None)), name) for name, one in tensors.items() if name not in gone]
    own += [_job(one, name) for name, one in weights.items() if name in untied or name in kept]
    return Layout(sharded(own, MAX_SHARD_SIZE if max_shard_size is None else max_shard_size))


def _copied_files(source: Path, untied: Mapping[str, _Written]) -> Layout:
    files = weight_files(source)
    if not untied:
        return Layout(tuple(mirrored(file, file.name) for file in files))
    # A loader that finds the name of a single file looks no further.
    renamed = tuple(mirrored(file, WAS_SINGLE if file.name == SINGLE else file.name) for file in files)
    own = [copied(one.tensor, name) for name, one in untied.items()]
    return Layout((*renamed, *sharded(own, stem=UNTIED)))


def _job(weight: _Written, name: str) -> Job:
    tensor, packing = weight.tensor, weight.packing
    job = copied(tensor, name) if packing is None else packed(tensor, packing, name, weight.weight)
    return replace(job, parts=weight.parts)


def _packing(step: Step, plan: Plan) -> Packing | None:
    """Return how the module's weight is packed, if it is."""
    how, encoding = step.quantization, plan.recipe.encoding
    if encoding is None or how is None or how.weight is None:
        return None
    return Packing(how.weight.as_weight, encoding)


def _kept(plan: Plan, model: Any) -> frozenset[str]:
    """Return the names of the weights that are stored under the names of their modules, packed and beside packed."""
    packings = [(step.module, packing) for step in plan.wrapped if (packing := _packing(step, plan)) is not None]
    stored = {
        module.module: tuple(packing.encoding.slots(packing.format, *module.row_shape)) for module, packing in packings
    }
    kept = kept_names(model, stored) if stored else frozenset()
    return kept | {module.parameter for module, _ in packings if f"{module.module}.{stored[module.module][0]}" in kept}


def _wrapped_weights(plan: Plan, here: _Source, kept: frozenset[str]) -> tuple[dict[str, _Written], set[str]]:
    """Return what is written of each wrapped weight, and of what is split off with it, by the name that it gets.

    Also return the names of stored tensors that are written in parts, and no longer themselves.
    """
    weights: dict[str, _Written] = {}
    split: set[str] = set()
    for step in plan.wrapped:
        packing = _packing(step, plan)
        found = _weight(step, here, packs=packing is not None)
        if found is None:
            continue
        name, tensor, parts = found
        for part in parts or (tensor,):
            refuse_quantized_weight(part.name, here.tensors)
        if tensor.shape != step.module.shape:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json says {list(step.module.shape)}"
            )
        own = step.module.parameter
        weights[own if own in kept else name] = _Written(tensor, parts, packing, step.module.declared)
        split |= {part.name for part in parts}
    for name, conversion in here.names.converted.items():
        if name not in weights and not split.isdisjoint(conversion.tensors):
            weights[name] = _Written(*_converted(name, conversion, here), None)
    return weights, split


def _weight(step: Step, here: _Source, *, packs: bool) -> tuple[str, Tensor, tuple[Tensor, ...]] | None:
    """Return a module's weight, what it is called, and the parts that it is made of; None for one that stays."""
    name, names = step.module.parameter, here.names
    if name in names.stored:
        return names.stored[name], here.tensors[names.stored[name]], ()
    if name in names.converted:
        return (name, *_converted(name, names.converted[name], here)) if packs else None
    refuse_quantized_weight(name, here.tensors)
    owned = step.module.tied_weight
    if not owned:
        raise CheckpointError(f"no file has a tensor for {name}")
    if owned not in names.stored:
        raise CheckpointError(
            f"no file has a tensor {owned} to untie {name} from: its tensors go by other names than its modules. "
            f"{_LIVE}"
        )
    return name, here.tensors[names.stored[owned]], ()


def _converted(name: str, conversion: Conversion, here: _Source) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the parameter ``name``, which a conversion makes, as one tensor, and the parts that it is made of."""
    parts = rows_of(conversion, name, here.model, here.tensors)
    if not parts:
        stored = conversion.tensors
        raise CheckpointError(
            f"{name} is made of {stored[0]}{f' and {len(stored) - 1} more' if stored[1:] else ''} by more than taking "
            f"rows: it cannot be packed file by file. {_LIVE}"
        )
    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    return replace(parts[0], name=name, shape=shape, size=sum(part.size for part in parts)), parts
