"""The noise of a model: which norms a recipe gives it, and that a checkpoint keeps it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from versions import recompute

import qsurgeon
from qsurgeon.errors import CheckpointError, PlanError, SurgeryError
from qsurgeon.layers import quant_layers
from qsurgeon.layers.noise import Strength, add_noise, noisy_norms
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.recipe.noise import NoiseSection
from qsurgeon.surgery import current_record

Make = Callable[..., Any]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
}


def section(**fields: Any) -> NoiseSection:
    return NoiseSection(**{"sigma_start": 0.1, "schedule": "constant", "during": "both", **fields})


def recipe(rule: dict[str, Any] | None = None, storage: str = "master", **fields: Any) -> Recipe:
    made = Rule(**{"target": ("layers",), "weight": "mxfp4", "input": "mxfp4", **(rule or {})})
    return Recipe(version=1, rules=(made,), storage=storage, noise=section(**fields))


def noised(model: Any) -> dict[str, float]:
    return {name: norm.noise.multiplier for name, norm in noisy_norms(model).items()}


def logits(model: Any, **step: Any) -> Tensor:
    """Return what a model computes, in a step if one is named."""
    with torch.no_grad():
        if not step:
            return model(IDS).logits  # type: ignore[no-any-return]
        with qsurgeon.noise(model, **step):
            return model(IDS).logits  # type: ignore[no-any-return]


def complaint(made: Recipe, model: Any) -> str:
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(made, model)
    return str(caught.value)


BOTH = ("input_layernorm", "post_attention_layernorm")


def norms(layers: range, *names: str) -> dict[str, float]:
    return {f"model.layers.{layer}.{name}": 1.0 for layer in layers for name in names or BOTH}


# --- which norms


def test_without_a_target_it_is_the_norms_that_feed_wrapped_layers(make_qwen2: Make) -> None:
    plan = qsurgeon.plan(recipe({"exclude": ("layers.{0,-1}",)}), make_qwen2(num_hidden_layers=4))
    assert plan.noise is not None
    assert plan.noise.modules == norms(range(1, 3))
    why = {step.module.name: step.why for step in plan.steps}
    assert why["model.layers.1.input_layernorm"] == "noise ×1"
    elsewhere = "no noise: its output goes straight into no wrapped layer"
    assert why["model.layers.0.input_layernorm"] == why["model.norm"] == elsewhere


def test_a_norm_that_feeds_only_what_is_not_wrapped_has_none(make_qwen2: Make) -> None:
    plan = qsurgeon.plan(recipe({"target": ("mlp",)}), make_qwen2())
    assert plan.noise is not None
    assert plan.noise.modules == norms(range(3), "post_attention_layernorm")


def test_norms_after_a_layer_and_of_heads_have_none() -> None:
    """Gemma 3 has norms behind its layers too, and norms of queries and keys."""
    plan = qsurgeon.plan(recipe(), Gemma3TextConfig(**SMALL, architectures=["Gemma3ForCausalLM"]))
    assert plan.noise is not None
    assert plan.noise.modules == norms(range(2), "input_layernorm", "pre_feedforward_layernorm")
    quiet = {step.module.name.removeprefix("model.layers.0.") for step in plan.steps if step.still}
    assert {"post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"} <= quiet


def test_norms_of_heads_can_be_named() -> None:
    plan = qsurgeon.plan(recipe(target=("q_norm", "k_norm")), Qwen3Config(**SMALL, architectures=["Qwen3ForCausalLM"]))
    assert plan.noise is not None
    assert plan.noise.modules == norms(range(2), "self_attn.q_norm", "self_attn.k_norm")


def test_layer_norms_of_gpt2_are_found() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=32, architectures=["GPT2LMHeadModel"])
    plan = qsurgeon.plan(recipe({"target": ("h",), "types": ("Conv1D",)}), config)
    assert plan.noise is not None
    assert sorted(plan.noise.modules) == [f"transformer.h.{layer}.ln_{one}" for layer in (0, 1) for one in (1, 2)]


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (Gemma3ForCausalLM, lambda: Gemma3TextConfig(**SMALL)),
        (Qwen3ForCausalLM, lambda: Qwen3Config(**SMALL)),
        (GPT2LMHeadModel, lambda: GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=32)),
    ],
    ids=["gemma3", "qwen3", "gpt2"],
)
def test_the_noise_acts_in_each_of_them(make: Any, config: Make) -> None:
    model = make(config()).eval()
    target = ("h",) if make is GPT2LMHeadModel else ("layers",)
    qsurgeon.apply(recipe({"target": target, "types": ("Linear", "Conv1D")}), model)
    clean = logits(model)
    assert not torch.equal(logits(model, step=0), clean)
    assert torch.equal(logits(model), clean)


def test_a_target_takes_the_norms_that_it_names_and_leaves_those_that_are_excluded(tiny_qwen2: Any) -> None:
    plan = qsurgeon.plan(recipe(target=("layers", "norm"), exclude=("layers.0", "layers.1")), tiny_qwen2)
    assert plan.noise is not None
    assert plan.noise.modules == {**norms(range(2, 3)), "model.norm": 1.0}
    why = {step.module.name: step.why for step in plan.steps}
    assert why["model.layers.0.input_layernorm"] == "no noise: excluded by 'layers.0'"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": ("q_nrom",)}, "noise.target[0]: 'q_nrom' names no module; did you mean 'q_proj'?"),
        ({"target": ("mlp",)}, "noise.target[0]: 'mlp' names no norm, only Linear, Qwen2MLP, SiLUActivation"),
        ({"exclude": ("layers.{0,9}",)}, "noise.exclude[0]: 'layers.{0,9}': nothing is named by 9"),
        (
            {"exclude": ("layers",)},
            "noise: no norm gets noise: each is excluded, or its multiplier is 0; there are "
            "model.layers.0.input_layernorm, model.layers.0.post_attention_layernorm, model.layers.1.input_layernorm "
            "and 4 more",
        ),
        (
            {"mode": "targeted", "multipliers": {"layers.9": 1.0}},
            "noise.multipliers.layers.9: 'layers.9' names no module; nearest: layers.2, layers.1, layers.0",
        ),
        (
            {"mode": "inverse", "errors": {"layers.0": 1.0, "layers.1": 0.1, "layers.2": 0.1}},
            "noise.errors.layers.0: the error of 'layers.0' is more than twice the mean of all, and its multiplier "
            "would be -0.5: 'mode: inverse' has no meaning for it",
        ),
    ],
)
def test_what_names_no_norm_is_an_error_of_the_plan(tiny_qwen2: Any, fields: dict[str, Any], message: str) -> None:
    assert message in complaint(recipe(**fields), tiny_qwen2).splitlines()


def test_a_model_whose_norms_feed_nothing_is_an_error_that_lists_them(tiny_qwen2: Any) -> None:
    assert complaint(recipe({"target": ("o_proj", "down_proj")}), tiny_qwen2) == (
        "noise: no norm was found whose output goes straight into a wrapped layer; name norms in 'target', of which "
        "there are: model.layers.0.input_layernorm, model.layers.0.post_attention_layernorm, "
        "model.layers.1.input_layernorm and 4 more"
    )


# --- multipliers

ERRORS = {"layers.0": 0.4, "layers.1": 0.3, "layers.2": 0.2}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mode": "targeted", "multipliers": {"layers.1": 1.0}}, [0, 1, 0]),
        ({"mode": "targeted", "errors": ERRORS, "worst": 2}, [1, 1, 0]),
        ({"mode": "variable", "errors": ERRORS}, [4 / 3, 1, 2 / 3]),
        ({"mode": "inverse", "errors": ERRORS}, [2 / 3, 1, 4 / 3]),
        ({"mode": "ceiling", "errors": ERRORS}, [0.5, 0.75, 1]),
        ({"mode": "tiers", "multipliers": {"layers.1": 1.5, "layers.{1..2}": 1.2}}, [1, 1.5, 1.2]),
        (
            {
                "mode": "tiers",
                "errors": ERRORS,
                "tiers": ({"least": 0.4, "multiplier": 1.5}, {"least": 0.3, "multiplier": 1.2}),
            },
            [1.5, 1.2, 1],
        ),
    ],
    ids=["targeted", "worst", "variable", "inverse", "ceiling", "named-tiers", "tiers"],
)
def test_a_mode_finds_the_multiplier_of_each_layer(
    tiny_qwen2: Any, fields: dict[str, Any], expected: list[float]
) -> None:
    plan = qsurgeon.plan(recipe(**fields), tiny_qwen2)
    assert plan.noise is not None
    found = [plan.noise.modules.get(f"model.layers.{layer}.input_layernorm", 0) for layer in range(3)]
    assert found == pytest.approx(expected)


def test_a_norm_that_no_error_names_has_the_plain_noise(tiny_qwen2: Any) -> None:
    plan = qsurgeon.plan(recipe(target=("**",), mode="variable", errors=ERRORS), tiny_qwen2)
    assert plan.noise is not None
    assert plan.noise.modules["model.norm"] == 1


def test_the_noise_of_a_norm_is_multiplied(tiny_qwen2: Any) -> None:
    qsurgeon.apply(recipe(mode="tiers", multipliers={"layers.0": 3.0}), tiny_qwen2)
    with qsurgeon.noise(tiny_qwen2, step=0):
        report = qsurgeon.inspect(tiny_qwen2)
    sigmas = {row.module: row.sigma for row in report.rows if row.sigma is not None}
    assert sigmas["model.layers.0.input_layernorm"] == pytest.approx(0.3)
    assert sigmas["model.layers.1.input_layernorm"] == pytest.approx(0.1)


# --- what is applied and kept


def test_applying_changes_no_tensor_and_no_output_outside_of_a_step(tiny_qwen2: Any, make_qwen2: Make) -> None:
    plain = make_qwen2()
    qsurgeon.apply(recipe().model_copy(update={"noise": None}), plain)
    qsurgeon.apply(recipe(), tiny_qwen2)
    assert noised(tiny_qwen2) == norms(range(3))
    before, after = plain.state_dict(), tiny_qwen2.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(tiny_qwen2), logits(plain))
    for step in range(3):
        assert not torch.equal(logits(tiny_qwen2, step=step), logits(plain))
    assert torch.equal(logits(tiny_qwen2), logits(plain))
    assert all(torch.equal(before[name], value) for name, value in tiny_qwen2.state_dict().items())


def test_disabled_has_no_noise(tiny_qwen2: Any, make_qwen2: Make) -> None:
    qsurgeon.apply(recipe(), tiny_qwen2)
    with qsurgeon.noise(tiny_qwen2, step=0), qsurgeon.disabled(tiny_qwen2):
        found = logits(tiny_qwen2)
    assert torch.equal(found, logits(make_qwen2()))


def test_a_rollout_has_noise_and_training_has_none_where_the_recipe_says_so(tiny_qwen2: Any) -> None:
    qsurgeon.apply(recipe(during="rollout", sigma_start=3.0), tiny_qwen2)
    clean = logits(tiny_qwen2)
    ask: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = tiny_qwen2.generate(IDS, **ask).logits
    with qsurgeon.noise(tiny_qwen2, step=0):
        assert torch.equal(logits(tiny_qwen2), clean)
        first, again = (tiny_qwen2.generate(IDS, **ask).logits for _ in range(2))
    assert not torch.equal(first[0], plain[0])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(tiny_qwen2.generate(IDS, **ask).logits[0], plain[0])


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_checkpoint_has_the_noise_of_the_model(tiny_qwen2: Any, tmp_path: Path, storage: str) -> None:
    qsurgeon.apply(recipe(storage=storage, mode="tiers", multipliers={"layers.0": 2.0}, seed=5), tiny_qwen2)
    tiny_qwen2.save_pretrained(tmp_path / "a")
    loaded = qsurgeon.load(tmp_path / "a").eval()
    assert noised(loaded) == noised(tiny_qwen2)
    assert torch.equal(logits(loaded), logits(tiny_qwen2))
    assert torch.equal(logits(loaded, step=7), logits(tiny_qwen2, step=7))
    assert not torch.equal(logits(loaded, step=7), logits(loaded))
    loaded.save_pretrained(tmp_path / "b")
    first, second = (json.loads((tmp_path / one / "config.json").read_text()) for one in "ab")
    assert first["quantization_config"]["noise"] == second["quantization_config"]["noise"]


def test_a_rewritten_folder_has_the_noise_of_a_live_model(tiny_qwen2: Any, tiny_folder: Path, tmp_path: Path) -> None:
    qsurgeon.rewrite(recipe(), tiny_folder, tmp_path / "out")
    loaded = qsurgeon.load(tmp_path / "out").eval()
    qsurgeon.apply(recipe(), tiny_qwen2)
    assert torch.equal(logits(loaded, step=3), logits(tiny_qwen2, step=3))
    live, stored = current_record(tiny_qwen2), current_record(loaded)
    assert live is not None
    assert stored is not None
    assert live.noise == stored.noise == qsurgeon.plan(recipe(), tiny_folder).noise


def test_a_record_without_noise_says_nothing_of_it(tiny_qwen2: Any, tmp_path: Path) -> None:
    qsurgeon.apply(recipe().model_copy(update={"noise": None}), tiny_qwen2)
    tiny_qwen2.save_pretrained(tmp_path)
    assert "noise" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]


def test_a_part_has_the_noise_of_the_whole(tiny_qwen2: Any, tmp_path: Path) -> None:
    qsurgeon.apply(recipe(), tiny_qwen2)
    tiny_qwen2.save_pretrained(tmp_path / "whole")
    part = AutoModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad(), qsurgeon.noise(part, step=2), qsurgeon.noise(tiny_qwen2, step=2):
        assert torch.equal(part(IDS).last_hidden_state, tiny_qwen2.model(IDS).last_hidden_state)


def test_a_checkpoint_whose_norm_is_missing_is_an_error(tiny_qwen2: Any, tmp_path: Path) -> None:
    qsurgeon.apply(recipe(), tiny_qwen2)
    tiny_qwen2.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["noise"]["modules"]["model.layers.9.input_layernorm"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(tmp_path)
    assert str(caught.value) == "Qwen2ForCausalLM has no model.layers.9.input_layernorm, which config.json gives noise"


def test_packing_keeps_the_noise_and_refuses_another(tiny_qwen2: Any) -> None:
    qsurgeon.apply(recipe(), tiny_qwen2)
    with pytest.raises(SurgeryError, match=r"the noise is sigma 0\.1 on 6 norms, and would be sigma 0\.2 on 6 norms"):
        qsurgeon.apply(recipe(storage="packed", sigma_start=0.2), tiny_qwen2)
    before = logits(tiny_qwen2, step=1)
    qsurgeon.apply(recipe(storage="packed"), tiny_qwen2)
    assert noised(tiny_qwen2) == norms(range(3))
    torch.testing.assert_close(logits(tiny_qwen2, step=1), before)


def test_inspect_and_plan_show_the_noise(tiny_qwen2: Any, tmp_path: Path) -> None:
    planned = qsurgeon.plan(recipe(schedule="exponential", sigma_end=0.001, during="rollout"), tiny_qwen2)
    from qsurgeon.report.inspection import report_of

    line = "noise on 6 norms: sigma 0.1 to 0.001, exponential in 10 stages, in rollout only"
    assert line in str(report_of(planned)).splitlines()
    qsurgeon.apply(planned.recipe, tiny_qwen2)
    tiny_qwen2.save_pretrained(tmp_path)
    for report in (qsurgeon.inspect(tiny_qwen2), qsurgeon.inspect(tmp_path)):
        assert line in str(report).splitlines()
        why = {row.module: row.why for row in report.rows}
        assert why["model.layers.0.input_layernorm"] == "noise ×1"
    with qsurgeon.noise(tiny_qwen2, step=15, steps=29), qsurgeon.phase("rollout"):
        row = next(row for row in qsurgeon.inspect(tiny_qwen2).rows if row.noise)
    assert row.why == "noise ×1, sigma 0.01 at this moment"
    assert row.sigma == pytest.approx(0.01)


def test_recomputing_gives_the_gradients_of_the_noise_of_the_forward_pass(make_qwen2: Make) -> None:
    found = []
    for again in (False, True):
        model = make_qwen2().train()
        qsurgeon.apply(recipe(), model)
        if again:
            recompute(model, use_reentrant=False)
        with qsurgeon.noise(model, step=1):
            loss = model(IDS, labels=IDS).loss
        with qsurgeon.noise(model, step=2):
            loss.backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_an_adapter_and_norms_that_peft_trains_have_the_noise(make_qwen2: Make) -> None:
    base = make_qwen2()
    qsurgeon.apply(recipe(), base)
    expected = logits(base, step=1)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"]))
    assert torch.equal(logits(model, step=1), expected)
    assert len(quant_layers(model)) == 21
    record = current_record(model)
    assert record is not None
    assert record.noise is not None
    assert record.noise.modules == norms(range(3))


def test_noise_of_two_recipes_in_one_model_cannot_be_saved(make_qwen2: Make, tmp_path: Path) -> None:
    model = make_qwen2()
    qsurgeon.apply(recipe(), model)
    add_noise(model.model.norm, Strength(sigma_start=0.2, schedule="constant", during="both"), 1.0, "norm")
    with pytest.raises(SurgeryError, match=r"norms have noise of several recipes \(sigma 0\.1; sigma 0\.2\)"):
        model.save_pretrained(tmp_path)
