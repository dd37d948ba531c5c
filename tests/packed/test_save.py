"""Packed weights that are saved, and what is said of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qsurgeon
from qsurgeon.formats import get_format
from qsurgeon.recipe import Recipe
from qsurgeon.report.inspection import report_of
from qsurgeon.storage.packed import stored_bytes

DOWN = "model.layers.1.mlp.down_proj"

Maker = Callable[..., Any]
MakeRecipe = Callable[..., Recipe]
Logits = Callable[[Any], Tensor]
Different = Callable[[nn.Module, nn.Module], list[str]]


def test_shards_reload_to_the_bit(folder: Path, different: Different, tmp_path: Path) -> None:
    model = qsurgeon.load(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert different(qsurgeon.load(tmp_path), model) == []


def test_a_packed_head_is_untied_from_its_embedding(
    small_model: Maker, recipe: MakeRecipe, logits: Logits, different: Different, tmp_path: Path
) -> None:
    rules = [{"target": ["lm_head"], "weight": "mxfp4"}]
    model = qsurgeon.apply(recipe(untie=True, rules=rules), small_model(tie_word_embeddings=True))
    assert model.model.embed_tokens.weight.dtype == torch.float32
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.uint8
    again = qsurgeon.load(tmp_path)
    assert not again.config.tie_word_embeddings
    assert different(again, model) == []
    assert torch.equal(logits(again), logits(model))


def test_a_state_dict_that_is_given_is_what_is_saved(folder: Path, different: Different, tmp_path: Path) -> None:
    model = qsurgeon.load(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    saves: tuple[Callable[[Path], Any], ...] = (
        lambda path: model.save_pretrained(path, state_dict=state),
        lambda path: model.save_pretrained(path, True, state),
    )
    for place, save in enumerate(saves):
        save(tmp_path / str(place))
        again = qsurgeon.load(tmp_path / str(place))
        assert different(again, model) == ["model.norm.weight"]
        assert torch.equal(again.state_dict()["model.norm.weight"], state["model.norm.weight"])
    model.save_pretrained(tmp_path / "own")
    assert different(qsurgeon.load(tmp_path / "own"), model) == []


# --- what it is said to be


def test_a_plan_says_what_packing_will_take_and_inspect_what_it_takes(
    plain_folder: Path, folder: Path, small_model: Maker, recipe: MakeRecipe
) -> None:
    planned = qsurgeon.inspect(small_model())
    before = planned.bytes
    report = report_of(qsurgeon.plan(recipe(), plain_folder))
    live, there = qsurgeon.inspect(qsurgeon.load(folder)), qsurgeon.inspect(folder)
    assert report.bytes == before
    assert report.bytes_after == live.bytes == there.bytes < before
    assert live.bytes == sum(one.nbytes for one in qsurgeon.load(folder).parameters())
    assert {one.storage for one in (report, live, there)} == {"packed"}
    line = f"\nsize: {before / 1e6:.1f} MB now, {live.bytes / 1e6:.1f} MB with packed weights\n"
    assert line in f"{report}\n"
    assert f"\nsize: {live.bytes / 1e6:.1f} MB\n" in f"{live}\n"
    for one, other, planned_row in zip(live.rows, there.rows, report.rows, strict=True):
        assert (one.module, one.shape, one.parameters, one.bits) == (
            planned_row.module, planned_row.shape, planned_row.parameters, planned_row.bits,
        )  # fmt: skip
        assert (one.bytes, one.type) == (other.bytes, other.type)
    row = next(row for row in live.rows if row.module == DOWN)
    assert (row.kind, row.shape, row.parameters) == ("PackedLinear", (64, 128), 64 * 128)
    assert row.bytes == stored_bytes(get_format("nvfp4").as_weight, 64, 128)


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_plan_counts_a_weight_that_is_untied(small_model: Maker, recipe: MakeRecipe, storage: str) -> None:
    rules = [{"target": ["lm_head"], "weight": "mxfp4"}]
    model = small_model(tie_word_embeddings=True)
    report = report_of(qsurgeon.plan(recipe(storage, untie=True, rules=rules), model))
    assert report.bytes == sum(one.nbytes for one in model.parameters())
    qsurgeon.apply(recipe(storage, untie=True, rules=rules), model)
    assert report.bytes_after == sum(one.nbytes for one in model.parameters()) > report.bytes
