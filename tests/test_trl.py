"""TRL's trainers on wrapped models: what moves, what computes in 4 bits, and what the policy is compared with."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from versions import ADAPTS, recomputing

import qsurgeon
from qsurgeon.errors import CheckpointError, NothingWrappedError, SurgeryError
from qsurgeon.layers import QuantLinear, quant_layers
from qsurgeon.recipe import load_recipe

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TOKENIZER = Path(__file__).parent.parent / "examples" / "models" / "tiny-math"
WRAPPED = 14  # 7 in each of 2 layers
STEPS = 2
NEW_TOKENS = 3
Calls = Counter[tuple[str, str]]


@pytest.fixture(scope="module")
def plain(make_qwen2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model in full precision, with tiny-math's tokenizer."""
    folder = tmp_path_factory.mktemp("trl") / "plain"
    model = make_qwen2(vocab_size=384, num_hidden_layers=2, tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(folder)  # TRL loads in float32 what it loads itself
    hf.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wrapped(plain: Path) -> Path:
    """The folder of the same model, rewritten."""
    folder = plain.parent / "wrapped"
    qsurgeon.rewrite("w4a4-mxfp4", plain, folder)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How often a QuantLinear was called, by whose it is (see ``owned``) and whether it is for a gradient."""
    seen: Calls = Counter()
    forward = QuantLinear.forward

    def counted(self: QuantLinear, input: torch.Tensor) -> torch.Tensor:
        seen[getattr(self, "owner", "other"), "gradient" if torch.is_grad_enabled() else "no gradient"] += 1
        return forward(self, input)

    monkeypatch.setattr(QuantLinear, "forward", counted)
    return seen


def owned(model: Any, owner: str) -> None:
    for module in quant_layers(model).values():
        vars(module)["owner"] = owner


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def longer(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs inside each group, so that there is an advantage and with it a gradient."""
    return [float(sum(ids) % 17) for ids in completion_ids]


COMMON: dict[str, Any] = {
    "use_cpu": True, "bf16": False, **recomputing(False), "max_steps": STEPS, "report_to": [],
    "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True,
    "logging_strategy": "no",
}  # fmt: skip


def sft(model: Any, output: Path, recompute: bool = False, **fields: Any) -> Any:
    data = [{"prompt": f"Ava has {n} pens.", "completion": f"#{n}"} for n in range(8)]
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=str(output), **{**COMMON, **recomputing(recompute)}),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=hf.AutoTokenizer.from_pretrained(TOKENIZER),
        **fields,
    )


def grpo(model: Any, output: Path, beta: float = 0.0, **fields: Any) -> Any:
    arguments = trl.GRPOConfig(
        output_dir=str(output), **COMMON, loss_type="dapo", beta=beta, num_generations=4,
        max_completion_length=NEW_TOKENS, generation_kwargs={"min_new_tokens": NEW_TOKENS},
    )  # fmt: skip
    return trl.GRPOTrainer(
        model,
        longer,
        arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"Ava has {n} pens."} for n in range(8)]),
        processing_class=hf.AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left"),
        **fields,
    )


