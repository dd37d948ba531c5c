"""Which files an index may name, where links may lead, and that index and files agree."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qsurgeon.checkpoint import read_headers, rewrite, weight_files
from qsurgeon.checkpoint.reading.files import companions
from qsurgeon.errors import CheckpointError
from qsurgeon.reading import MOST_JSON

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a": FIRST, "b": FIRST, "c": SECOND}


def shard(file: Path, *names: str) -> None:
    save_file({name: torch.full((2, 2), float(ord(name[-1]))) for name in names}, file)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files: a and b in the first, c in the second."""
    folder = tmp_path / "model"
    folder.mkdir()
    shard(folder / FIRST, "a", "b")
    shard(folder / SECOND, "c")
    write_index(folder, MAP)
    return folder


def refused(folder: Path, reader: Callable[[Path], Any] = read_headers) -> str:
    with pytest.raises(CheckpointError) as caught:
        reader(folder)
    return str(caught.value)


def test_an_index_and_its_files_are_read(folder: Path) -> None:
    assert weight_files(folder) == (folder / FIRST, folder / SECOND)
    assert {name: tensor.file.name for name, tensor in read_headers(folder).items()} == MAP


def test_an_index_of_a_single_file_is_read(folder: Path) -> None:
    shard(folder / "model.safetensors", "a")
    write_index(folder, {"a": "model.safetensors"})
    assert list(read_headers(folder)) == ["a"]


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    shard(folder / "model.safetensors", "a")
    assert refused(folder) == (
        f"{folder}: has model.safetensors, and {INDEX} that names other files; which of them hold the model cannot be "
        "told. Remove those that do not"
    )


# --- what the index says


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "./x.safetensors", "..", ".", "", "x/"]
)
def test_a_name_that_is_no_file_of_the_folder_is_refused(folder: Path, name: str) -> None:
    write_index(folder, MAP | {"c": name})
    assert refused(folder) == f"{folder / INDEX}: names '{name}', which is not a file of its folder"


@pytest.mark.parametrize("name", ["x\0.safetensors", f"{'x' * 300}.safetensors"], ids=["zero-byte", "too-long"])
def test_a_name_that_no_file_can_have_is_missing(folder: Path, name: str) -> None:
    write_index(folder, MAP | {"c": name})
    shown = name.replace("\0", "\\x00")
    assert refused(folder).startswith(f"{folder}: the index names {shown}, which is missing; ")


def test_a_missing_file_is_named_with_the_nearest_there_is(folder: Path) -> None:
    (folder / SECOND).rename(folder / "model-00002-of-00003.safetensors")
    assert refused(folder) == (
        f"{folder}: the index names {SECOND}, which is missing; did you mean 'model-00002-of-00003.safetensors'?"
    )


def test_a_folder_by_the_name_of_a_file_is_missing(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    assert refused(folder) == f"{folder}: the index names {SECOND}, which is missing; did you mean '{FIRST}'?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "tensor a expects the name of a file, got int"),
        ('{"weight_map": {"a": null}}', "tensor a expects the name of a file, got NoneType"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' appears twice"),
        ('{"weight_map": {}, "weight_map": {"a": "x.safetensors"}}', "key 'weight_map' appears twice"),
        ('{"weight_map": {"a": "\\udc00.safetensors"}}', "'a' has half a character"),
        ('{"weight_map": ' + "[" * 100_000, "is nested too deep"),
    ],
    ids=lambda one: one[:30],
)
def test_an_index_that_is_no_map_of_names_is_refused(folder: Path, text: str, expected: str) -> None:
    (folder / INDEX).write_text(text)
    assert refused(folder) == f"{folder / INDEX}: {expected}"


def test_an_index_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / INDEX).write_bytes(b'{"weight_map": {"\xff": "x"}}')
    assert refused(folder) == f"{folder / INDEX}: is not UTF-8 text (byte 17)"


def test_an_index_that_is_larger_than_any_is_refused_unread(folder: Path) -> None:
    with (folder / INDEX).open("wb") as opened:
        opened.truncate(100 * MOST_JSON)
    assert refused(folder) == f"{folder / INDEX}: cannot be read: it has more than 33,554,432 bytes"


