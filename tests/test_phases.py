"""Phases in models: what a recipe says, what a checkpoint keeps, what generate does; a teacher in the same weights."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from versions import recompute

import qsurgeon
from qsurgeon.formats import kernels
from qsurgeon.launch import VARIABLE
from qsurgeon.layers import quant_layers
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.report.inspection import report_of
from qsurgeon.words import Behavior

ROOT = Path(__file__).parent.parent
IDS = torch.arange(1, 9).reshape(1, 8)


def recipe(phases: str, **fields: Any) -> Recipe:
    rule = Rule(name="decoder", target=("layers",), weight="mxfp4", input="mxfp4", phases=phases)
    return Recipe(version=1, rules=(rule,), **fields)


def by_layer(*phases: str) -> Recipe:
    """Return a recipe with a rule for each layer."""
    rules = tuple(
        Rule(name=f"rule {number}", target=(f"layers.{number}",), weight="mxfp4", input="mxfp4", phases=one)
        for number, one in enumerate(phases)
    )
    return Recipe(version=1, rules=rules)


def share(report: Any) -> float:
    return sum(row.parameters for row in report.rows if row.gradient == "ste") / report.parameters  # type: ignore[no-any-return]


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each tensor that is rounded."""
    found: list[int] = []
    real = kernels.fake_quantize

    def count(*args: Any) -> Any:
        found.append(1)
        return real(*args)

    monkeypatch.setattr(kernels, "fake_quantize", count)
    monkeypatch.setenv(kernels.VARIABLE, "eager")  # compiled code rounds an operand without this function
    return found


def generate(model: Any) -> Any:
    return model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(("phases", "forward", "rollout"), [("both", 1, 1), ("training", 1, 0), ("rollout", 0, 1)])
@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
def test_generate_is_a_rollout_and_a_call_is_training(
    make_qwen2: Callable[..., Any], roundings: list[int], phases: str, forward: int, rollout: int, peft: bool
) -> None:
    model = qsurgeon.apply(recipe(phases), make_qwen2())
    if peft:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    model(input_ids=IDS)
    assert bool(roundings) == bool(forward)
    roundings.clear()
    generate(model)
    assert bool(roundings) == bool(rollout)
    roundings.clear()
    with qsurgeon.phase("training"):
        generate(model)
    assert bool(roundings) == bool(forward)
    roundings.clear()
    model(input_ids=IDS)
    assert bool(roundings) == bool(forward)


