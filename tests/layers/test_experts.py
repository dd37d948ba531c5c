"""Fused experts: each computes what one quantized_linear a matrix does, and is saved, opened and streamed so."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import PlanError, SurgeryError
from qsurgeon.layers import quant_layers
from qsurgeon.layers.kinds import kind_of
from qsurgeon.layers.product import quantized_linear
from qsurgeon.recipe import FormatSpec, Recipe, Rule

IDS = torch.arange(14).view(2, 7)
_SIZE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3": hf.Qwen3MoeConfig(**_SIZE, num_experts=4, moe_intermediate_size=48),
    "mixtral": hf.MixtralConfig(**_SIZE, num_local_experts=4),
    "gpt_oss": hf.GptOssConfig(**_SIZE, num_local_experts=4),
    "nemotron": hf.NemotronHConfig(
        **{**_SIZE, "num_hidden_layers": 2}, layers_block_type=["attention", "moe"], n_routed_experts=4,
        moe_intermediate_size=96, moe_shared_expert_intermediate_size=32, n_group=1, topk_group=1,
    ),
}  # fmt: skip

TEXT = "version: 1\nrules: [{target: [experts], types: [Experts], weight: nvfp4, input: nvfp4}]\n"


def made(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for one in model.parameters():  # biases are zeros, and experts alike, as transformers makes them
            one.add_(torch.randn_like(one) * 0.1)
    return model.eval()


def recipe(format: str = "nvfp4", **fields: Any) -> Recipe:
    rule = Rule(target=("experts",), types=("Experts",), weight=format, input=format, name="it")
    return Recipe(version=1, rules=(rule,), **fields)


def reference(layer: Any, x: Tensor, index: Tensor, shares: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Return what a loop over tokens' experts computes, with one quantized_linear a stored matrix."""

    def product(x: Tensor, name: str, expert: int) -> Tensor:
        weight, how = weights[name][expert], layer.quantizations[name]
        weight = weight.T if layer.is_transposed else weight
        bias = getattr(layer, f"{name}_bias")[expert] if layer.has_bias else None
        if name == "gate_up_proj" and layer.is_concatenated:
            return torch.cat([quantized_linear(x, one.contiguous(), None, how) for one in weight.chunk(2)], -1)
        return quantized_linear(x, weight.contiguous(), bias, how)

    out = torch.zeros(*index.shape, x.shape[-1])
    for expert in range(layer.num_experts):
        token, place = torch.where(index == expert)
        if len(token):
            inner = product(x[token], "gate_up_proj" if layer.has_gate else "up_proj", expert)
            inner = layer._apply_gate(inner) if layer.has_gate else layer.act_fn(inner)
            out = out.index_put((token, place), product(inner, "down_proj", expert) * shares[token, place, None])
    return out.sum(1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_each_expert_is_a_quantized_linear(name: str, format: str) -> None:
    model = qsurgeon.apply(recipe(format), made(name))
    layer: Any = next(iter(quant_layers(model).values()))
    x = torch.randn(9, layer.down_proj.shape[1 if not layer.is_transposed else 2], requires_grad=True)
    shares, index = torch.rand(9, 2).topk(2).values.requires_grad_(), torch.rand(9, 3).topk(2).indices
    weights = {key: layer.get_parameter(key) for key in layer.quantizations}
    asked = [x, shares, *weights.values()]
    found, expected = layer(x, index, shares), reference(layer, x, index, shares, weights)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    for got, wanted in zip(
        torch.autograd.grad(found, asked, grad), torch.autograd.grad(expected, asked, grad), strict=True
    ):
        assert torch.allclose(got, wanted, atol=1e-6)
        assert got.abs().sum() > 0
    with qsurgeon.disabled(model):
        assert not torch.allclose(layer(x, index, shares), found, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_opened_and_streamed_to_the_bit(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "plain")
    plain = model(IDS).logits
    qsurgeon.apply(recipe(), model)
    expected = model(IDS).logits
    assert not torch.equal(plain, expected)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "it.yaml"
    file.write_text(TEXT)
    qsurgeon.rewrite(file, tmp_path / "plain", tmp_path / "streamed")
    state = model.state_dict()
    for folder in ("saved", "streamed"):
        again: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert quant_layers(again).keys() == quant_layers(model).keys()
        assert all(torch.equal(one, state[key]) for key, one in again.state_dict().items())
        assert torch.equal(again(IDS).logits, expected)
    files = [tmp_path / folder / "model.safetensors" for folder in ("plain", "saved", "streamed")]
    assert len({frozenset(hf.modeling_utils.load_state_dict(file)) for file in files}) == 1


def test_the_plan_names_both_weights_and_counts_them() -> None:
    model = made("qwen3")
    plan = qsurgeon.plan(recipe(), model)
    assert [step.module.name for step in plan.wrapped][:2] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    share = sum(one.numel() for key, one in model.named_parameters() if ".experts." in key) / model.num_parameters()
    assert plan.summary.startswith(f"{share:.1%} of the parameters are wrapped, in 4 of ")


def test_packed_is_refused_by_the_plan() -> None:
    with pytest.raises(PlanError, match="a Experts, whose weights cannot be packed: say 'storage: master'"):
        qsurgeon.plan(recipe(storage="packed"), made("qwen3"))


def test_blocks_that_mix_gate_and_up_are_refused_and_others_are_not() -> None:
    square = {"square": FormatSpec(like="nvfp4", block=(16, 16))}
    rule = Rule(target=("experts",), types=("Experts",), weight="square", input="nvfp4", name="it")
    asked = Recipe(version=1, rules=(rule,), formats=square)
    with pytest.raises(SurgeryError, match="gates and ups in turn, which a block of square would mix"):
        qsurgeon.apply(asked, made("gpt_oss"))
    assert quant_layers(qsurgeon.apply(asked, made("qwen3")))


def test_experts_that_are_not_decorated_are_no_experts() -> None:
    class Own(type(made("qwen3").model.layers[0].mlp.experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return None

    assert kind_of(Own(CONFIGS["qwen3"])) is None
    config = hf.Llama4TextConfig(**_SIZE, num_local_experts=2, intermediate_size_mlp=64)
    with torch.device("meta"):
        model: nn.Module = hf.Llama4ForCausalLM(config)
    with pytest.raises(PlanError, match="Llama4TextExperts"):
        qsurgeon.plan(recipe(), model)


def test_checkpointing_and_a_second_time_give_the_same_gradients() -> None:
    model = qsurgeon.apply(recipe(), made("qwen3"))
    found = []
    for enable in (lambda: None, model.activation_checkpointing_enable):
        enable()
        model.train().zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append({key: one.grad.clone() for key, one in model.named_parameters()})
    assert all(torch.equal(one, found[1][key]) for key, one in found[0].items())
