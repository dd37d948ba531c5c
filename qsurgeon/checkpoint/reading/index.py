"""Which files hold the tensors of a checkpoint, and the headers of these files."""

from pathlib import Path
from typing import NoReturn

from qsurgeon.checkpoint.reading.files import INDEX, OTHER_ENGINES, PICKLES, SINGLE, refuse_link_outside, suffix_of
from qsurgeon.checkpoint.reading.headers import Tensor, read_header
from qsurgeon.errors import CheckpointError, nearest
from qsurgeon.reading import read_json


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that hold the model in ``folder``, the index's order kept.

    Raises: CheckpointError if there are none, if one is missing, if the index names one outside of the folder, or if
    one is a link that leads out of it.
    """
    index = folder / INDEX
    if index.is_file():
        names = dict.fromkeys(_weight_map(folder).values())
        if SINGLE not in names and (folder / SINGLE).is_file():
            raise CheckpointError(
                f"{folder}: has {SINGLE}, and {INDEX} that names other files; which of them hold the model cannot be "
                "told. Remove those that do not"
            )
        return tuple(_named_in(index, name) for name in names)
    if not (folder / SINGLE).is_file():
        _refuse_without_safetensors(folder)
    refuse_link_outside(folder / SINGLE, folder)
    return (folder / SINGLE,)


def named_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that hold the model in ``folder``, as its index has them; they need not be there.

    Raises: CheckpointError for an index that cannot be read, or that names what is no safetensors file of its folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return (SINGLE,)
    names = dict.fromkeys(_weight_map(folder).values())
    for name in names:
        _check_name(index, name)
    return tuple(names)


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return what the headers of the weight files say, by tensor name; no tensor is read.

    Raises: CheckpointError as ``weight_files`` and ``read_header``, and where index and files disagree.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for tensor in read_header(file).tensors:
            if tensor.name in tensors:
                first = tensors[tensor.name].file.name
                raise CheckpointError(f"{file}: has a tensor {tensor.name}, and so has {first}")
            tensors[tensor.name] = tensor
    if (folder / INDEX).is_file():
        _check_agreement(tensors, folder)
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file's name of each tensor, as the index has it."""
    index = folder / INDEX
    refuse_link_outside(index, folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: tensor {tensor} expects the name of a file, got {type(name).__name__}")
    return weight_map


def _check_name(index: Path, name: str) -> None:
    if Path(name).name != name or name in {"", ".."}:
        raise CheckpointError(f"{index}: names '{name}', which is not a file of its folder")
    file = index.parent / name
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{index}: names '{name}', which is not safetensors; {_why_not(file)}")


def _named_in(index: Path, name: str) -> Path:
    """Return the file that the index means by ``name``, if it is one of its folder."""
    _check_name(index, name)
    folder, file = index.parent, index.parent / name
    try:
        there = file.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        others = [one.name for one in folder.glob("*.safetensors") if one.is_file()]
        hint = f"; {nearest(name, others)}" if others else ""
        raise CheckpointError(f"{folder}: the index names {name}, which is missing{hint}")
    refuse_link_outside(file, folder)
    return file


def _check_agreement(tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse an index that is not of these files: a reader would look for tensors where they are not."""
    weight_map = _weight_map(folder)
    for name, file in weight_map.items():
        there = tensors.get(name)
        if there is None:
            raise CheckpointError(f"{folder / file}: has no tensor {name}, which the index says it has")
        if there.file.name != file:
            raise CheckpointError(f"{there.file}: has the tensor {name}, which the index says is in {file}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{tensor.file}: has a tensor {name}, which the index does not name")


def _refuse_without_safetensors(folder: Path) -> NoReturn:
    """Say what a folder without safetensors has instead, if anything."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'is a file; expected a folder' if folder.exists() else 'no such folder'}")
    for link in (folder / INDEX, folder / SINGLE):
        if link.is_symlink():
            raise CheckpointError(
                f"{link}: is a link to {link.readlink()}, which is no file; is the download complete?"
            )
    files = sorted(folder.iterdir(), key=lambda file: (suffix_of(file) not in PICKLES, file.name))
    for file in files:
        if suffix_of(file) in PICKLES | OTHER_ENGINES:
            raise CheckpointError(f"{folder}: has no safetensors, only {file.name}; {_why_not(file)}")
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _why_not(file: Path) -> str:
    """Return why weights in another format are not read, and what to do."""
    if suffix_of(file) in PICKLES:
        return (
            "a pickle runs code when it is opened, so it is not read. "
            "Convert it with transformers: from_pretrained(…), then save_pretrained(…)"
        )
    return "expected safetensors"