def test_a_checkpoint_keeps_the_phases_and_what_is_saved_of_inputs(
    make_qwen2: Callable[..., Any], tmp_path: Path, roundings: list[int]
) -> None:
    qsurgeon.apply(recipe("training", saved_inputs="full"), make_qwen2()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    hows = {layer.quantization for layer in quant_layers(model).values()}
    assert {how.behavior for how in hows} == {Behavior(phases="training", saved_inputs="full")}
    generate(model)
    assert roundings == []


def test_inspect_and_plan_say_in_which_phase_a_module_rounds(tiny_qwen2: Any) -> None:
    plan = qsurgeon.plan(recipe("rollout"), tiny_qwen2)
    assert {step.why for step in plan.wrapped} == {"rule 'decoder', in rollout only"}
    report = qsurgeon.inspect(qsurgeon.apply(recipe("rollout"), tiny_qwen2))
    assert {row.why for row in report.rows if row.gradient == "ste"} == {"rule 'decoder', in rollout only"}


LAYER = "7 with weight mxfp4, input mxfp4"


@pytest.mark.parametrize(
    ("phases", "block", "said"),
    [
        (("both", "both"), nullcontext, ": 14 with weight mxfp4, input mxfp4"),
        (
            ("rollout", "rollout"),
            nullcontext,
            ", but compute in full precision at this moment, in phase training: 14 with weight mxfp4, "
            "input mxfp4, in rollout only",
        ),
        (
            ("rollout", "rollout"),
            lambda: qsurgeon.phase("rollout"),
            ": 14 with weight mxfp4, input mxfp4, in rollout only",
        ),
        (
            ("both", "training"),
            lambda: qsurgeon.phase("rollout"),
            ", but 7 of them compute in full precision at this moment, in phase rollout: "
            f"{LAYER}; {LAYER}, in training only",
        ),
    ],
)
def test_the_summary_says_what_rounds_at_this_moment(
    make_qwen2: Callable[..., Any], phases: tuple[str, ...], block: Any, said: str
) -> None:
    model = qsurgeon.apply(by_layer(*phases), make_qwen2(num_hidden_layers=2))
    with block():
        report = qsurgeon.inspect(model)
        assert report.summary == (
            f"{share(report):.1%} of the parameters are wrapped, in 14 of 15 Linear modules "
            f"(8.0% are in no Linear, most in Embedding){said}"
        )
        assert report.summary in str(report)


def test_the_summary_says_that_a_model_is_disabled(make_qwen2: Callable[..., Any]) -> None:
    for phases in (("both", "both"), ("training", "training")):
        model = qsurgeon.apply(by_layer(*phases), make_qwen2(num_hidden_layers=2))
        with qsurgeon.disabled(model):
            said = "most in Embedding), but compute in full precision at this moment, inside qsurgeon.disabled: "
            assert said in qsurgeon.inspect(model).summary
        with qsurgeon.disabled(model.model.layers[0]):
            assert "but 7 of them compute in full precision at this moment, inside qsurgeon.disabled: " in (
                qsurgeon.inspect(model).summary
            )


def test_a_plan_and_a_folder_say_the_phase_and_nothing_of_a_moment(tiny_qwen2: Any, tmp_path: Path) -> None:
    said = ": 21 with weight mxfp4, input mxfp4, in rollout only"
    assert said in report_of(qsurgeon.plan(recipe("rollout"), tiny_qwen2)).summary
    qsurgeon.apply(recipe("rollout"), tiny_qwen2).save_pretrained(tmp_path)
    assert said in qsurgeon.inspect(tmp_path).summary
    assert qsurgeon.inspect(tmp_path).to_dict()["phase"] == ""


def test_what_is_printed_of_a_layer_has_its_phase(tiny_qwen2: Any) -> None:
    layer = qsurgeon.apply(recipe("rollout"), tiny_qwen2).model.layers[0].mlp.up_proj
    assert repr(layer) == (
        "QuantLinear(in_features=64, out_features=128, bias=False, weight=mxfp4, input=mxfp4, gradient=ste, "
        "phases=rollout)"
    )


def test_what_is_announced_has_the_phases_of_its_rules(
    make_qwen2: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    qsurgeon.apply(by_layer("rollout", "both"), make_qwen2(num_hidden_layers=2))
    said = "7 with weight mxfp4, input mxfp4 (recipe rules: rule 0 (in rollout only), rule 1)\n"
    assert capfd.readouterr().err.endswith(said)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # the teacher's, reentrant
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_teacher_in_the_same_weights_changes_nothing_of_the_students_step(
    make_qwen2: Callable[..., Any], reentrant: bool
) -> None:
    def gradients(with_teacher: bool) -> dict[str, Any]:
        model = qsurgeon.apply(recipe("both"), make_qwen2()).train()
        recompute(model, use_reentrant=reentrant)
        model.enable_input_require_grads()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if with_teacher:
            with qsurgeon.disabled(model), torch.no_grad():
                teacher = model(input_ids=IDS, use_cache=False).logits
            assert torch.equal(teacher, make_qwen2()(input_ids=IDS).logits)
        loss.backward()
        return {name: one.grad for name, one in model.named_parameters()}

    alone, beside = gradients(False), gradients(True)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_the_distillation_example_nears_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import distill
    from tiny_math import encode, make_problems

    model = AutoModelForCausalLM.from_pretrained(distill.TINY_MATH, dtype=torch.float32)
    batch = encode(AutoTokenizer.from_pretrained(distill.TINY_MATH), make_problems(64, "heldout"))
    before = distill.distance(qsurgeon.apply("w4a4-mxfp4", model), batch).item()
    assert len(distill.main(["--steps", "12", "--output", str(tmp_path)])) == 12
    after = distill.distance(qsurgeon.load(tmp_path), batch).item()
    assert after < 0.8 * before
