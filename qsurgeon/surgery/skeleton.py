"""A model's modules from its config alone, on the meta device: no weight is read."""

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from qsurgeon.errors import CheckpointError


def read_config(source: str | Path) -> Any:
    """Return the config in a folder, or in a config.json. What is on the hub is fetched first: ``checkpoint.hub``.

    Raises: CheckpointError if there is none, or if transformers does not know the architecture.
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
        return transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except _BAD_CONFIG as error:
        raise CheckpointError(f"no model at '{source}': {_first_lines(error)}") from error


# What transformers raises, in its own words or Python's, for a config that describes no model.
_BAD_CONFIG = (
    OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError, StrictDataclassError,
)  # fmt: skip


def architecture(config: Any) -> Any:
    """Return the model class that ``config`` names first, or None if it names none.

    Raises: CheckpointError if transformers has no such class, or if it is another config's.
    """
    names = config.architectures or []
    if not names:
        return None
    model_class = getattr(transformers, str(names[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(f"transformers {transformers.__version__} has no architecture '{names[0]}'")
    if model_class.config_class is None or not isinstance(config, model_class.config_class):
        raise CheckpointError(f"architecture '{names[0]}' does not go with a {type(config).__name__}")
    return model_class


def skeleton(config: Any) -> nn.Module:
    """Return the model that ``config`` describes, on the meta device, as its first architecture.

    Raises: CheckpointError if transformers has no such architecture, or cannot build it from these values.
    """
    model_class = architecture(config)
    build = transformers.AutoModel.from_config if model_class is None else model_class._from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=config.dtype or torch.float32)
    except _BAD_CONFIG as error:
        raise CheckpointError(f"its config describes no model that can be built: {_first_lines(error)}") from error
    return model


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
