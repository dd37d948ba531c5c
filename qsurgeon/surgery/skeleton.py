"""A model's modules from its config alone, on the meta device: no weight is read.

A checkpoint may bring Python code of its own, which its config names in ``auto_map``. It is never run unless the caller
says ``trust_remote_code``; where transformers has the model itself, it is not needed.
"""

import difflib
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qsurgeon.errors import CheckpointError
from qsurgeon.reading import read_json
from qsurgeon.transformers_private.loading import (
    auto_mappings,
    get_class_from_dynamic_module,
    without_weights,
)

# What transformers raises, in its own words or Python's, for a config that describes no model.
_BAD_CONFIG = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip


# A config of a few bytes can ask for more modules, or names of labels, than any machine holds: these are many times
# what the largest models known have, by what their keys have in them.
MOST_MODULES = 2_000_000
_MOST = {
    "layer": 100_000, "expert": 100_000, "depth": 100_000, "num_blocks": 100_000, "num_stages": 100_000,
    "num_labels": 10_000_000,
}  # fmt: skip


def read_config(source: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the config in a folder, or in a config.json. What is on the hub is fetched first: ``checkpoint.hub``.

    ``trust_remote_code``: run the code that the model brings with it, where its config asks for that.

    Raises: CheckpointError if there is none, or if transformers does not know the model and may not run its code.
    """
    path = Path(source)
    if path.name == "config.json":
        path = path.parent
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; expected a model's folder")
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; expected a model's folder, a config.json or a hub id")
    try:
        data = read_json(path / "config.json")
        _check_counts(data, path / "config.json")
        _check_known(data, str(path), trust_remote_code)
        return transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (*_BAD_CONFIG, *_BAD_CODE) as error:
        raise CheckpointError(f"no model at '{source}': {_first_lines(error)}") from error


# What running a model's own code raises besides, before it does anything: a package is missing, or it is not Python.
_BAD_CODE = (ImportError, SyntaxError)


def _check_counts(data: Any, file: Path) -> None:
    """Refuse a config.json that asks for more of something than any model has: building that would not end."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, dict | list):
            _check_counts(value, file)
        elif isinstance(value, int | float):
            most = next((most for part, most in _MOST.items() if part in str(key)), value)
            if value > most:
                raise CheckpointError(f"{file}: {key} is {value:,}; expected at most {most:,}")


def _check_known(data: dict[str, Any], name: str, trust_remote_code: bool) -> None:
    """Refuse a config.json of a model type that transformers does not know, unless it may run the model's code."""
    model_type = data.get("model_type")
    own = _own_code(data.get("auto_map"))
    if isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING:
        return
    if "AutoConfig" in own:
        if not trust_remote_code:
            raise CheckpointError(_not_trusted(name, f"model type '{model_type}'"))
    elif model_type is None:
        raise CheckpointError(f"{name}: its config.json has no model_type; expected the config of a transformers model")
    else:
        known = _nearest(str(model_type), transformers.CONFIG_MAPPING)
        raise CheckpointError(
            f"{name}: transformers {transformers.__version__} has no model type '{model_type}'{known}"
        )


def architecture(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the model class that ``config`` names first, or None if it names none.

    ``trust_remote_code``: if the class is one of the model's own, run its code and return that.

    Raises: CheckpointError if transformers has no such class and may not run the model's, or if it is another config's.
    """
    names = config.architectures or []
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
        raise CheckpointError(f"'architectures' in config.json expects a list of names, got {names!r}")
    own = _own_code(getattr(config, "auto_map", None))
    if not names:
        if "AutoModel" in own and not trust_remote_code and type(config) not in transformers.MODEL_MAPPING:
            raise CheckpointError(_not_trusted(config.name_or_path, f"model for a {type(config).__name__}"))
        return None
    name = names[0]
    reference = next((one for one in own.values() if one.rpartition(".")[2] == name), None)
    if reference is not None and trust_remote_code:
        return _own_class(reference, config)
    model_class: Any = getattr(transformers, name, None) or _class_beside(config, name)
    if not _is_model(model_class):
        if reference is not None:
            raise CheckpointError(_not_trusted(config.name_or_path, f"architecture '{name}'"))
        known = _nearest(name, (one for one in dir(transformers) if "For" in one or one.endswith("Model")))
        raise CheckpointError(f"transformers {transformers.__version__} has no architecture '{name}'{known}")
    if not _takes(model_class, config):
        raise CheckpointError(f"architecture '{name}' does not go with a {type(config).__name__}")
    return model_class


def _takes(model_class: Any, config: Any) -> bool:
    """Return whether a model is made from such a config: its class says so, or one of transformers' auto classes does.

    InternLM3, for one, has a config of its own, and Llama's models.
    """
    if model_class.config_class is not None and isinstance(config, model_class.config_class):
        return True
    found = (one.get(type(config), None) for one in auto_mappings())
    return any(model_class in (one if isinstance(one, tuple) else (one,)) for one in found)


def _class_beside(config: Any, name: str) -> Any:
    """Return a class that transformers has but does not hand out: a part of a model that was saved alone, as T5Stack.

    It is looked for where the config's own models are: ``modeling_x`` beside ``configuration_x``.
    """
    models = transformers.MODEL_MAPPING.get(type(config), None)
    beside = models[0] if isinstance(models, tuple) else models
    return getattr(sys.modules[beside.__module__], name, None) if beside is not None else None


def _own_code(auto_map: Any) -> dict[str, str]:
    """Return which class of the model's own code stands for which of transformers' auto classes."""
    if not isinstance(auto_map, dict):
        return {}
    return {auto: one for auto, one in auto_map.items() if isinstance(one, str)}


def _own_class(reference: str, config: Any) -> Any:
    try:
        model_class = get_class_from_dynamic_module(reference, config.name_or_path)
    except (*_BAD_CONFIG, *_BAD_CODE) as error:
        raise CheckpointError(f"{config.name_or_path}: its own code cannot be run: {_first_lines(error)}") from error
    if not _is_model(model_class):
        raise CheckpointError(f"{config.name_or_path}: '{reference}' of its own code is no transformers model")
    return model_class


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def _not_trusted(name: str, what: str) -> str:
    return (
        f"{name}: transformers {transformers.__version__} has no {what}; the model brings its own code (auto_map in "
        "its config.json), which is not run unless you say so. Read it, then pass --trust-remote-code (in Python, "
        "trust_remote_code=True)"
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: there are too many names to list when none is near."""
    guesses = [f"'{one}'" for one in difflib.get_close_matches(word[:100], list(known), n=3)]
    return f"; the nearest it has: {', '.join(guesses)}" if guesses else ""


def skeleton(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Return the model that ``config`` describes, on the meta device, as its first architecture.

    Raises: CheckpointError as ``architecture``, or if the model cannot be built from these values.
    """
    model_class = architecture(config, trust_remote_code)
    config = copy(config)
    vars(config).pop("quantization_config", None)  # nothing is wrapped here
    auto: Any = transformers.AutoModel
    try:
        dtype = torch.float32 if config.dtype is None else config.dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"its dtype is {dtype!r}")
        with torch.device("meta"), _bounded():
            model: nn.Module = (
                auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
                if model_class is None
                else without_weights(model_class, config, dtype)
            )
    except (*_BAD_CONFIG, *_BAD_CODE) as error:
        raise CheckpointError(f"its config describes no model that can be built: {_first_lines(error)}") from error
    return model


@contextmanager
def _bounded() -> Iterator[None]:
    """Refuse to build more than ``MOST_MODULES`` modules inside the block, in this thread. Raises: CheckpointError."""
    built, here = count(1), threading.get_ident()

    def register(*_: Any) -> None:
        if threading.get_ident() == here and next(built) > MOST_MODULES:
            raise CheckpointError(f"its config describes a model of more than {MOST_MODULES:,} modules")

    handle = register_module_module_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
