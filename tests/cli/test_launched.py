"""``qsurgeon apply`` below torchrun: the processes share the files of one output."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsurgeon.checkpoint import Options, rewrite
from qsurgeon.recipe import load_recipe

RECIPE = """\
version: 1
storage: packed
rules:
  - target: [layers]
    weight: mxfp4
"""


@pytest.fixture(scope="module")
def source(make_qwen2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched") / "model"
    make_qwen2(num_hidden_layers=2).save_pretrained(folder, max_shard_size="100kB")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path / "mine.yaml"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def launch(*arguments: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, "-m", "qsurgeon", "apply", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_write_what_one_writes(source: Path, recipe: Path, tmp_path: Path) -> None:
    rewrite(load_recipe(recipe), source, tmp_path / "one", options=Options(max_shard_size="30kB"))
    done = launch(recipe, "--model", source, "--output", tmp_path / "two", "--max-shard-size", "30kB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path}/two: 92.0% of the parameters are wrapped, in 14 of 15 Linear modules "
        "(8.0% are in no Linear, most in Embedding): 14 with weight mxfp4, input -"
    ]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "one", "two"]


def test_one_message_where_all_would_fail(source: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("layers", "layrs"))
    done = launch(recipe, "--model", source, "--output", tmp_path / "out")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {recipe}:4:14: 'layrs' names no module; did you mean 'layers'?"
    ]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_what_one_process_finds_stops_all_and_is_kept(source: Path, recipe: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(source, tmp_path / "source"))
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor[0, 0] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    done = launch(recipe, "--model", source, "--output", out, "--max-shard-size", "30kB")
    assert done.returncode != 0
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert not out.exists()
    rewrite(load_recipe(recipe), source, out, options=Options(max_shard_size="30kB", allow_nonfinite=True))
    assert (out / "config.json").is_file()
