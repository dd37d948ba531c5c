"""A checkpoint's files: which hold weights, what the headers of these say, and what belongs beside them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qsurgeon.errors import CheckpointError, nearest

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


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file's header describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises: CheckpointError if it is missing or not that."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that hold the model in ``folder``, the index's order kept.

    Raises: CheckpointError if there are none, if one is missing, or if the index names one outside the folder.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map")
        return tuple(_inside(folder, str(name), index) for name in dict.fromkeys(weight_map.values()))
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in FOREIGN_WEIGHTS)
    if pickles:
        raise CheckpointError(
            f"{folder}: has no safetensors, only {pickles[0]}; a pickle runs code when it is opened, "
            "so it is not read. "
            "Convert it with transformers: from_pretrained(…), then save_pretrained(…)"
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _inside(folder: Path, name: str, index: Path) -> Path:
    file = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{index}: names '{name}', which is not a file of its folder")
    if not file.is_file():
        there = [one.name for one in folder.glob("*.safetensors")]
        hint = f"; {nearest(name, there)}" if there else ""
        raise CheckpointError(f"{folder}: the index names {name}, which is missing{hint}")
    return file


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return what the headers of the weight files say, by tensor name; no tensor is read.

    Raises: CheckpointError as ``weight_files``, and for a file that is cut short or not safetensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    view = opened.get_slice(name)
                    tensors[name] = Tensor(name, file, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: is not a whole safetensors file: {error}") from error
    return tensors


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
