"""Adapters of peft on packed weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from versions import adapter_config, part, recompute

import qsurgeon
from qsurgeon.errors import SurgeryError
from qsurgeon.layers import packed_layers, quant_layers
from qsurgeon.recipe import Recipe

Q = "model.layers.0.self_attn.q_proj"

Maker = Callable[..., Any]
MakeRecipe = Callable[..., Recipe]
Logits = Callable[[Any], Tensor]
Different = Callable[[nn.Module, nn.Module], list[str]]
Adapt = Callable[..., Any]
Move = Callable[[Any], Any]
Step = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


def assert_equal_steps(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert [name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])] == []
    assert all(grad.abs().max() > 0 for grad in one[1].values())


@pytest.mark.parametrize("before", [True, False], ids=["adapter first", "surgery first"])
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32", "bf16"])
def test_lora_on_packed_is_lora_on_the_master_to_the_bit(
    small_model: Maker, recipe: MakeRecipe, adapted: Adapt, step: Step, before: bool, autocast: bool
) -> None:
    def make(storage: str) -> Any:
        model = small_model().bfloat16()
        if before:
            return qsurgeon.apply(recipe(storage), adapted(model, autocast))
        return adapted(qsurgeon.apply(recipe(storage), model), autocast)

    packed, master = make("packed"), make("master")
    adapters = [one for name, one in packed.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 14
    assert {one.dtype for one in adapters} == {torch.float32 if autocast else torch.bfloat16}
    assert_equal_steps(step(packed), step(master))


def test_an_adapter_reloads_on_its_packed_base_to_the_bit(
    folder: Path, logits: Logits, adapted: Adapt, tmp_path: Path
) -> None:
    model = adapted(qsurgeon.load(folder))
    model.save_pretrained(tmp_path)
    for again in (
        peft.PeftModel.from_pretrained(qsurgeon.load(folder), tmp_path),
        qsurgeon.load(tmp_path),
        hf.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert len(packed_layers(again)) == 11
        assert torch.equal(logits(again), logits(model))


def test_the_base_of_a_trained_adapter_is_saved_as_it_was(
    folder: Path, different: Different, adapted: Adapt, step: Step, tmp_path: Path
) -> None:
    model = adapted(qsurgeon.load(folder))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    step(model)
    optimizer.step()
    model.unload().save_pretrained(tmp_path)
    assert different(qsurgeon.load(tmp_path), qsurgeon.load(folder)) == []


@pytest.mark.parametrize("weight", ["mxfp4", "mxfp8", "int8"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_peft_does_not_merge_into_codes(
    small_model: Maker, recipe: Maker, adapted: Maker, logits: Maker, weight: str, safe_merge: bool
) -> None:
    rule = {"target": ["layers"], "weight": weight, "input": "mxfp8"}
    model = adapted(qsurgeon.apply(recipe(rules=[rule]), small_model()))
    before, says = logits(model), f"{Q}.base_layer is packed, and peft would add 'default' to its codes: save the "
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(SurgeryError, match=says):
            merge(safe_merge=safe_merge)
    assert torch.equal(logits(model), before)
    assert logits(model.unload()).isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_recomputing_changes_no_bit(folder: Path, adapted: Adapt, step: Step, reentrant: bool) -> None:
    expected = step(adapted(qsurgeon.load(folder)).train())
    model = adapted(qsurgeon.load(folder)).train()
    model.enable_input_require_grads()
    recompute(model.get_base_model(), use_reentrant=reentrant)
    assert_equal_steps(step(model), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler and traces
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.one_version)])
def test_a_compiled_packed_model_trains_its_adapter_without_a_break(
    folder: Path, adapted: Adapt, step: Step, backend: str
) -> None:
    expected = step(adapted(qsurgeon.load(folder)))
    model = adapted(qsurgeon.load(folder))
    torch._dynamo.reset()
    found = step(torch.compile(model, backend=backend, fullgraph=True))
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in found[1].items()}
    assert grads.keys() == expected[1].keys()
    if backend == "aot_eager":
        assert_equal_steps((found[0], grads), expected)
    # inductor fuses sums: a value on the edge between two numbers of a format may move by one.
    assert (found[0] - expected[0]).norm() < 1e-2 * expected[0].norm()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("LoraConfig", {"use_dora": True}, "DoRA) computes with"),
    "kasa": ("LoraConfig", {"kasa_config": part("KasaConfig")}, "KaSA) replaces"),
    "target_parameters": (
        "LoraConfig",
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        "LoRA's target_parameters) adds to",
    ),
    "hira": ("HiraConfig", {"r": 4}, "Linear of peft's hira) computes with"),
    "loha": ("LoHaConfig", {"r": 4}, "Linear of peft's loha) computes with"),
    "lokr": ("LoKrConfig", {"r": 4}, "Linear of peft's lokr) computes with"),
    "peanut": ("PeanutConfig", {}, "Linear of peft's peanut) computes with"),
}


def refused(name: str) -> tuple[Any, str]:
    """Return a config of peft that is refused on packed weights, and how the error begins."""
    kind, fields, how = REFUSED[name]
    return adapter_config(kind, **{"target_modules": ["q_proj"], **fields}), how


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_takes_codes_for_values_is_refused_by_surgery(
    small_model: Maker, recipe: MakeRecipe, name: str
) -> None:
    config, how = refused(name)
    model = peft.get_peft_model(small_model(), config)
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply(recipe(), model)
    assert str(caught.value) == f"{Q} cannot be wrapped: the adapter on it ({how} its weight, which is packed"
    assert quant_layers(model) == {}


@pytest.mark.parametrize("name", REFUSED)
def test_on_packed_weights_it_is_refused_and_changes_nothing(small_model: Maker, recipe: MakeRecipe, name: str) -> None:
    config, _ = refused(name)
    model = qsurgeon.apply(recipe(), small_model())
    before, modules = {key: one.clone() for key, one in model.state_dict().items()}, list(model.named_modules())
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(SurgeryError) as caught:
        peft.get_peft_model(model, config)
    method = {"dora": "DoRA", "kasa": "KaSA", "target_parameters": "LoRA with target_parameters"}
    assert str(caught.value) == (
        f"{Q} cannot have this adapter: {method.get(name, name)} computes with the weight of what it sits on, "
        "which is packed"
    )
    assert list(model.named_modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


ASK_THE_DTYPE: dict[str, tuple[str, dict[str, Any]]] = {
    "velora": ("LoraConfig", {"velora_config": part("VeloraConfig", num_groups=8)}),
    "orthogonal": ("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}),
    "unilora": ("UniLoraConfig", {}),
}


@pytest.mark.parametrize("name", ASK_THE_DTYPE)
def test_an_adapter_that_makes_its_tensors_in_the_weights_dtype_is_that_on_the_master(
    small_model: Maker, recipe: MakeRecipe, moved: Move, step: Step, name: str
) -> None:
    def make(storage: str) -> Any:
        kind, fields = ASK_THE_DTYPE[name]
        config = adapter_config(kind, **{"target_modules": ["q_proj"], **fields})
        torch.manual_seed(2)
        return moved(peft.get_peft_model(qsurgeon.apply(recipe(storage), small_model().bfloat16()), config))

    packed, master = make("packed"), make("master")
    dtypes = [{key: one.dtype for key, one in model.named_parameters() if Q not in key} for model in (packed, master)]
    assert dtypes[0].items() >= {key: one for key, one in dtypes[1].items() if "base_layer" not in key}.items()
    assert_equal_steps(step(packed), step(master))


def test_load_refuses_an_adapter_that_takes_codes_for_values(
    small_model: Maker, recipe: MakeRecipe, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    qsurgeon.apply(recipe("master"), small_model()).save_pretrained(base)
    peft.get_peft_model(qsurgeon.load(base), refused("hira")[0]).save_pretrained(str(adapter))
    shutil.rmtree(base)
    qsurgeon.apply(recipe(), small_model()).save_pretrained(base)
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.load(adapter)
    assert str(caught.value) == (
        f"{adapter}: {Q} cannot have this adapter: hira computes with the weight of what it sits on, which is packed"
    )