def test_an_index_of_the_largest_models_is_read(tmp_path: Path) -> None:
    names = [f"model.layers.{n // 1200}.mlp.experts.{n % 384}.gate_proj.weight.{n}" for n in range(150_000)]
    file = "model-00001-of-00001.safetensors"
    entries = {n: {"dtype": "U8", "shape": [1], "data_offsets": [k, k + 1]} for k, n in enumerate(names)}
    header = json.dumps(entries).encode()
    (tmp_path / file).write_bytes(len(header).to_bytes(8, "little") + header + bytes(len(names)))
    write_index(tmp_path, dict.fromkeys(names, file))
    assert len(read_headers(tmp_path)) == 150_000


# --- where index and files disagree


def test_a_tensor_that_its_file_lacks_is_refused(folder: Path) -> None:
    write_index(folder, MAP | {"d": SECOND})
    assert refused(folder) == f"{folder / SECOND}: has no tensor d, which the index says it has"


def test_a_tensor_that_the_index_does_not_name_is_refused(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "c": SECOND})
    assert refused(folder) == f"{folder / FIRST}: has a tensor b, which the index does not name"


def test_a_tensor_in_another_file_than_the_index_says_is_refused(folder: Path) -> None:
    write_index(folder, MAP | {"b": SECOND})
    assert refused(folder) == f"{folder / FIRST}: has the tensor b, which the index says is in {SECOND}"


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shard(folder / SECOND, "b", "c")
    assert refused(folder) == f"{folder / SECOND}: has a tensor b, and so has {FIRST}"


# --- links


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def outside(link: Path, target: Path) -> str:
    return (
        f"{link}: is a link to {target}, outside of its folder; put the file itself there, if it belongs to the model"
    )


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, elsewhere: Path, absolute: bool) -> None:
    shutil.move(folder / SECOND, elsewhere / SECOND)
    (folder / SECOND).symlink_to(elsewhere / SECOND if absolute else f"../elsewhere/{SECOND}")
    assert refused(folder) == outside(folder / SECOND, elsewhere / SECOND)


def test_a_link_by_way_of_another_in_the_folder_is_refused(folder: Path, elsewhere: Path) -> None:
    shutil.move(folder / SECOND, elsewhere / SECOND)
    (folder / "hop").symlink_to(elsewhere / SECOND)
    (folder / SECOND).symlink_to("hop")
    assert refused(folder) == outside(folder / SECOND, elsewhere / SECOND)


def test_a_single_file_and_an_index_that_are_links_out_of_the_folder_are_refused(tmp_path: Path, folder: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.safetensors").symlink_to(folder / FIRST)
    assert refused(alone) == outside(alone / "model.safetensors", folder / FIRST)
    (alone / INDEX).symlink_to(folder / INDEX)
    assert refused(alone) == outside(alone / INDEX, folder / INDEX)


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / SECOND).rename(folder / "other")
    (folder / SECOND).symlink_to("other")
    assert set(read_headers(folder)) == {"a", "b", "c"}


def test_a_link_to_nothing_and_one_to_itself_are_missing(folder: Path) -> None:
    (folder / SECOND).unlink()
    for target in ("nothing", SECOND):
        (folder / SECOND).symlink_to(target)
        assert refused(folder) == f"{folder}: the index names {SECOND}, which is missing; did you mean '{FIRST}'?"
        (folder / SECOND).unlink()


def test_a_single_file_that_is_a_link_to_nothing_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    assert refused(tmp_path) == (
        f"{tmp_path}/model.safetensors: is a link to ../../blobs/0123, which is no file; is the download complete?"
    )


def test_a_folder_that_is_reached_by_a_link_is_read(folder: Path, elsewhere: Path) -> None:
    (elsewhere / "model").symlink_to(folder)
    assert weight_files(elsewhere / "model") == (elsewhere / "model" / FIRST, elsewhere / "model" / SECOND)
    assert set(read_headers(elsewhere / "model")) == {"a", "b", "c"}


