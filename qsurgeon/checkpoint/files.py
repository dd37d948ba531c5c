"""The names of a checkpoint's files, and what belongs beside the weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Weights in formats that we do not carry over: pickles, which run code when they are opened, and other engines'.
FOREIGN_WEIGHTS = {
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".tflite",
}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def companions(folder: Path) -> Iterator[Path]:
    """Yield the files that belong beside the weights (tokenizer, generation settings, …), from the folder."""
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        ours = len(inside.parts) == 1 and (file.suffix == ".safetensors" or file.name == INDEX)
        weights = ours or file.suffix in FOREIGN_WEIGHTS
        if file.is_file() and not hidden and not weights:
            yield inside


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs beside the weights in ``source`` to ``folder``."""
    for inside in companions(source):
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / inside, folder / inside)
