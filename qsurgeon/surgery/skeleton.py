"""A model's modules from its config alone, on the meta device: no weight is read."""

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from qsurgeon.errors import CheckpointError


def read_config(source: str | Path) -> Any:
    """Return the config of a folder, a config.json or a hub id.

    Raises: CheckpointError if there is none, or if transformers does not know the architecture.
    """
    path = Path(source)
    if path.name == "config.json":
        path = path.parent
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; expected a model's folder")
    looks_like_a_path = path.is_absolute() or len(path.parts) > 2 or str(source).startswith(".")
    if looks_like_a_path and not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; expected a model's folder, a config.json or a hub id")
    try:
        return transformers.AutoConfig.from_pretrained(str(path if path.is_dir() else source), trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        there = "" if path.exists() else "no such folder, and as a hub id: "
        raise CheckpointError(f"no model at '{source}': {there}{_first_lines(error)}") from error


def skeleton(config: Any) -> nn.Module:
    """Return the model that ``config`` describes, on the meta device, as its first architecture.

    Raises: CheckpointError if transformers has no such architecture.
    """
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if names and not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(f"transformers {transformers.__version__} has no architecture '{names[0]}'")
    if model_class is not None and not isinstance(config, model_class.config_class):
        raise CheckpointError(f"architecture '{names[0]}' does not go with a {type(config).__name__}")
    with torch.device("meta"):
        if model_class is None:
            model = transformers.AutoModel.from_config(  # type: ignore[no-untyped-call]
                config, dtype=config.dtype or torch.float32
            )
        else:
            model = model_class._from_config(config, dtype=config.dtype or torch.float32)
    result: nn.Module = model
    return result


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
