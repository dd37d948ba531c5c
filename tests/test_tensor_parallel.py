"""Tensor parallelism over two processes: what is split computes what one process does, or is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import needs

import qsurgeon
from qsurgeon.recipe import load_recipe

pytestmark = [
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="torch was built without gloo",
    ),
    needs("transformers", "5.16", "splits weights into plain tensors"),  # such a model is refused: test_private.py
]

WORKER = Path(__file__).parent / "tensor_parallel_worker.py"
Found = dict[str, dict[str, str]]


@pytest.fixture(scope="module", params=[0, 1])
def found(request: pytest.FixtureRequest, base: Path) -> Found:
    result: Found = json.loads((base / f"found-{request.param}.json").read_text("utf-8"))
    return result


@pytest.fixture(scope="module")
def base(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker in two processes, on a model of each recipe."""
    base = tmp_path_factory.mktemp("tensor-parallel")
    for name in ("w4a4-mxfp4", "w4a4-nvfp4"):
        for storage in ("master", "packed"):
            recipe = load_recipe(name).model_copy(update={"storage": storage})
            qsurgeon.apply(recipe, small_model()).save_pretrained(base / f"{storage}-{name}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(WORKER), str(base)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return base


@pytest.mark.parametrize(("what", "least"), [("layers", 80), ("placements", 27), ("nan", 6), ("models", 12)])
def test_processes_together_compute_what_one_does(what: str, least: int, found: Found) -> None:
    assert len(found[what]) >= least
    assert {case: wrong for case, wrong in found[what].items() if wrong} == {}


def test_what_a_part_would_round_otherwise_is_refused_by_the_layers_name(found: Found) -> None:
    cut = (
        "a part would be rounded otherwise than in the whole. Exclude it, split it along its outputs (colwise), or "
        "over fewer processes"
    )
    assert found["refused"] == {
        "cut blocks": "1 is split over processes into parts of 48 values, which cut its input's blocks (runs of 32 "
        f"values do not fit): {cut}",
        "cut codes": "1 is split over processes into parts of 48 values, which cut its input's blocks (runs of 32 "
        f"values do not fit): {cut}",
        "cut rows of blocks": "0 is split over processes into parts of 64 values, which cut its weight's blocks (runs "
        f"of 128 values do not fit): {cut}",
        "random": "the weight of 0 is split over processes, and format 'dithered' rounds at random, by the place of "
        "each value: a part would be rounded otherwise than in the whole. Exclude it, or use rounding: nearest",
        "watched": "the weight of 0 is split by tensor parallelism, and Watch cannot tell from a part whether a layer "
        "rounds; close it",
        "a part": "0 has 256 outputs and 64 inputs, and is called with a weight of (128, 64), a part that would be "
        "rounded otherwise than in the whole. Split it as a DTensor, exclude it, or set out_features and in_features "
        "if this is the whole",
    }
