"""The bugs that cost the seed experiments weeks, B1 to B13: each is a test that a correct wrapper passes.

Left out: B14 and later, which are about schedules, engines and noise.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qsurgeon
from qsurgeon.errors import GradientError, NothingWrappedError, PlanError, RecipeError, SurgeryError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear, quant_layers
from qsurgeon.recipe import Recipe

Maker = Callable[..., Any]
MXFP4 = get_format("mxfp4")
TOKENS = torch.arange(1, 13).reshape(2, 6)


@pytest.fixture
def small_model(make_qwen2: Maker) -> Maker:
    """Return a maker of Qwen2 models of some layers, whose output head is its own."""
    return lambda layers=4: make_qwen2(num_hidden_layers=layers, tie_word_embeddings=False)


def with_lora(model: Any) -> Any:
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what reaches lora_A
            nn.init.normal_(parameter, std=0.02)
    return lora


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=TOKENS, labels=TOKENS).loss
    return loss


def recipe(**rule: Any) -> Recipe:
    return Recipe.model_validate({"version": 1, "rules": [{"target": ["layers"], "weight": "mxfp4", **rule}]})


def fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    QuantLinear.wrap(layer, Quantization(MXFP4, MXFP4))
    return layer


@pytest.fixture
def unchanged(linear: nn.Linear) -> Iterator[nn.Linear]:
    """The layer; afterwards its weight must be what and where it was, to the bit."""
    weight, address = linear.weight.detach().clone(), linear.weight.data_ptr()
    yield linear
    assert linear.weight.data_ptr() == address
    assert torch.equal(linear.weight, weight)


def test_b1_every_adapter_every_norm_and_the_input_get_a_gradient(small_model: Maker) -> None:
    model = with_lora(qsurgeon.apply(recipe(input="mxfp4"), small_model()))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_()
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=TOKENS).loss.backward()
    watched = {name: one.grad for name, one in model.named_parameters() if "lora_" in name or "norm" in name}
    assert len(watched) == 2 * 28 + 9
    assert [name for name, grad in watched.items() if grad is None or not grad.any()] == []
    assert embedded.grad is not None
    assert embedded.grad.any()


def test_b1_without_the_straight_through_gradient_twenty_adapters_of_four_layers_learn_nothing(
    small_model: Maker,
) -> None:
    model = qsurgeon.apply(recipe(input="mxfp4", gradient="none"), small_model(4))
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    # The seed quantized what enters the whole wrapper, adapters included.
    for module in lora.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.register_forward_pre_hook(lambda _, args: (MXFP4.fake_quantize(args[0].detach()),))
    loss_of(lora).backward()
    dead = [n for n, one in lora.named_parameters() if "lora_B" in n and (one.grad is None or not one.grad.any())]
    # q, k, v, gate and up of each layer; o and down live through the residual stream.
    assert sorted({name.split(".")[-4] for name in dead}) == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert len(dead) == 20


def test_b2_rounding_alone_is_refused_under_autograd() -> None:
    with pytest.raises(GradientError, match="fake quantization has no gradient of its own"):
        MXFP4.fake_quantize(torch.ones(2, 32, requires_grad=True))


def test_b3_the_gradient_of_the_input_is_that_of_the_rounded_weight(unchanged: nn.Linear) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 48)
    unchanged(x).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ MXFP4.fake_quantize(unchanged.weight.detach()))
    assert not torch.equal(x.grad, grad @ unchanged.weight)


def test_b4_a_forward_without_a_backward_leaves_the_weight(unchanged: nn.Linear) -> None:
    with torch.no_grad():
        unchanged(torch.randn(5, 64))
    unchanged.eval()(torch.randn(5, 64))
    unchanged.train()(torch.randn(5, 64))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_b4_checkpointing_leaves_the_weight_and_changes_no_gradient(unchanged: nn.Linear, reentrant: bool) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    unchanged(x).square().sum().backward()
    assert unchanged.weight.grad is not None
    expected = unchanged.weight.grad.clone()
    unchanged.weight.grad = None
    checkpoint(unchanged, y, use_reentrant=reentrant).square().sum().backward()
    found: Any = unchanged.weight.grad
    assert torch.equal(found, expected)
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_b4_two_forwards_then_one_backward_leave_the_weight(unchanged: nn.Linear) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    (unchanged(x) + unchanged(2 * x)).sum().backward()


def test_b4_an_error_in_the_forward_leaves_the_weight(unchanged: nn.Linear) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        unchanged(torch.randn(5, 32))


def test_b4_steps_smaller_than_the_grid_add_up_in_the_master_weight(linear: nn.Linear) -> None:
    before = linear.weight.detach().clone()
    codes = MXFP4.quantize(before).codes
    step = 1e-4
    optimizer = torch.optim.SGD([linear.weight], lr=step)
    for _ in range(50):
        linear.weight.grad = torch.ones_like(linear.weight)
        optimizer.step()
        with torch.no_grad():
            linear(torch.randn(2, 64))
    assert torch.allclose(before - linear.weight, torch.full_like(before, 50 * step), atol=1e-6)
    assert (MXFP4.quantize(linear.weight.detach()).codes != codes).float().mean() > 0.02


def test_b5_an_adapter_before_a_frozen_base_gets_the_gradient_of_the_explicit_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 48, bias=False))
    lora: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    wrapped = [one for one in lora.modules() if type(one) is nn.Linear and one.weight.shape == (48, 64)][0]  # noqa: RUF015
    QuantLinear.wrap(wrapped, Quantization(MXFP4, MXFP4))
    wrapped.requires_grad_(False)
    x, grad = torch.randn(5, 64), torch.randn(5, 48)
    lora(x).backward(grad)
    layer = lora.base_model.model[0]
    upstream = grad @ MXFP4.fake_quantize(wrapped.weight.detach())
    expected = layer.scaling["default"] * upstream.T @ layer.lora_A["default"](x)
    assert torch.allclose(layer.lora_B["default"].weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_b6_the_inputs_of_the_product_are_rounded_and_its_output_and_bias_are_not(linear: nn.Linear) -> None:
    x = torch.randn(5, 64)
    y = linear(x)
    qx, qw = MXFP4.fake_quantize(x), MXFP4.fake_quantize(linear.weight.detach())
    assert torch.equal(y, nn.functional.linear(qx, qw, linear.bias))
    assert not torch.equal(y, MXFP4.fake_quantize(y.detach()))
    assert not torch.equal(linear.bias, MXFP4.fake_quantize(linear.bias.detach()))


@pytest.mark.parametrize("adapters_first", [True, False], ids=["lora-first", "recipe-first"])
def test_b7_each_linear_is_wrapped_once_with_adapters_before_or_after(small_model: Maker, adapters_first: bool) -> None:
    model = small_model(4)
    if adapters_first:
        model = with_lora(model)
    qsurgeon.apply(recipe(input="mxfp4"), model)
    if not adapters_first:
        model = with_lora(model)
    wrapped = quant_layers(model)
    assert len(wrapped) == 28
    assert all(name.endswith(".base_layer") for name in wrapped)
    assert [
        name for name, one in wrapped.items() if any(isinstance(child, QuantLinear) for child in one.children())
    ] == []


def test_b7_a_second_recipe_is_an_error(small_model: Maker) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", small_model(2))
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-nvfp4", model)
    assert str(caught.value) == (
        "the model is wrapped already: 14 QuantLinear modules, the first is model.layers.0.self_attn.q_proj; "
        "apply a recipe to a model as it was loaded from a plain checkpoint"
    )


def test_b8_adapters_are_never_wrapped_and_the_report_says_why(small_model: Maker) -> None:
    model = with_lora(small_model(2))
    qsurgeon.apply(Recipe.model_validate({"version": 1, "rules": [{"target": ["**"], "weight": "mxfp4"}]}), model)
    assert [name for name in quant_layers(model) if "lora" in name] == []
    rows = {row.module: row.why for row in qsurgeon.inspect(model).rows}
    assert rows["model.layers.0.mlp.up_proj.lora_A.default"] == "adapter of peft: stays in full precision"


def test_b8_an_exclude_list_under_a_misspelt_key_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("version: 1\nrules:\n  - target: [layers]\n    exclude_modules: [lm_head]\n    weight: mxfp4\n")
    with pytest.raises(RecipeError) as caught:
        qsurgeon.load_recipe(file)
    assert str(caught.value) == (
        f"{file}:4:5: unknown key 'exclude_modules'; here it is called 'exclude'\n"
        "        exclude_modules: [lm_head]\n"
        "        ^^^^^^^^^^^^^^^"
    )


def test_b9_an_adapter_sees_the_input_as_it_is(small_model: Maker) -> None:
    model = with_lora(qsurgeon.apply(recipe(input="mxfp4"), small_model(1)))
    seen: list[Tensor] = []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.lora_A["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss_of(model)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], MXFP4.fake_quantize(seen[1].detach()))


def test_b10_the_shipped_recipes_leave_the_output_head_and_the_embedding(small_model: Maker) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", small_model(2))
    rows = {row.module: row.why for row in qsurgeon.inspect(model).rows}
    assert rows["lm_head"] == "excluded by '<output_head>?' of rule 'linears'"
    assert rows["model.embed_tokens"] == "not a Linear"


def test_b10_a_rule_that_reaches_a_tied_weight_is_an_error(make_qwen2: Maker) -> None:
    model = make_qwen2(tie_word_embeddings=True)
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(
            Recipe.model_validate({"version": 1, "rules": [{"target": ["lm_head"], "weight": "mxfp4"}]}), model
        )
    assert str(caught.value) == (
        "rules[0].target: rule 'rule 1' reaches lm_head, whose weight is tied to model.embed_tokens: "
        "exclude lm_head, or say 'untie: true'"
    )


def test_b11_excluding_layer_1_leaves_layers_10_to_19_in(small_model: Maker) -> None:
    model = small_model(12)
    qsurgeon.apply(recipe(exclude=["layers.1"]), model)
    wrapped = {int(name.split(".")[2]) for name in quant_layers(model)}
    assert wrapped == {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}


def test_b12_a_saved_model_carries_its_recipe_and_says_what_it_was_evaluated_with(
    small_model: Maker, tmp_path: Path
) -> None:
    model = qsurgeon.apply("w4a4-nvfp4", small_model(2))
    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path)
    assert qsurgeon.inspect(again).summary == (
        "85.4% of the parameters are wrapped, "
        "in 14 of 15 Linear modules (7.5% are in no Linear, most in Embedding): "
        "14 with weight nvfp4, input nvfp4"
    )
    assert torch.equal(loss_of(again), loss_of(model.eval()))


def test_b12_a_model_that_would_be_evaluated_in_full_precision_is_refused(small_model: Maker, tmp_path: Path) -> None:
    small_model(1).save_pretrained(tmp_path)
    with pytest.raises(NothingWrappedError) as caught:
        qsurgeon.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no module is wrapped; its config.json has no quantization_config of qsurgeon. "
        f"Write one with: qsurgeon apply RECIPE --model {tmp_path} --output FOLDER"
    )


def test_b13_the_weights_that_were_saved_are_those_that_compute_and_the_wrapping_shows(
    small_model: Maker, tmp_path: Path
) -> None:
    plain = small_model(2).eval()
    model = qsurgeon.apply("w4a4-mxfp4", copy.deepcopy(plain))
    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path)
    assert fingerprint(dict(again.named_parameters())) == fingerprint(dict(plain.named_parameters()))
    assert not torch.equal(again(TOKENS).logits, plain(TOKENS).logits)
