"""Which files hold a checkpoint's tensors, and what is in them."""

from pathlib import Path

from qsurgeon.checkpoint.files import FOREIGN_WEIGHTS, INDEX, SINGLE
from qsurgeon.checkpoint.headers import Tensor, read_header
from qsurgeon.errors import CheckpointError, nearest
from qsurgeon.reading import read_json


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

    Raises: CheckpointError as ``weight_files`` and ``read_header``.
    """
    return {tensor.name: tensor for file in weight_files(folder) for tensor in read_header(file).tensors}
