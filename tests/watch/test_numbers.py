"""Watch: its numbers beside ones that are computed here from whole tensors."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsurgeon
from qsurgeon.formats import get_format
from qsurgeon.formats.quality import sqnr
from qsurgeon.layers import Quantization, QuantLinear, quant_layers
from qsurgeon.recipe import Recipe

IDS = torch.arange(24).view(2, 12)
ALL = 10**6  # rows: all of them
Train = Callable[[Any], None]
MakeRecipe = Callable[..., Recipe]


@torch.no_grad()
def codes(model: nn.Module) -> dict[str, Tensor]:
    """Return all codes of the whole weights."""
    return {
        name: layer.quantization.weight.as_weight.quantize(layer.weight).codes
        for name, layer in quant_layers(model).items()
        if layer.quantization.weight is not None
    }


@pytest.fixture
def inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """The whole inputs of the latest calls."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in quant_layers(model).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def of_group(numbers: dict[str, Any], group: str) -> list[Any]:
    return [value for name, value in numbers.items() if name.endswith(f".{group}")]


def mean_decibel(each: list[float]) -> float:
    return -10 * math.log10(sum(10 ** (-one / 10) for one in each) / len(each))


def test_of_all_rows_the_numbers_are_those_of_the_whole_tensors(
    model: Any, inputs: dict[str, Tensor], train: Train
) -> None:
    watch = qsurgeon.Watch(model, every=1, rows=ALL)
    before = codes(model)
    train(model)
    after = codes(model)
    numbers = watch.step()

    assert numbers["qsurgeon/called"] == numbers["qsurgeon/active"] == 1.0
    flipped = {name: int((before[name] != after[name]).sum()) for name in before}
    count = sum(one.numel() for one in before.values())
    assert 0.01 < sum(flipped.values()) / count < 0.99
    assert numbers["qsurgeon/flip_rate"] == pytest.approx(sum(flipped.values()) / count)
    groups = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for group in groups:
        sizes = [one.numel() for one in of_group(before, group)]
        assert numbers[f"qsurgeon/flip_rate/{group}"] == pytest.approx(sum(of_group(flipped, group)) / sum(sizes))
        weights = of_group({name: layer.weight.detach() for name, layer in quant_layers(model).items()}, group)
        each = [sqnr(one, get_format("nvfp4").as_weight.fake_quantize(one)) for one in weights]
        assert numbers[f"qsurgeon/weight_sqnr_db/{group}"] == pytest.approx(mean_decibel(each), abs=1e-4)
        each = [sqnr(one, get_format("mxfp4").fake_quantize(one)) for one in of_group(inputs, group)]
        assert numbers[f"qsurgeon/input_sqnr_db/{group}"] == pytest.approx(mean_decibel(each), abs=1e-4)
    assert len(numbers) == 3 + 3 * len(groups)
    watch.close()


def test_flips_are_counted_from_the_last_step_measured(model: Any, train: Train) -> None:
    with qsurgeon.Watch(model, every=2, rows=ALL) as watch:
        start = codes(model)
        train(model)
        assert watch.step() == {}
        train(model)
        middle = codes(model)
        first = watch.step()["qsurgeon/flip_rate"]
        train(model)
        assert watch.step() == {}
        train(model)
        second = watch.step()["qsurgeon/flip_rate"]
    end, count = codes(model), sum(one.numel() for one in start.values())
    assert first == pytest.approx(sum(int((start[name] != middle[name]).sum()) for name in start) / count)
    assert second == pytest.approx(sum(int((middle[name] != end[name]).sum()) for name in start) / count)


def test_without_a_change_nothing_flips(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        model(input_ids=IDS)
        numbers = watch.step()
    assert numbers["qsurgeon/flip_rate"] == 0.0
    assert numbers["qsurgeon/active"] == 1.0


def test_groups_are_what_a_callable_says(model: Any, train: Train) -> None:
    with qsurgeon.Watch(model, every=1, groups=lambda name: name.split(".")[2]) as watch:
        train(model)
        assert {key.split("/")[2] for key in watch.step() if key.count("/") == 2} == {"0", "1"}


def test_a_tensor_without_a_format_has_no_number(
    make_qwen2: Callable[..., Any], train: Train, recipe: MakeRecipe
) -> None:
    model = qsurgeon.apply(recipe(weight="nvfp4"), make_qwen2(num_hidden_layers=1)).train()
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        kinds = {key.split("/")[1] for key in watch.step()}
    assert kinds == {"called", "active", "flip_rate", "weight_sqnr_db"}
    vars(model.model.layers[0].mlp.up_proj)["quantization"] = Quantization(None, get_format("mxfp4"))
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        numbers = watch.step()
    assert numbers["qsurgeon/active"] == 1.0
    assert "qsurgeon/weight_sqnr_db/up_proj" not in numbers
    assert "qsurgeon/flip_rate/up_proj" not in numbers
    assert numbers["qsurgeon/input_sqnr_db/up_proj"] > 10


def test_frozen_weights_do_not_flip_and_all_frozen_have_no_rate(model: Any, train: Train) -> None:
    attention = [layer for name, layer in quant_layers(model).items() if "self_attn" in name]
    for layer in attention:
        layer.weight.requires_grad_(False)
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        numbers = watch.step()
        assert numbers["qsurgeon/flip_rate/q_proj"] == 0.0
        assert 0 < numbers["qsurgeon/flip_rate"] < numbers["qsurgeon/flip_rate/up_proj"]
        for layer in attention:  # what was frozen so far has nothing to be compared with
            layer.weight.requires_grad_(True)
        train(model)
        assert "qsurgeon/flip_rate/q_proj" not in watch.step()
        train(model)
        assert watch.step()["qsurgeon/flip_rate/q_proj"] > 0
        model.requires_grad_(False)
        assert not [key for key in watch.step() if "flip_rate" in key]


def test_a_weight_in_another_format_is_compared_with_nothing(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    with qsurgeon.Watch(model, every=1, groups=lambda name: name) as watch:
        vars(layer)["quantization"] = Quantization(get_format("mxfp8"), None)
        assert "qsurgeon/flip_rate/model.layers.0.mlp.up_proj" not in watch.step()
        assert "qsurgeon/flip_rate/model.layers.0.mlp.up_proj" in watch.step()


def test_nothing_lost_is_infinite_and_one_layer_that_is_lost_shows() -> None:
    first, second = (nn.Linear(32, 32, bias=False) for _ in range(2))
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.copy_(get_format("mxfp4").fake_quantize(layer.weight))
    for layer in (first, second):
        QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), None))
    model = nn.ModuleList([first, second])
    with qsurgeon.Watch(model, every=1, groups=lambda _: "all") as watch:
        assert watch.step()["qsurgeon/weight_sqnr_db/all"] == math.inf
        with torch.no_grad():
            second.weight += 0.01
        lost = sqnr(second.weight.detach(), get_format("mxfp4").fake_quantize(second.weight.detach()))
        rows = ALL
        assert watch.step()["qsurgeon/weight_sqnr_db/all"] < math.inf
    with qsurgeon.Watch(model, every=1, rows=rows, groups=lambda _: "all") as watch:
        assert watch.step()["qsurgeon/weight_sqnr_db/all"] == pytest.approx(lost + 10 * math.log10(2), abs=1e-4)