def states(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("given", ["object", "path"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("make", [sft, grpo], ids=["sft", "grpo"])
def test_what_should_move_does_and_what_computes_is_in_4_bits(
    make: Callable[..., Any], adapter: bool, given: str, *, wrapped: Path, tmp_path: Path, calls: Calls
) -> None:
    model = str(wrapped) if given == "path" else qsurgeon.load(wrapped, dtype=torch.float32)
    trainer = make(model, tmp_path, **({"peft_config": lora()} if adapter else {}))
    owned(trainer.model, "policy")
    before = states(trainer.model)
    trainer.train()

    rollouts = NEW_TOKENS * WRAPPED * STEPS if make is grpo else 0
    assert calls == Counter({("policy", "gradient"): WRAPPED * STEPS, ("policy", "no gradient"): rollouts})
    # Rows of the embedding that no prompt uses stay, but the tensor as a whole moves.
    assert moved(trainer.model, before) == {name for name in before if not adapter or "lora_" in name}
    assert trainer.model.dtype == torch.float32

    trainer.save_model(str(tmp_path / "saved"))
    tokens = torch.arange(1, 13).reshape(2, 6)
    again = qsurgeon.load(tmp_path / "saved", dtype=torch.float32)
    assert len(quant_layers(again)) == WRAPPED
    assert torch.equal(again.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def test_activations_that_are_recomputed_are_in_4_bits_again_and_give_the_same_weights(
    wrapped: Path, tmp_path: Path, calls: Calls
) -> None:
    # TRL's default. The gradient is that of the pass that is run again.
    trained = []
    for recompute in (False, True):
        trainer = sft(qsurgeon.load(wrapped, dtype=torch.float32), tmp_path, recompute)
        calls.clear()
        trainer.train()
        assert calls["other", "gradient"] == WRAPPED * STEPS * (2 if recompute else 1)
        trained.append(states(trainer.model))
    assert [name for name in trained[0] if not torch.equal(trained[0][name], trained[1][name])] == []


# --- the reference


def test_the_reference_of_a_folder_that_is_wrapped_is_wrapped(wrapped: Path, tmp_path: Path, calls: Calls) -> None:
    trainer = grpo(qsurgeon.load(wrapped, dtype=torch.float32), tmp_path, beta=0.1)
    owned(trainer.model, "policy")
    owned(trainer.ref_model, "reference")
    trainer.train()
    assert calls["reference", "no gradient"] == WRAPPED * STEPS
    assert calls["reference", "gradient"] == 0


def test_the_reference_of_an_adapter_is_the_wrapped_base(wrapped: Path, tmp_path: Path, calls: Calls) -> None:
    trainer = grpo(qsurgeon.load(wrapped, dtype=torch.float32), tmp_path, beta=0.1, peft_config=lora())
    owned(trainer.model, "policy")
    assert trainer.ref_model is None
    trainer.train()
    assert calls["policy", "no gradient"] == (NEW_TOKENS + 1) * WRAPPED * STEPS


def test_the_reference_is_in_full_precision_if_that_is_said(
    plain: Path, wrapped: Path, tmp_path: Path, calls: Calls
) -> None:
    for model in (
        qsurgeon.load(wrapped, dtype=torch.float32),
        qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)),
    ):
        calls.clear()
        qsurgeon.reference(model, plain, wrapped=False)
        trainer = grpo(model, tmp_path, beta=0.1)
        owned(trainer.model, "policy")
        before = states(trainer.ref_model)
        trainer.train()
        assert quant_layers(trainer.ref_model) == {}
        assert moved(trainer.ref_model, before) == set()
        assert set(calls) == {("policy", "gradient"), ("policy", "no gradient")}


def test_the_reference_of_a_live_model_is_the_wrapped_folder_that_is_named(
    plain: Path, wrapped: Path, tmp_path: Path
) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    qsurgeon.reference(model, wrapped, wrapped=True)
    assert len(quant_layers(grpo(model, tmp_path, beta=0.1).ref_model)) == WRAPPED


def preferences(model: Any, output: Path) -> Any:
    row = {"prompt": "Ava has 3 pens.", "chosen": "#3", "rejected": "#4"}
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(output), **COMMON),
        train_dataset=datasets.Dataset.from_list([row] * 4),
        processing_class=hf.AutoTokenizer.from_pretrained(TOKENIZER),
    )


