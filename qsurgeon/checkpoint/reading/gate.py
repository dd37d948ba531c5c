"""The checks of a checkpoint folder before any library opens it, the same for rewriting and loading.

Whoever loads a folder runs parsers that trust it: a pipe makes them wait, a broken file raises what it happens to
raise, and a tensor of another name leaves a parameter random. Everything here is read from headers and config.json.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor as Values

from qsurgeon.checkpoint.reading.files import INDEX, refuse_irregular
from qsurgeon.checkpoint.reading.headers import DTYPES, Tensor, read_header
from qsurgeon.checkpoint.reading.index import read_headers
from qsurgeon.checkpoint.reading.naming import Names, names_in
from qsurgeon.errors import CheckpointError, SurgeryError
from qsurgeon.layers import packed_layers
from qsurgeon.reading import read_json
from qsurgeon.surgery import operate, read_config, record_in, skeleton
from qsurgeon.transformers_private.loading import ignored_if_missing

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What peft and transformers raise, in their own words or Python's, for an adapter_config.json or a
# generation_config.json with values that none has.
BAD_ADAPTER = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, ImportError,
    re.error,
)  # fmt: skip


def check_checkpoint(folder: Path, *, trust_remote_code: bool = False, whole: bool = True) -> None:
    """Do nothing for a folder that qsurgeon wrote and that can be loaded, as far as its headers and config.json tell.

    Of an adapter, its own files are looked at, and its base, where that is a folder here. What has no record of ours
    is left to whoever asked. ``trust_remote_code``: run the code that the model brings with it. ``whole``: the model
    is built as its config says, so that a tensor of it that is missing is a mistake.

    Raises: CheckpointError, naming the file and the tensor, for a pipe in place of a file, for what is no JSON or no
    safetensors, for a config or a record of no model, and for a tensor that is missing, or of another shape or kind
    than the model has.
    """
    refuse_irregular(folder)
    if not (folder / CONFIG).is_file() and (folder / ADAPTER).is_file():
        base = check_adapter(folder).get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).is_dir() and (Path(base) / CONFIG).is_file():
            check_checkpoint(Path(base), trust_remote_code=trust_remote_code)
        return
    config = read_config(folder, trust_remote_code)
    record = record_in(config)
    if record is None:
        return
    tensors = read_headers(folder)
    if (folder / INDEX).is_file() and not isinstance(read_json(folder / INDEX).get("metadata"), dict):
        raise CheckpointError(f"{folder / INDEX}: has no metadata; expected an object")
    check_generation(folder)
    model = skeleton(config, trust_remote_code)
    try:
        operate(model, record.quantizations(), storage=record.storage)
    except SurgeryError:
        return  # opening it does the same, and says what does not fit
    check_tensors(model, tensors, names_in(model, tensors), whole=whole)


def check_generation(folder: Path) -> None:
    """Do nothing if the settings for generation in ``folder`` are some, or none are. Raises: CheckpointError."""
    file = folder / GENERATION
    if not file.is_file():
        return
    read_json(file)
    try:
        transformers.GenerationConfig.from_pretrained(folder)
    except (OSError, *BAD_ADAPTER) as error:
        raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())[:300]}") from error


def check_adapter(folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json of a folder whose files can be opened. Raises: CheckpointError."""
    refuse_irregular(folder)
    config = read_json(folder / ADAPTER)
    if config.get("megatron_config") is not None:
        raise CheckpointError(f"{folder / ADAPTER}: has a megatron_config, with which peft imports whatever it names")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: has no {ADAPTER_WEIGHTS}")
    read_header(folder / ADAPTER_WEIGHTS)
    return config


def check_tensors(model: Any, tensors: Mapping[str, Tensor], names: Names, *, whole: bool = True) -> None:
    """Do nothing if ``tensors`` fill ``model``, which is on the meta device: all of it, each in its shape.

    ``names``: what becomes of the tensors. What is tied to a tensor that is there is there, and what the model's class
    says that it makes itself need not be. Tensors that the model has no place for are no mistake.

    Raises: CheckpointError that names the file and the tensor.
    """
    state: dict[str, Values] = model.state_dict()
    packed = packed_layers(model).keys()
    for name, stored in names.stored.items():
        if name.rpartition(".")[0] in packed:
            _check_packed(name, tensors[stored], state[name])
        else:
            _check_tensor(tensors[stored], state[name])
    if not whole:
        return
    ignored = ignored_if_missing(model)
    absent = (*names.missing, *_missing_buffers(model, state, names))
    missing = [name for name in absent if not any(re.search(pattern, name) for pattern in ignored)]
    if missing:
        more = f", nor {len(missing) - 1} more of {type(model).__name__}" if missing[1:] else ""
        strange = f"; {names.unknown[0]} is there, which the model has no place for" if names.unknown else ""
        raise CheckpointError(f"the checkpoint has no tensor {missing[0]}{more}{strange}")


def _check_tensor(tensor: Tensor, place: Values) -> None:
    if tensor.shape != tuple(place.shape):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, config.json says {list(place.shape)}"
        )
    if place.is_floating_point() and not _is_floating_point(tensor):
        raise CheckpointError(f"{tensor.file}: {tensor.name} is {tensor.dtype}; expected floating point")


def _check_packed(name: str, tensor: Tensor, place: Values) -> None:
    """Refuse what the quantizer would refuse, in its words, and say in which file it is."""
    if tensor.shape != tuple(place.shape):
        takes = list(place.shape)
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}; the packed layer takes {takes} (in {tensor.file})"
        )
    exact = DTYPES.get(place.dtype, "")
    fits = _is_floating_point(tensor) if place.is_floating_point() else tensor.dtype == exact
    if not fits:
        wanted = "floating point" if place.is_floating_point() else exact
        raise CheckpointError(f"{name} is {tensor.dtype}; the packed layer takes {wanted} (in {tensor.file})")


def _is_floating_point(tensor: Tensor) -> bool:
    return tensor.dtype.startswith(("F", "BF"))


def _missing_buffers(model: Any, state: Mapping[str, Values], names: Names) -> list[str]:
    """Return the buffers that a checkpoint has to have, and has not."""
    return [name for name, _ in model.named_buffers() if name in state and name not in names.stored]
