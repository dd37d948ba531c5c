"""Watch: which layers compute with rounded operands, and which do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qsurgeon
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.layers import Quantization, QuantLinear, quant_layers
from qsurgeon.recipe import FormatSpec

IDS = torch.arange(24).view(2, 12)
Train = Callable[[Any], None]
Hooks = Callable[[nn.Module], int]
FORMATS = {
    "turned": FormatSpec(like="mxfp4", hadamard=32, seed=7),
    "turned-nvfp4": FormatSpec(like="nvfp4", hadamard=32, seed=7),
    "square": FormatSpec(like="nvfp4", block=[16, 16]),
    "dither": FormatSpec(like="mxfp8", rounding="stochastic"),
    "dither-nvfp4": FormatSpec(like="nvfp4", rounding="stochastic", seed=3),
    "dither-int8": FormatSpec(like="int8", rounding="stochastic"),
}
EVERY_FORMAT = [*CATALOG, *FORMATS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_format_is_seen_to_act_and_seen_to_be_off(
    name: str, dtype: torch.dtype, make_qwen2: Callable[..., Any]
) -> None:
    format = format_named(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer, x = nn.Linear(128, 96).to(dtype), torch.randn(3, 40, 128, dtype=dtype)
    QuantLinear.wrap(layer, Quantization(format, None if format.is_two_dimensional else format))
    model = nn.Sequential(layer)
    with qsurgeon.Watch(model, every=1) as watch, torch.no_grad():
        model(x)
        assert watch.step()["qsurgeon/active"] == 1.0
        vars(layer)["forward"] = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
        model(x)
        numbers = watch.step()
    assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 0.0)


def format_named(name: str) -> Format:
    if name in CATALOG:
        return get_format(name)
    spec = FORMATS[name]
    fields = {key: value for key, value in spec.model_dump(exclude_none=True).items() if key != "like"}
    return get_format(spec.like).with_fields(name, **fields)


def test_layers_that_are_not_called_or_have_no_format_are_not_active(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        assert (watch.step()["qsurgeon/called"], watch.step()["qsurgeon/active"]) == (0.0, 0.0)
        model.model.layers[0](torch.randn(1, 4, 64), position_embeddings=(torch.ones(1, 4, 16), torch.zeros(1, 4, 16)))
        numbers = watch.step()
        assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (0.5, 0.5)
        for layer in quant_layers(model).values():
            vars(layer)["quantization"] = Quantization(None, None)
        model(input_ids=IDS)
        assert watch.step() == {"qsurgeon/called": 1.0, "qsurgeon/active": 0.0}


def test_a_layer_that_became_a_linear_again_is_not_active(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        for layer in quant_layers(model).values():
            layer.__class__ = nn.Linear  # type: ignore[assignment]
        model(input_ids=IDS)
        numbers = watch.step()
    assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 0.0)


def test_a_call_that_raised_is_not_the_one_that_counts() -> None:
    layer = nn.Linear(32, 32)
    QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), get_format("mxfp4")))
    with qsurgeon.Watch(nn.Sequential(layer), every=1) as watch:
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            layer(torch.randn(4, 31))
        layer(input=torch.randn(4, 32))
        layer(torch.randn(0, 32))
        assert watch.step()["qsurgeon/active"] == 1.0


def test_an_evaluation_is_watched_by_itself(model: Any, train: Train, hooks: Hooks) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        with watch.evaluation() as numbers:
            with torch.no_grad():
                model(input_ids=IDS)
            assert numbers == {}
        assert numbers == {"qsurgeon/called": 1.0, "qsurgeon/active": 1.0}
        with watch.evaluation() as numbers:
            pass
        assert numbers == {"qsurgeon/called": 0.0, "qsurgeon/active": 0.0}
        assert watch.step()["qsurgeon/active"] == 1.0
        with watch.evaluation():
            model(input_ids=IDS)
        assert watch.step()["qsurgeon/called"] == 0.0
    assert hooks(model) == 0


def test_a_teacher_or_a_rollout_that_comes_first_is_not_what_is_judged(model: Any, train: Train) -> None:
    ids = torch.arange(1, 9).reshape(1, 8)
    with qsurgeon.Watch(model, every=1) as watch:
        for _ in range(2):
            with qsurgeon.disabled(model), torch.no_grad():
                model(input_ids=ids)
            train(model)
            numbers = watch.step()
            assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 1.0)
        with torch.no_grad():
            model(input_ids=ids)
        with qsurgeon.disabled(model):
            train(model)
        assert watch.step()["qsurgeon/active"] == 0.0
