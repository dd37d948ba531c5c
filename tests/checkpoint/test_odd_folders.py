"""Folders that are almost checkpoints: what each lacks is said, with the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qsurgeon
from qsurgeon.checkpoint import kept, rewrite
from qsurgeon.errors import CheckpointError
from qsurgeon.recipe import Recipe, Rule

PACKED = Recipe(version=1, storage="packed", rules=(Rule(target=("layers",), weight="mxfp4", input="mxfp4"),))


@pytest.fixture
def plain(plain_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_folder, tmp_path / "plain"))


@pytest.mark.parametrize("name", ["a.json", "model-2.safetensors", "b.yaml", "OTHER.md"])
def test_a_folder_that_is_called_like_a_file_is_refused(plain: Path, tmp_path: Path, name: str) -> None:
    (plain / name).mkdir()
    with pytest.raises(CheckpointError) as caught:
        rewrite("w4a4-mxfp4", plain, tmp_path / "out")
    assert str(caught.value) == f"{plain / name}: is a folder; expected a file"
    assert not (tmp_path / "out").exists()


def test_a_card_that_is_no_text_is_refused(plain: Path, tmp_path: Path) -> None:
    (plain / "README.md").write_bytes(b"# a model\n\xff\n")
    with pytest.raises(CheckpointError) as caught:
        rewrite("w4a4-mxfp4", plain, tmp_path / "out")
    assert str(caught.value) == (
        f"{plain / 'README.md'}: cannot be read as text: 'utf-8' codec can't decode byte 0xff in position 10: "
        "invalid start byte"
    )


def test_an_index_without_metadata_is_refused(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", small_model())
    model.save_pretrained(tmp_path, max_shard_size="50kB")
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["metadata"]
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(tmp_path)
    assert str(caught.value) == f"{index}: has no metadata; expected an object"


def test_a_layout_that_takes_the_name_of_a_packed_weight_is_refused(
    small_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qsurgeon.apply(PACKED, small_model())
    taken = f"{min(kept.packed_names(model))}.weight"
    monkeypatch.setattr(kept, "kept_names", lambda *_: frozenset({taken}))

    def revert(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, taken: torch.zeros(1)}

    with pytest.raises(CheckpointError) as caught:
        kept.keeping(revert)(model, model.state_dict())
    assert str(caught.value) == (
        f"the layout of its checkpoint gives another tensor the name {taken}, which a packed weight has: "
        "save it with save_original_format=False"
    )
