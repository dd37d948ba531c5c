"""From a plan and a checkpoint's headers to the files that will be written. No value is read."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qsurgeon.checkpoint.files import SINGLE
from qsurgeon.checkpoint.headers import Tensor
from qsurgeon.checkpoint.index import weight_files
from qsurgeon.checkpoint.layout import MAX_SHARD_SIZE, Job, Layout, copied, mirrored, packed, sharded
from qsurgeon.checkpoint.naming import Names
from qsurgeon.checkpoint.quantized import refuse_quantized_weight
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import Format
from qsurgeon.surgery import Plan, Step

WAS_SINGLE = "model-tied.safetensors"
UNTIED = "model-untied"


def layout_of(
    plan: Plan, tensors: Mapping[str, Tensor], names: Names, source: Path, max_shard_size: int | str | None
) -> Layout:
    """Return what is written of the checkpoint in ``source``, which has ``tensors``, when ``plan`` is carried out.

    Files whose tensors all stay as they are stay as they are too, unless ``max_shard_size`` asks for others.

    Raises: CheckpointError for a wrapped weight that is missing, is stored in parts, has another shape than the
    config says, or is no ordinary float.
    """
    weights = dict(_wrapped_weights(plan, tensors, names))
    untied = {name: tensor for name, (tensor, _) in weights.items() if name not in tensors}
    formats = {name: format for name, (_, format) in weights.items()}
    own = [_job(tensor, name, formats.get(name)) for name, tensor in tensors.items()]
    own += [_job(tensor, name, formats[name]) for name, tensor in untied.items()]
    if max_shard_size is not None or any(formats.values()):
        return Layout(sharded(own, MAX_SHARD_SIZE if max_shard_size is None else max_shard_size))
    files = weight_files(source)
    if not untied:
        return Layout(tuple(mirrored(file, file.name) for file in files))
    # A loader that finds the name of a single file looks no further.
    renamed = tuple(mirrored(file, WAS_SINGLE if file.name == SINGLE else file.name) for file in files)
    return Layout((*renamed, *sharded([copied(tensor, name) for name, tensor in untied.items()], stem=UNTIED)))


def _job(tensor: Tensor, name: str, format: Format | None) -> Job:
    return copied(tensor, name) if format is None else packed(tensor, format, name)


def _wrapped_weights(
    plan: Plan, tensors: Mapping[str, Tensor], names: Names
) -> Iterator[tuple[str, tuple[Tensor, Format | None]]]:
    """Yield what each wrapped module's weight is called, the stored tensor that it is made of, and how it is packed."""
    packs = plan.recipe.storage == "packed"
    for step in plan.wrapped:
        how = step.quantization
        format = how.weight.as_weight if packs and how is not None and how.weight is not None else None
        name, tensor = _weight(step, tensors, names, packs=format is not None)
        if tensor is None:
            continue
        refuse_quantized_weight(tensor.name, tensors)
        if tensor.shape != step.module.shape:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json says {list(step.module.shape)}"
            )
        yield name, (tensor, format)


def _weight(step: Step, tensors: Mapping[str, Tensor], names: Names, *, packs: bool) -> tuple[str, Tensor | None]:
    """Return a module's weight and what it is called; None for one that stays in the parts it is stored in."""
    name = f"{step.module.name}.weight"
    if name in names.stored:
        return names.stored[name], tensors[names.stored[name]]
    if name in names.joined:
        if not packs:
            return name, None
        parts = names.joined[name]
        raise CheckpointError(
            f"{name} is stored as {len(parts)} tensors that transformers joins, such as {parts[0]}: it cannot be "
            "packed file by file. Load the model, apply the recipe to it, and save it"
        )
    refuse_quantized_weight(name, tensors)
    owner = step.module.tied_to
    if owner is None:
        raise CheckpointError(f"no file has a tensor for {name}")
    if f"{owner}.weight" not in names.stored:
        raise CheckpointError(
            f"no file has a tensor {owner}.weight to untie {name} from: its tensors go by other names than its "
            "modules. Load the model, apply the recipe to it, and save it"
        )
    return name, tensors[names.stored[f"{owner}.weight"]]
