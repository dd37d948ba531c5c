"""Static tensor scales: found on examples, kept in the record, saved and loaded with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qsurgeon
from qsurgeon.errors import CalibrationError, FormatError
from qsurgeon.layers import quant_layers
from qsurgeon.recipe import FormatSpec, Recipe, Rule

STATIC = FormatSpec(like="nvfp4", tensor_scale="static")
ROTATED = FormatSpec(like="nvfp4", tensor_scale="static", hadamard=16, seed=3)
IDS = torch.arange(24).view(2, 12)


def recipe(**rule: Any) -> Recipe:
    formats = {"static": STATIC, "rotated": ROTATED}
    return Recipe(version=1, formats=formats, rules=(Rule(target=("layers",), **rule),))


@pytest.fixture
def model(make_qwen2: Callable[..., Any]) -> Any:
    return qsurgeon.apply(recipe(weight="nvfp4", input="static"), make_qwen2(num_hidden_layers=2))


def inputs_of(model: Any, *batches: Tensor) -> dict[str, float]:
    """Return the largest magnitude of each wrapped layer's input."""
    seen: dict[str, float] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, path=path: seen.update({path: max(seen.get(path, 0.0), args[0].abs().max().item())})
        )
        for path, layer in quant_layers(model).items()
    ]
    for ids in batches:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_without_a_number_the_model_does_not_run(model: Any) -> None:
    with pytest.raises(FormatError, match="static tensor scale and no number for it: calibrate the model"):
        model(input_ids=IDS)


def test_the_first_layers_number_is_its_inputs_largest_magnitude_over_the_formats(model: Any) -> None:
    # The input of the first projections comes from the embedding: no other layer's rounding changes it.
    qsurgeon.calibrate(model, [{"input_ids": IDS}, {"input_ids": IDS + 40}])
    seen = inputs_of(model, IDS, IDS + 40)
    path = "model.layers.0.self_attn.q_proj"
    assert quant_layers(model)[path].quantization.static_scales == {"input": pytest.approx(seen[path] / 2688)}
    assert len({tuple(layer.quantization.static_scales.items()) for layer in quant_layers(model).values()}) > 4


def test_numbers_are_saved_and_loaded_and_give_the_same_logits(model: Any, tmp_path: Path) -> None:
    qsurgeon.calibrate(model, [{"input_ids": IDS}])
    model.save_pretrained(tmp_path)
    scales = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["static_scales"]
    assert len(scales) == 14
    loaded = qsurgeon.load(tmp_path)
    for path, layer in quant_layers(loaded).items():
        assert layer.quantization == quant_layers(model)[path].quantization
        assert scales[path] == layer.quantization.static_scales
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_token_is_rounded_alike_alone_and_in_a_batch(model: Any) -> None:
    qsurgeon.calibrate(model, [{"input_ids": IDS}])
    layer = quant_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(4, 64)
    format = layer.quantization.input
    assert format is not None
    together = format.as_input.fake_quantize(x)
    x[1:] *= 100
    assert torch.equal(format.as_input.fake_quantize(x)[0], together[0])


def test_weights_may_be_static_too_and_are_rounded_as_with_their_own_scale(make_qwen2: Callable[..., Any]) -> None:
    static = qsurgeon.apply(recipe(weight="static"), make_qwen2(num_hidden_layers=2))
    qsurgeon.calibrate(static, [{"input_ids": IDS}])
    dynamic = qsurgeon.apply(recipe(weight="nvfp4"), make_qwen2(num_hidden_layers=2))
    assert torch.equal(static(input_ids=IDS).logits, dynamic(input_ids=IDS).logits)


def test_the_number_is_of_rotated_values_where_the_format_rotates(make_qwen2: Callable[..., Any]) -> None:
    model = qsurgeon.apply(recipe(weight="rotated", input="rotated"), make_qwen2(num_hidden_layers=1))
    qsurgeon.calibrate(model, [{"input_ids": IDS}])
    layer = quant_layers(model)["model.layers.0.self_attn.q_proj"]
    rotation = layer.quantization.rotation
    assert rotation is not None
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS))
    expected = {"weight": rotation(layer.weight.detach()), "input": rotation(x.detach())}
    assert layer.quantization.static_scales == {
        role: pytest.approx(value.abs().max().item() / 2688) for role, value in expected.items()
    }


def test_a_model_without_static_scales_is_told(make_qwen2: Callable[..., Any]) -> None:
    model = qsurgeon.apply("w4a4-nvfp4", make_qwen2(tie_word_embeddings=False))
    with pytest.raises(CalibrationError) as caught:
        qsurgeon.calibrate(model, [{"input_ids": IDS}])
    assert str(caught.value) == ("no module has a static tensor scale; say tensor_scale: static in a recipe's formats")


def test_no_batch_leaves_the_model_as_it_was_and_names_the_first_module(model: Any) -> None:
    before = {path: layer.quantization for path, layer in quant_layers(model).items()}
    with pytest.raises(CalibrationError) as caught:
        qsurgeon.calibrate(model, [])
    assert str(caught.value) == (
        "no batch reached model.layers.0.self_attn.q_proj: its input's static scale has no number"
    )
    assert {path: layer.quantization for path, layer in quant_layers(model).items()} == before


def test_values_that_are_not_finite_are_named(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(CalibrationError) as caught:
        qsurgeon.calibrate(model, [{"input_ids": IDS}])
    assert str(caught.value) == "the input of model.layers.1.self_attn.q_proj has values that are not finite"


def test_calibrating_leaves_modes_and_running_statistics_as_they_were(model: Any) -> None:
    norm = torch.nn.BatchNorm1d(64)
    model.extra = norm

    def see(*_: Any) -> None:
        norm(torch.randn(8, 64))

    model.register_forward_pre_hook(see)
    model.train()
    model.model.eval()
    qsurgeon.calibrate(model, [{"input_ids": IDS}])
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 0
    assert (model.training, norm.training, model.model.training) == (True, True, False)


def test_an_input_may_be_given_by_its_name(model: Any) -> None:
    layer = quant_layers(model)["model.layers.0.self_attn.q_proj"]

    class Caller(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return self.layer(input=x)

    qsurgeon.calibrate(Caller(), [{"x": torch.full((2, 64), 3.0)}])
    assert layer.quantization.static_scales == {"input": pytest.approx(3 / 2688)}


def test_processes_agree_on_the_largest_and_none_hides_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    from qsurgeon import calibration

    def gather(into: list[Any], mine: dict[str, float]) -> None:
        into[:] = [mine, {"b": 5.0, "a": 1.0, "n": float("nan")}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    largest = {"a": torch.tensor(2.0), "n": torch.tensor(1.0)}
    calibration._agree(largest)
    assert (largest["a"].item(), largest["b"].item()) == (2.0, 5.0)
    assert largest["n"].isnan()


def test_an_exception_of_the_model_leaves_no_hook_and_no_other_format(model: Any) -> None:
    before = {path: layer.quantization for path, layer in quant_layers(model).items()}
    with pytest.raises(ValueError, match="input_ids"):
        qsurgeon.calibrate(model, [{}])
    for path, layer in quant_layers(model).items():
        assert layer.quantization == before[path]
        assert not layer._forward_pre_hooks
