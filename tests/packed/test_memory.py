"""Packed weights in memory: what they compute, what is refused, what they take."""

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import PlanError, SurgeryError
from qsurgeon.formats import get_format
from qsurgeon.layers import PackedLinear, QuantLinear, packed_layers, quant_layers
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.storage.packed import stored_bytes

TOKENS = torch.arange(1, 13).reshape(2, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"

Maker = Callable[..., Any]
MakeRecipe = Callable[..., Recipe]
Logits = Callable[[Any], Tensor]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_model_computes_what_its_master_does_to_the_bit(
    plain_folder: Path, recipe: MakeRecipe, logits: Logits, dtype: torch.dtype
) -> None:
    load = functools.partial(hf.AutoModelForCausalLM.from_pretrained, plain_folder, dtype=dtype)
    master, packed = qsurgeon.apply(recipe("master"), load()), qsurgeon.apply(recipe(), load())
    assert len(packed_layers(packed)) == len(quant_layers(master)) == 11
    assert type(packed.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(packed), logits(master))
    outputs = [one(input_ids=TOKENS, labels=TOKENS) for one in (packed, master)]
    for output in outputs:
        output.loss.backward()
    grads = [{name: p.grad for name, p in one.named_parameters() if p.grad is not None} for one in (packed, master)]
    assert sorted(set(grads[1]) - set(grads[0])) == sorted(f"{name}.weight" for name in quant_layers(master))
    assert [name for name, grad in grads[0].items() if not torch.equal(grad, grads[1][name])] == []


def test_modules_and_biases_stay_the_objects_that_they_were(small_model: Maker, recipe: MakeRecipe) -> None:
    model = small_model()
    before = dict(model.named_modules())
    bias = model.get_submodule(Q).bias
    qsurgeon.apply(recipe(), model)
    assert all(module is before[name] for name, module in model.named_modules())
    assert model.get_submodule(Q).bias is bias
    assert bias.requires_grad


def test_a_rule_for_inputs_alone_keeps_its_weights(small_model: Maker, recipe: MakeRecipe) -> None:
    rules = [
        {"target": ["mlp"], "input": "mxfp4", "phases": "training"},
        {"target": ["self_attn"], "weight": "mxfp4"},
    ]
    model = qsurgeon.apply(recipe(rules=rules), small_model())
    kinds = {name.split(".")[3]: type(layer) for name, layer in quant_layers(model).items()}
    assert kinds == {"mlp": QuantLinear, "self_attn": PackedLinear}
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad


def test_no_second_copy_of_the_weights_is_alive_while_they_are_packed(
    small_model: Maker, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wrap = small_model(), PackedLinear.wrap.__func__  # type: ignore[attr-defined]
    weights = {name: weakref.ref(model.get_parameter(f"{name}.weight")) for name in (Q, DOWN)}
    alive: list[list[str]] = []

    def wrapped(cls: Any, linear: nn.Module, how: Any, name: str) -> None:
        wrap(cls, linear, how, name)
        alive.append([name for name, weight in weights.items() if weight() is not None])

    monkeypatch.setattr(PackedLinear, "wrap", classmethod(wrapped))
    qsurgeon.apply(recipe(), model)
    assert alive[0] == [Q, DOWN]
    assert [Q] in alive  # the larger one is gone by then
    assert alive[-1] == []


@pytest.mark.parametrize("phases", ["training", "rollout"])
def test_a_packed_weight_that_some_phase_wants_unrounded_is_refused_at_its_line(
    plain_folder: Path, tmp_path: Path, phases: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\nstorage: packed\nrules:\n"
        f"  - {{target: [self_attn], input: mxfp4, phases: {phases}}}\n"
        f"  - {{target: [mlp], weight: mxfp4, phases: {phases}}}\n"
    )
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(load_recipe(file), plain_folder)
    assert str(caught.value).splitlines()[0] == (
        f"{file}:5:44: rule 'rule 2': a packed weight is rounded in every phase, not in {phases} only; say "
        "'storage: master', or leave the weight out of the rule"
    )
    assert len(caught.value.mistakes) == 1


def test_a_packed_weight_cannot_wait_for_its_static_scale(plain_folder: Path, recipe: MakeRecipe) -> None:
    formats = {"late": {"like": "nvfp4", "tensor_scale": "static"}}
    rules = [{"target": ["mlp"], "weight": "late", "input": "late"}]
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(recipe(formats=formats, rules=rules), plain_folder)
    assert str(caught.value) == (
        "rules[0].weight: format 'late' of rule 'rule 1' has a static tensor scale without a number: a weight is "
        "packed before any calibration; give it a static_scale, or say 'tensor_scale: tensor'"
    )


def test_full_precision_cannot_be_asked_for(small_model: Maker, recipe: MakeRecipe) -> None:
    model = qsurgeon.apply(recipe(), small_model())
    with pytest.raises(SurgeryError, match="11 weights of Qwen2ForCausalLM are packed"), qsurgeon.disabled(model):
        pass


def test_packed_weights_of_a_qwen2_5_1_5b_take_less_than_0_30_of_its_bfloat16() -> None:
    shapes = [(1536, 1536)] * 2 + [(256, 1536)] * 2 + [(8960, 1536)] * 2 + [(1536, 8960)]
    wrapped = 28 * sum(rows * columns for rows, columns in shapes)
    packed = 28 * sum(stored_bytes(get_format("nvfp4").as_weight, rows, columns) for rows, columns in shapes)
    assert packed / (2 * wrapped) == pytest.approx(0.28125, abs=1e-5)
    rest = 151936 * 1536 + 28 * (2 * 1536 + 1536 + 2 * 256) + 1536  # embeddings (tied), norms, biases
    assert (packed + 2 * rest) / (2 * (wrapped + rest)) == pytest.approx(0.390, abs=1e-3)


def test_a_model_that_casts_its_input_to_its_weights_dtype_computes(recipe: MakeRecipe) -> None:
    config = hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    found = []
    for storage in ("packed", "master"):
        torch.manual_seed(0)
        model = hf.T5ForConditionalGeneration(config).eval()
        model = qsurgeon.apply(recipe(storage, rules=[{"target": ["block"], "weight": "mxfp4"}]), model)
        found.append(model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits)
    assert torch.equal(*found)