@pytest.mark.parametrize(
    "make", [lambda model, output: grpo(model, output, beta=0.1), preferences], ids=["grpo", "dpo"]
)
def test_a_live_model_has_no_reference_by_accident(make: Callable[..., Any], plain: Path, tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    named = f"'{plain} rewritten in memory by qsurgeon: see qsurgeon.reference'"
    with pytest.raises(OSError, match=re.escape(named)):
        make(model, tmp_path)


def test_a_live_model_saves_a_folder_that_knows_its_own_name(plain: Path, tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(plain))
    model.save_pretrained(tmp_path)
    assert "rewritten in memory" not in (tmp_path / "config.json").read_text()
    assert qsurgeon.load(tmp_path).config.name_or_path == str(tmp_path)


def test_a_reference_of_the_other_precision_is_refused_and_changes_nothing(plain: Path, wrapped: Path) -> None:
    model = qsurgeon.load(wrapped)
    with pytest.raises(NothingWrappedError) as unwrapped:
        qsurgeon.reference(model, plain, wrapped=True)
    assert str(unwrapped.value) == (
        f"{plain}: no module is wrapped; its config.json has no quantization_config of qsurgeon. "
        f"Write one with: qsurgeon apply RECIPE --model {plain} --output FOLDER"
    )
    with pytest.raises(CheckpointError) as rewritten:
        qsurgeon.reference(model, wrapped, wrapped=False)
    assert str(rewritten.value) == f"{wrapped} was rewritten by qsurgeon; expected a checkpoint in full precision"
    assert model.config.name_or_path == str(wrapped)


NO_EFFECT = (
    "qsurgeon.reference(model, '{}', wrapped=False) has no effect with an adapter: a trainer's reference is then the "
    "model with its adapter off, which is wrapped. Train without an adapter (no peft_config), say wrapped=True, or "
    "compute the reference yourself, with the adapter off, inside qsurgeon.disabled(model)"
)


def test_a_reference_that_an_adapter_would_leave_unused_is_refused(plain: Path, wrapped: Path, tmp_path: Path) -> None:
    model = qsurgeon.load(wrapped)
    qsurgeon.reference(model, plain, wrapped=False)
    with pytest.raises(SurgeryError) as by_trainer:
        grpo(model, tmp_path, beta=0.1, peft_config=lora())
    assert str(by_trainer.value) == NO_EFFECT.format(plain)
    if ADAPTS:
        with pytest.raises(SurgeryError) as by_transformers:
            model.add_adapter(lora())
        assert str(by_transformers.value) == NO_EFFECT.format(plain)
    else:
        with pytest.raises(ValueError, match="please use a version >= "):
            model.add_adapter(lora())
    qsurgeon.reference(model, wrapped, wrapped=True)
    adapted = peft.get_peft_model(model, lora())
    with pytest.raises(SurgeryError) as too_late:
        qsurgeon.reference(adapted, plain, wrapped=False)
    assert str(too_late.value) == NO_EFFECT.format(plain)
    assert model.config.name_or_path == str(wrapped)


def test_a_model_without_a_config_has_no_place_for_a_reference(plain: Path) -> None:
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.reference(torch.nn.Sequential(torch.nn.Linear(4, 4)), plain, wrapped=False)
    assert str(caught.value) == "Sequential has no config that could name its reference"


@pytest.mark.parametrize("start", [sft, grpo], ids=["sft", "grpo"])
def test_an_adapter_of_packed_weights_trains_as_that_of_the_master(
    start: Any, plain: Path, tmp_path: Path, calls: Calls
) -> None:
    ends = {}
    for storage in ("master", "packed"):
        recipe = load_recipe("w4a4-mxfp4").model_copy(update={"storage": storage})
        model = qsurgeon.apply(recipe, hf.AutoModelForCausalLM.from_pretrained(plain))
        torch.manual_seed(0)
        trainer = start(model, tmp_path / storage, peft_config=lora())
        before = states(trainer.model)
        trainer.train()
        after = states(trainer.model)
        moved = [name for name, one in after.items() if not torch.equal(one, before[name])]
        assert moved
        assert all("lora_" in name for name in moved)
        ends[storage] = {name: one for name, one in after.items() if "lora_" in name}
    assert sum("packed" in type(one).__name__.lower() for one in trainer.model.modules()) == WRAPPED
    assert [name for name, one in ends["master"].items() if not torch.equal(one, ends["packed"][name])] == []
