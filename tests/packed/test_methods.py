"""Every adapter method that peft has, on wrapped layers: it trains and leaves the base as it is, or it is refused."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from versions import at_least

import qsurgeon
from qsurgeon.errors import CodesError, SurgeryError
from qsurgeon.layers import PackedLinear, packed_layers, quant_layers
from qsurgeon.recipe import Recipe
from qsurgeon.surgery import inventory

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",  # FRoD's own
    "ignore:.*(adapter_layers|num_virtual_tokens).*:UserWarning",
)

Q = "model.layers.0.self_attn.q_proj"
TOKENS = torch.arange(1, 13).reshape(2, 6)
KINDS = [kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING]
# What a method needs that it has no default for, or whose default does not divide the width of a small model.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 8},
    "OSF": {"effective_rank": 4},
    "POLY": {"r": 4, "n_tasks": 1, "n_skills": 1},
    "RANDLORA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 8, "r": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 10},
}
PROMPTS = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
# Made of models and of adapters that lie somewhere; and CPT, whose two tokens take no step in one. None has a layer of
# its own on a Linear.
SHADOWS = {"CPT", "SHADOW", "XLORA"}
REFUSED = {
    "master": {"FROD", "GLORA", "HRA", "SHIRA", "SUPERTUNING"}
    | (set() if at_least("peft", "0.21") else {"ADAMSS", "OSF"}),
    "packed": {
        *("FROD", "GLORA", "HRA", "SHIRA", "SUPERTUNING"),
        *("ADAMSS", "DEFT", "DELORA", "HIRA", "LN_TUNING", "LOHA", "LOKR", "OSF", "PEANUT", "PSOFT", "TINYLORA"),
    },
}

Maker = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep BOFT from building its CUDA extension."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)


def config_of(kind: str) -> Any:
    make = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    names = {field.name for field in fields(make)}
    given: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    given |= {"target_modules": ["q_proj"]} if "target_modules" in names and kind != "ADAPTION_PROMPT" else {}
    given |= {"num_virtual_tokens": 2} if kind in PROMPTS else {}
    given |= {"num_tasks": 1} if kind == "MULTITASK_PROMPT_TUNING" else {}
    return make(**{**given, **NEEDS.get(kind, {})})


def llama() -> Any:
    """Return a model of the kind that adaption prompts are for."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=96, **size))  # type: ignore[arg-type]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def base_of(model: Any) -> dict[str, Tensor]:
    """Return what the wrapped layers hold, by their names in the plain model."""
    return {f"{name}.{key}": one.detach().clone() for name, layer in named(model) for key, one in held(layer)}


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the wrapped layers of the model itself by their names in the plain model."""
    names = {module.path: module.name for module in inventory(model)}
    found = [(names[path], one) for path, one in quant_layers(model).items() if path in names]
    return [(name.replace("self_attn.model.", "self_attn."), one) for name, one in found]  # as adaption prompts wrap


def held(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, one) for key, one in layer.named_parameters(recurse=False) if key != "bias"]


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key, value in one.items() if not torch.equal(value, other[key])]


# What peft 0.21 hands to transformers 5.24 for a prefix.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("storage", ["master", "packed"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - SHADOWS))
def test_a_method_trains_and_leaves_the_base_or_is_refused_and_leaves_all(
    make_qwen2: Maker, recipe: Callable[..., Recipe], kind: str, storage: str
) -> None:
    model = llama() if kind == "ADAPTION_PROMPT" else make_qwen2(num_hidden_layers=1, tie_word_embeddings=False)
    rules = [{"target": ["layers"], "weight": "mxfp4", "input": "mxfp4"}]
    model = qsurgeon.apply(recipe(storage, rules=rules), model)
    before, base, modules = state(model), base_of(model), list(model.named_modules())
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    trains = {name: one.requires_grad for name, one in model.named_parameters()}
    if kind in REFUSED[storage]:
        with pytest.raises((SurgeryError, CodesError), match="q_proj"):
            peft.get_peft_model(model, config_of(kind))
        assert differing(state(model), before) == []
        assert list(model.named_modules()) == modules
        assert {name: one.requires_grad for name, one in model.named_parameters()} == trains
        assert hooks == [len(one._forward_pre_hooks) + len(one._forward_hooks) for one in model.modules()]
        assert peft.get_peft_model(model, config_of("LORA"))(input_ids=TOKENS, labels=TOKENS).loss > 0
        return
    adapted = peft.get_peft_model(model, config_of(kind)).train()
    calls = set[str]()
    for name, layer in quant_layers(adapted).items():
        layer.register_forward_hook(lambda *_, name=name: calls.add(name))
    passed_by = ".base_layer" if kind == "LN_TUNING" else "no layer"  # it calls a copy, which is wrapped too
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)}
    learns(adapted, tasks if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {})
    assert calls == {name for name in quant_layers(adapted) if not name.endswith(passed_by)}
    if storage == "packed":
        assert differing(base_of(adapted), base) == []
        assert {type(layer) for _, layer in named(adapted)} == {PackedLinear}


def learns(adapted: Any, given: dict[str, Any]) -> None:
    """Take one step, and assert that it trains something."""
    trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    assert trained
    before = {name: one.detach().clone() for name, one in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    adapted(input_ids=TOKENS, labels=TOKENS, **given).loss.backward()
    optimizer.step()
    assert [name for name, value in before.items() if not torch.equal(trained[name], value)]


# --- what trains a packed layer whole


@pytest.mark.parametrize("saved", ["q_proj", "self_attn", f"{Q}"])
def test_modules_to_save_that_are_packed_are_refused(
    small_model: Maker, recipe: Callable[..., Recipe], saved: str
) -> None:
    model = qsurgeon.apply(recipe(), small_model())
    modules = list(model.named_modules())
    with pytest.raises(SurgeryError) as caught:
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], modules_to_save=[saved]))
    assert str(caught.value) == (
        f"{Q} cannot be trained as modules_to_save ({saved}) says: its weight is packed. Exclude it in the recipe, "
        "use storage: master, or leave it out of modules_to_save"
    )
    assert list(model.named_modules()) == modules


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2", "mica"])
def test_an_initialization_that_reads_the_weight_is_refused_by_name(
    small_model: Maker, recipe: Callable[..., Recipe], init: Any
) -> None:
    model = qsurgeon.apply(recipe(), small_model())
    before, modules = state(model), list(model.named_modules())
    with pytest.raises(SurgeryError, match=f"^{Q} cannot have this adapter: lora "):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    assert differing(state(model), before) == []
    assert list(model.named_modules()) == modules


def test_the_refusals_say_why(small_model: Maker, recipe: Callable[..., Recipe]) -> None:
    model = qsurgeon.apply(recipe(), small_model())
    with pytest.raises(SurgeryError) as caught:
        peft.get_peft_model(model, peft.DeloraConfig(target_modules=["q_proj"]))
    assert str(caught.value) == (
        f"{Q} cannot have this adapter: delora computes with the weight of what it sits on, which is packed"
    )


def test_a_method_that_fails_on_codes_in_its_own_words_is_named(
    small_model: Maker, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"no kernel for {self.get_base_layer().weight.element_size()} byte")

    model = qsurgeon.apply(recipe(), small_model())
    monkeypatch.setattr(peft.tuners.lora.layer.LoraLayer, "update_layer", fail)
    with pytest.raises(SurgeryError) as caught:
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert str(caught.value) == (
        f"{Q} cannot have this adapter: lora fails on it (RuntimeError: no kernel for 1 byte). Its weight is packed, "
        "in torch.uint8: use a method and an initialization that do not read the weight, or storage: master"
    )


def test_what_fails_for_another_reason_is_taken_back_too(small_model: Maker, recipe: Callable[..., Recipe]) -> None:
    model = qsurgeon.apply(recipe("master"), small_model())
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match="block size"):
        peft.get_peft_model(model, peft.C3AConfig(target_modules=["q_proj"], block_size=7))
    assert list(model.named_modules()) == modules
    assert all(one.requires_grad for one in model.parameters())


# --- what is counted


def test_parameters_are_counted_as_values(small_model: Maker, recipe: Callable[..., Recipe]) -> None:
    plain = small_model().num_parameters()
    model = qsurgeon.apply(recipe(), small_model())
    assert model.num_parameters() == plain
    without = model.num_parameters(exclude_embeddings=True)
    assert without == small_model().num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trained, total = adapted.get_nb_trainable_parameters()
    assert total == plain + trained
    assert adapted.get_model_status().total_params == total
    assert len(packed_layers(adapted)) == 11


def test_a_mixed_adapter_counts_values_too(small_model: Maker, recipe: Callable[..., Recipe]) -> None:
    model = qsurgeon.apply(recipe(), small_model())
    plain = small_model().num_parameters()
    mixed = peft.PeftMixedModel(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), "one")
    trained, total = mixed.get_nb_trainable_parameters()
    assert total == plain + trained
