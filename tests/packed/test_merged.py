"""Packed weights that are merged into, calibrated, and watched."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qsurgeon
from qsurgeon.formats import get_format
from qsurgeon.formats.quality import sqnr
from qsurgeon.layers import PackedLinear, packed_layers, quant_layers
from qsurgeon.recipe import Recipe

TOKENS = torch.arange(1, 13).reshape(2, 6)

Maker = Callable[..., Any]
MakeRecipe = Callable[..., Recipe]
Logits = Callable[[Any], Tensor]
Adapt = Callable[..., Any]
Step = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]

OWN = {
    "turned": {"like": "nvfp4", "hadamard": 16, "seed": 3},
    "square": {"like": "nvfp4", "block": [16, 16]},
}


def one_version(*weights: str) -> list[Any]:
    return [pytest.param(weight, marks=pytest.mark.one_version) for weight in weights]


@pytest.mark.parametrize("weight", ["mxfp4", *one_version("nvfp4", "turned", "square")])
def test_an_adapter_is_merged_into_codes(
    small_model: Maker, recipe: MakeRecipe, logits: Logits, adapted: Adapt, tmp_path: Path, weight: str
) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    rules = [{"target": ["layers"], "weight": weight, "input": "turned" if weight == "turned" else "mxfp4"}]
    qsurgeon.apply(recipe(formats=OWN, rules=rules), small_model()).save_pretrained(base, max_shard_size="40KB")
    model = adapted(qsurgeon.load(base), target_modules=["q_proj", "down_proj"])
    model.save_pretrained(adapter)
    done = qsurgeon.merge(adapter, out)
    merged, before = qsurgeon.load(out), packed_layers(qsurgeon.load(base))
    assert len(packed_layers(merged)) == 14
    assert [one.module for one in done.changes] == [
        f"model.layers.{layer}.{one}" for layer in range(2) for one in ("self_attn.q_proj", "mlp.down_proj")
    ]
    for change_ in done.changes:
        layer, old = packed_layers(merged)[change_.module], before[change_.module]
        delta = model.base_model.model.get_submodule(change_.module).get_delta_weight("default").detach()
        rotation = layer.quantization.rotation
        trained = old.opened() + (delta if rotation is None else rotation(delta))
        assert torch.equal(layer.opened(), layer.grid.fake_quantize(trained))
        changed = int((layer.codes() != old.codes()).sum())
        assert (change_.shape, change_.codes, change_.changed) == (tuple(delta.shape), delta.numel(), changed)
        assert changed > 0
        assert change_.sqnr == pytest.approx(sqnr(trained, layer.opened()), abs=1e-6)
        assert 5 < change_.sqnr < 60
    changed_names = {
        name
        for name, one in merged.state_dict().items()
        if not torch.equal(one, qsurgeon.load(base).state_dict()[name])
    }
    assert {name.rpartition(".")[0] for name in changed_names} == {one.module for one in done.changes}
    assert {file.name for file in out.iterdir()} >= {file.name for file in base.iterdir()}
    # What the adapter's model computed, but for what rounding the sum anew changes.
    far, near = logits(qsurgeon.load(base)) - logits(model.eval()), logits(merged) - logits(model.eval())
    assert near.norm() < far.norm()


def test_merging_opens_one_weight_at_a_time(
    folder: Path, adapted: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(qsurgeon.load(folder)).save_pretrained(tmp_path / "adapter")
    alive: list[int] = []
    opened: list[weakref.ref[Tensor]] = []
    open_ = PackedLinear.opened

    def counted(self: PackedLinear, dtype: Any = None) -> Tensor:
        alive.append(len({one.untyped_storage()._cdata for ref in opened if (one := ref()) is not None}))
        values = open_(self, dtype)
        opened.append(weakref.ref(values))
        return values

    monkeypatch.setattr(PackedLinear, "opened", counted)
    qsurgeon.merge(tmp_path / "adapter", tmp_path / "out")
    assert len(alive) == 2 * 11  # before and after
    assert max(alive) == 1  # the weight before, while the one after is opened


def test_static_scales_of_inputs_are_found_on_packed_weights(
    small_model: Maker, recipe: MakeRecipe, logits: Logits, tmp_path: Path
) -> None:
    formats = {
        "late": {"like": "nvfp4", "tensor_scale": "static"},
        "known": {"like": "nvfp4", "tensor_scale": "static", "static_scale": 0.001},
    }
    rules = [{"target": ["layers"], "weight": "known", "input": "late"}]
    model = qsurgeon.apply(recipe(formats=formats, rules=rules), small_model())
    before = {name: one.clone() for name, one in model.state_dict().items()}
    qsurgeon.calibrate(model, [{"input_ids": TOKENS}])
    scales = {name: one.quantization.static_scales for name, one in quant_layers(model).items()}
    assert all(one["weight"] == 0.001 and one["input"] > 0 for one in scales.values())
    assert len({one["input"] for one in scales.values()}) > 4
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, before[name])] == []
    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path)
    assert {name: one.quantization.static_scales for name, one in quant_layers(again).items()} == scales
    assert torch.equal(logits(again), logits(model))

    found = _found_by_the_master(small_model, recipe, formats)
    assert found == {name: one["input"] for name, one in scales.items()}


def _found_by_the_master(small_model: Maker, recipe: MakeRecipe, formats: dict[str, Any]) -> dict[str, float]:
    """Return the inputs' scales that calibrating a master model finds whose weights are those that were packed."""
    rules = [{"target": ["layers"], "input": "late"}]
    model = qsurgeon.apply(recipe("master", formats=formats, rules=rules), small_model())
    known = get_format("nvfp4").with_fields("known", tensor_scale="static", static_scale=0.001)
    for layer in quant_layers(model).values():
        layer.weight.data = known.fake_quantize(layer.weight.detach())
    qsurgeon.calibrate(model, [{"input_ids": TOKENS}])
    return {name: one.quantization.static_scales["input"] for name, one in quant_layers(model).items()}


STORAGES = ("master", "packed")


@pytest.mark.parametrize("weight", ["nvfp4", "turned", "square"])
def test_watching_says_what_it_can_of_packed_weights(
    small_model: Maker, recipe: MakeRecipe, adapted: Adapt, step: Step, weight: str
) -> None:
    rules = [{"target": ["layers"], "weight": weight, "input": "turned" if weight == "turned" else "mxfp4"}]
    numbers = {}
    for storage in STORAGES:
        model = adapted(qsurgeon.apply(recipe(storage, formats=OWN, rules=rules), small_model())).train()
        with qsurgeon.Watch(model, every=1) as watch:
            step(model)
            numbers[storage] = watch.step()
    assert numbers["packed"]["qsurgeon/called"] == numbers["packed"]["qsurgeon/active"] == 1
    assert numbers["packed"] == {key: one for key, one in numbers["master"].items() if "weight_sqnr" not in key}
    assert len(numbers["packed"]) == 2 + 7


def test_watching_sees_an_input_that_is_not_rounded(
    small_model: Maker, recipe: MakeRecipe, adapted: Adapt, step: Step
) -> None:
    model = adapted(qsurgeon.apply(recipe(), small_model())).train()
    for layer in quant_layers(model).values():
        vars(layer.quantization)["input_grid"] = None
    with qsurgeon.Watch(model, every=1) as watch:
        step(model)
        assert watch.step()["qsurgeon/active"] < 0.2