def into_cache(folder: Path, cache: Path, name: str = "models--org--name", *, shared: bool = False) -> Path:
    """Lay a folder's files into a cache as the hub's client does it; return the snapshot."""
    repository = cache / name
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        if shared:
            kept = cache / "blobs" / blob.name[:2] / blob.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, kept)
            blob.symlink_to(os.path.relpath(kept, blob.parent))
        else:
            shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_in_the_hubs_cache_is_read(folder: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = into_cache(folder, tmp_path / "hub", shared=shared)
    assert {name: tensor.file.name for name, tensor in read_headers(snapshot).items()} == MAP


def test_a_snapshot_in_the_hubs_cache_is_rewritten_into_files(tiny_folder: Path, tmp_path: Path) -> None:
    snapshot = into_cache(tiny_folder, tmp_path / "hub")
    rewrite("w4a4-mxfp4", snapshot, tmp_path / "out")
    assert [file for file in (tmp_path / "out").iterdir() if file.is_symlink()] == []
    assert (tmp_path / "out" / "generation_config.json").read_text() == (
        tiny_folder / "generation_config.json"
    ).read_text()


def test_a_link_to_another_repositorys_blobs_is_refused(folder: Path, tmp_path: Path) -> None:
    snapshot = into_cache(folder, tmp_path / "hub")
    other = into_cache(folder, tmp_path / "hub", "models--org--private")
    (snapshot / SECOND).unlink()
    target = (other / SECOND).resolve()
    (snapshot / SECOND).symlink_to(target)
    assert refused(snapshot) == outside(snapshot / SECOND, target)


@pytest.mark.parametrize("place", ["", "snapshots/model", "models--org--name/snapshot/model"])
def test_blobs_beside_a_folder_that_is_no_snapshot_are_refused(folder: Path, tmp_path: Path, place: str) -> None:
    moved = tmp_path / "there" / place
    shutil.move(folder, moved)
    blobs = moved.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    shutil.move(moved / SECOND, blobs / "0123")
    (moved / SECOND).symlink_to(blobs / "0123")
    assert refused(moved) == outside(moved / SECOND, blobs / "0123")


def test_a_companion_that_is_a_link_out_of_the_folder_is_refused(folder: Path, elsewhere: Path) -> None:
    (elsewhere / "secret").write_text("key")
    (folder / "tokenizer.json").symlink_to(elsewhere / "secret")
    assert refused(folder, lambda one: list(companions(one))) == outside(
        folder / "tokenizer.json", elsewhere / "secret"
    )


def test_a_companions_folder_that_is_a_link_out_of_the_folder_is_refused(folder: Path, elsewhere: Path) -> None:
    (folder / "pooling").symlink_to(elsewhere)
    assert refused(folder, lambda one: list(companions(one))) == outside(folder / "pooling", elsewhere)


# --- folders without safetensors

PICKLE = (
    "a pickle runs code when it is opened, so it is not read. Convert it with transformers: from_pretrained(…), then "
    "save_pretrained(…)"
)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["model.pt"], "model.pt"),
        (["consolidated.00.pth"], "consolidated.00.pth"),
        (["pytorch_model.bin.index.json"], "pytorch_model.bin.index.json"),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "model.gguf"],
            "pytorch_model-00001-of-00001.bin",
        ),
    ],
)
def test_pickles_are_refused_and_the_reason_given(tmp_path: Path, names: list[str], shown: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert refused(tmp_path) == f"{tmp_path}: has no safetensors, only {shown}; {PICKLE}"


def test_an_index_that_names_pickles_is_refused_and_the_reason_given(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    write_index(folder, {"a": "pytorch_model.bin"})
    assert refused(folder) == f"{folder / INDEX}: names 'pytorch_model.bin', which is not safetensors; {PICKLE}"


def test_other_engines_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x")
    assert refused(tmp_path) == f"{tmp_path}: has no safetensors, only model.gguf; expected safetensors"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert refused(tmp_path / "file") == f"{tmp_path}/file: is a file; expected a folder"
    assert refused(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such folder"
