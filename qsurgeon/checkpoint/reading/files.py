"""A checkpoint's files: their names, which files belong to it, links that lead outside, and syncing to disk."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsurgeon.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Weights in formats that we do not carry over: pickles, which run code when they are opened, and other engines'.
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
OTHER_ENGINES = {".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite"}

_HASH = re.compile(r"[0-9a-f]{64}")  # what the hub's cache calls a file that repositories share


def suffix_of(file: Path) -> str:
    """Return the suffix of a weight file, or of the files that an index names."""
    return Path(file.name.removesuffix(".index.json")).suffix


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def flush(path: Path) -> None:
    """Let ``path`` reach the disk. Not every file system that is reached over a network can do that with a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def refuse_link_outside(file: Path, folder: Path) -> None:
    """Do nothing for a file that lies in ``folder``, or where the hub's cache keeps the files of this snapshot.

    The folder itself may be reached by any links. Raises: CheckpointError if ``file`` is a link, or lies in one, that
    leads anywhere else: what it leads to would end up in the output, whatever it is.
    """
    target, home = file.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return
    if not any(_keeps(place, target) for place in home.parents):
        raise CheckpointError(
            f"{file}: is a link to {target}, outside of its folder; put the file itself there, if it belongs to the "
            "model"
        )


def _keeps(snapshots: Path, target: Path) -> bool:
    """Say whether the hub's cache keeps ``target`` for snapshots in ``snapshots``.

    The layout is ``models--org--name/snapshots/<commit>/…``, with links to ``models--org--name/blobs/<etag>``, and
    from there, for files that repositories share, to ``blobs/<two digits>/<hash>`` beside all repositories.
    """
    repository = snapshots.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    shared = repository.parent / "blobs" / target.name[:2] / target.name
    return target.parent == repository / "blobs" or (target == shared and _HASH.fullmatch(target.name) is not None)


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_NEVER_FOLDERS = (".json", ".safetensors", ".yaml", ".md")


def refuse_irregular(folder: Path) -> None:
    """Do nothing if every file in ``folder`` is one. Libraries open by name what they find, and would wait for a pipe.

    Raises: CheckpointError, with its name, for a pipe, a socket or a device, also behind a link, and for a folder that
    is called like a file of a checkpoint.
    """
    for file in sorted(folder.iterdir()):
        try:
            kind = stat.S_IFMT(file.stat().st_mode)
        except OSError:  # a link that leads nowhere, or in a circle
            continue
        if kind in _KINDS:
            raise CheckpointError(f"{file}: is {_KINDS[kind]}; expected a file")
        if kind == stat.S_IFDIR and file.name.endswith(_NEVER_FOLDERS):
            raise CheckpointError(f"{file}: is a folder; expected a file")


def companions(folder: Path) -> Iterator[Path]:
    """Yield the files that belong beside the weights (tokenizer, generation settings, …), from the folder.

    Raises: CheckpointError if one is a link that leads out of the folder.
    """
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        ours = len(inside.parts) == 1 and (file.suffix == ".safetensors" or file.name == INDEX)
        weights = ours or suffix_of(file) in PICKLES | OTHER_ENGINES
        if hidden or weights:
            continue
        if file.is_symlink() and file.exists():
            refuse_link_outside(file, folder)
        if file.is_file():
            yield inside


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs beside the weights in ``source`` to ``folder``."""
    for inside in companions(source):
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / inside, folder / inside)
