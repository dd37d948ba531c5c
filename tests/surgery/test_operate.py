from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import PlanError, SurgeryError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, quant_layers
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.surgery import operate

W4A4 = Quantization(get_format("mxfp4"), get_format("mxfp4"))
ALL = Recipe(version=1, untie=True, rules=(Rule(target=("**",), weight="mxfp4", input="mxfp4"),))
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(12)[None]

Make = Callable[..., Any]


class OwnLinear(nn.Linear):
    """A subclass may have a forward of its own."""


def quantized(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return what a Linear computes with MXFP4 weight and input."""
    mxfp4 = get_format("mxfp4")
    return nn.functional.linear(mxfp4.fake_quantize(x), mxfp4.fake_quantize(linear.weight.detach()), linear.bias)


# --- wrapping


def test_the_named_modules_are_wrapped_and_counted(tiny_qwen2: Any) -> None:
    assert operate(tiny_qwen2, {UP: W4A4, "model.layers.2.self_attn.q_proj": W4A4}) == 2
    assert list(quant_layers(tiny_qwen2)) == [UP, "model.layers.2.self_attn.q_proj"]


def test_a_wrapped_module_is_the_object_it_was(tiny_qwen2: Any) -> None:
    linear = tiny_qwen2.get_submodule(UP)
    operate(tiny_qwen2, {UP: W4A4})
    assert tiny_qwen2.get_submodule(UP) is linear


def test_no_tensor_is_made_or_renamed(tiny_qwen2: Any) -> None:
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in tiny_qwen2.named_parameters()}
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    after = dict(tiny_qwen2.named_parameters())
    assert {name: id(parameter) for name, parameter in after.items()} == {
        name: one for name, (one, _) in before.items()
    }
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())


def test_a_wrapped_module_computes_in_its_formats(tiny_qwen2: Any) -> None:
    operate(tiny_qwen2, {UP: W4A4})
    linear, x = tiny_qwen2.get_submodule(UP), torch.linspace(-3, 3, 64)[None]
    assert torch.equal(linear(x), quantized(linear, x))


def test_the_model_computes_otherwise_once_it_is_wrapped(tiny_qwen2: Any) -> None:
    before = tiny_qwen2(TOKENS).logits
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    assert not torch.equal(tiny_qwen2(TOKENS).logits, before)


def test_apply_returns_the_model_itself(tiny_qwen2: Any) -> None:
    assert qsurgeon.apply("w4a4-mxfp4", tiny_qwen2) is tiny_qwen2


def test_a_model_without_a_config_can_be_wrapped() -> None:
    model = qsurgeon.apply(ALL, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert list(quant_layers(model)) == ["0", "2"]


def test_inside_peft_the_layer_itself_is_wrapped_and_the_adapter_is_not(tiny_qwen2: Any) -> None:
    model = get_peft_model(tiny_qwen2, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    operate(model, {UP: W4A4})
    assert list(quant_layers(model)) == [f"base_model.model.{UP}.base_layer"]


# --- refusals


def test_a_model_that_is_wrapped_already_is_an_error(tiny_qwen2: Any) -> None:
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    assert str(caught.value) == (
        "the model is wrapped already: 21 QuantLinear modules, the first is model.layers.0.self_attn.q_proj; "
        "apply a recipe to a model as it was loaded from a plain checkpoint"
    )


def test_a_module_that_is_not_there_is_an_error(tiny_qwen2: Any) -> None:
    with pytest.raises(SurgeryError) as caught:
        operate(tiny_qwen2, {UP: W4A4, "model.layers.9.mlp.up_proj": W4A4})
    assert str(caught.value) == "the model has no module model.layers.9.mlp.up_proj (1 of 2 are missing)"


@pytest.mark.parametrize(
    ("module", "kind"),
    [pytest.param(OwnLinear(4, 4), "OwnLinear", id="subclass"), pytest.param(nn.ReLU(), "ReLU", id="other")],
)
def test_what_is_not_a_linear_itself_is_refused(module: nn.Module, kind: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        operate(nn.Sequential(module), {"0": W4A4})
    assert str(caught.value) == f"0 cannot be wrapped: it is a {kind}, not nn.Linear, Conv1D or Experts itself"


def test_a_forward_that_was_replaced_on_the_instance_is_refused(tiny_qwen2: Any) -> None:
    tiny_qwen2.get_submodule(UP).forward = lambda x: x
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    assert str(caught.value) == (
        f"{UP} cannot be wrapped: its forward was replaced on the instance, so that wrapping would have no effect"
    )


def test_nothing_is_wrapped_if_one_module_cannot_be(tiny_qwen2: Any) -> None:
    tiny_qwen2.get_submodule("model.layers.2.mlp.down_proj").forward = lambda x: x
    with pytest.raises(SurgeryError, match="its forward was replaced on the instance"):
        qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    assert quant_layers(tiny_qwen2) == {}


def test_nothing_is_wrapped_if_one_module_is_missing(tiny_qwen2: Any) -> None:
    with pytest.raises(SurgeryError, match=r"^the model has no module nowhere"):
        operate(tiny_qwen2, {UP: W4A4, "nowhere": W4A4})
    assert quant_layers(tiny_qwen2) == {}


def test_a_model_with_one_module_under_two_names_is_wrapped_whole_or_not_at_all() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    with pytest.raises(PlanError, match=r"cannot give b\.0 a weight of its own"):
        qsurgeon.apply(ALL, model)
    with pytest.raises(SurgeryError) as caught:
        operate(model, {"a.0": W4A4, "b.0": W4A4, "c": W4A4})
    assert str(caught.value) == "a.0 and b.0 are one and the same module; exclude one of them"
    assert quant_layers(model) == {}


# --- hooks


def test_accelerates_hook_still_leads_to_quantized_results(tiny_qwen2: Any) -> None:
    linear, x = tiny_qwen2.get_submodule(UP), torch.linspace(-3, 3, 64)[None]
    add_hook_to_module(linear, ModelHook())
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    assert torch.equal(linear(x), quantized(linear, x))


def test_results_are_quantized_after_accelerates_hook_is_removed(tiny_qwen2: Any) -> None:
    linear, x = tiny_qwen2.get_submodule(UP), torch.linspace(-3, 3, 64)[None]
    add_hook_to_module(linear, ModelHook())
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    remove_hook_from_module(linear)
    assert torch.equal(linear(x), quantized(linear, x))


def test_accelerates_hook_may_come_after_wrapping(tiny_qwen2: Any) -> None:
    linear, x = tiny_qwen2.get_submodule(UP), torch.linspace(-3, 3, 64)[None]
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    add_hook_to_module(linear, ModelHook())
    assert torch.equal(linear(x), quantized(linear, x))


def test_torchs_own_hooks_stay(tiny_qwen2: Any) -> None:
    heard: list[nn.Module] = []
    tiny_qwen2.get_submodule(UP).register_forward_hook(lambda module, *_: heard.append(module))
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    tiny_qwen2(TOKENS)
    assert heard == [tiny_qwen2.get_submodule(UP)]


# --- untying


def test_untying_gives_the_head_a_weight_of_its_own(tiny_qwen2: Any) -> None:
    qsurgeon.apply(ALL, tiny_qwen2)
    head, embedding = tiny_qwen2.lm_head.weight, tiny_qwen2.model.embed_tokens.weight
    assert head is not embedding
    assert torch.equal(head, embedding)


def test_untying_leaves_the_embedding_as_it_was(tiny_qwen2: Any) -> None:
    embedding = tiny_qwen2.model.embed_tokens.weight
    before = embedding.detach().clone()
    qsurgeon.apply(ALL, tiny_qwen2)
    assert tiny_qwen2.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)


def test_untying_keeps_what_can_be_trained(tiny_qwen2: Any) -> None:
    tiny_qwen2.requires_grad_(False)
    qsurgeon.apply(ALL, tiny_qwen2)
    assert not tiny_qwen2.lm_head.weight.requires_grad


def test_an_untied_model_is_not_tied_again(tiny_qwen2: Any) -> None:
    qsurgeon.apply(ALL, tiny_qwen2)
    tiny_qwen2.tie_weights()
    assert tiny_qwen2.lm_head.weight is not tiny_qwen2.model.embed_tokens.weight


def test_an_untied_model_lists_no_ties(tiny_qwen2: Any) -> None:
    assert list(tiny_qwen2.all_tied_weights_keys) == ["lm_head.weight"]
    qsurgeon.apply(ALL, tiny_qwen2)
    assert list(tiny_qwen2.all_tied_weights_keys) == []


def test_an_untied_model_is_the_same_after_saving_and_loading(tiny_qwen2: Any, tmp_path: Path) -> None:
    qsurgeon.apply(ALL, tiny_qwen2)
    with torch.no_grad():
        tiny_qwen2.lm_head.weight.mul_(1.5)  # as training would: from here on the two weights differ
    tiny_qwen2.save_pretrained(tmp_path / "untied")
    again = qsurgeon.load(tmp_path / "untied")
    assert len(quant_layers(again)) == 22
    assert torch.equal(again(TOKENS).logits, tiny_qwen2(TOKENS).logits)


def test_a_model_without_ties_may_be_told_to_untie(make_qwen2: Make) -> None:
    model = make_qwen2(tie_word_embeddings=False)
    head = model.lm_head.weight
    qsurgeon.apply(ALL, model)
    assert model.lm_head.weight is head
