"""Trainer and TRL name the steps: noise in each, at its sigma, after a resume too; evaluations are exact."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments
from versions import recomputing

import qsurgeon
from qsurgeon.layers.noise import Moment, NoisyNorm, Strength, moment_of, noisy_norms, sigma_now
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.recipe.noise import NoiseSection

STEPS = 8
TOKENIZER = Path(__file__).parents[2] / "examples" / "models" / "tiny-math"
Make = Callable[..., Any]
FIELDS: dict[str, Any] = {"sigma_start": 0.2, "sigma_end": 0.02, "schedule": "exponential", "stages": 4}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Take back what TrainingArguments leaves behind for the whole process: environment variables and a singleton."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def noisy(model: Any, **fields: Any) -> Any:
    rule = Rule(target=("layers",), weight="mxfp4", input="mxfp4")
    section = NoiseSection(**{**FIELDS, "during": "both", **fields})
    return qsurgeon.apply(Recipe(version=1, rules=(rule,), noise=section), model)


def train(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> Trainer:
    tokens = torch.randint(96, (4 * STEPS, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 4, "save_strategy": "no", **options},
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, float, bool, str]]:
    """Each call of a norm with noise: the step, sigma, whether a gradient is computed, and the phase."""
    found: list[tuple[int | None, float, bool, str]] = []
    forward = NoisyNorm.forward

    def noted(self: NoisyNorm, *args: Any, **kwargs: Any) -> Any:
        moment = moment_of(self)
        found.append(
            (moment and moment.step, sigma_now(self), torch.is_grad_enabled(), qsurgeon.layers.current_phase())
        )
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(NoisyNorm, "forward", noted)
    return found


def sigmas() -> list[float]:
    made = Strength(**FIELDS)
    return [made.sigma(Moment(step, STEPS)) for step in range(STEPS)]


def test_each_step_has_its_sigma_and_an_evaluation_has_none(make_qwen2: Make, tmp_path: Path, called: Any) -> None:
    model = noisy(make_qwen2(num_hidden_layers=2))
    trainer = train(model, tmp_path, eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=1)
    steps = sorted({(step, sigma) for step, sigma, trains, _ in called if trains})
    assert steps == [(step, pytest.approx(sigma)) for step, sigma in enumerate(sigmas())]
    assert {(step, sigma) for step, sigma, trains, _ in called if not trains} == {(None, 0.0)}
    assert logged(trainer, "qsurgeon/noise_sigma") == pytest.approx(sigmas())
    assert len(logged(trainer, "eval_loss")) == STEPS // 2
    assert {sigma_now(norm) for norm in noisy_norms(model).values()} == {0.0}
    assert not [one for one in trainer.callback_handler.callbacks if type(one).__name__ == "NoiseCallback"]


def test_micro_batches_of_a_step_share_its_noise(make_qwen2: Make, tmp_path: Path, called: Any) -> None:
    train(
        noisy(make_qwen2(num_hidden_layers=1)), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert [step for step, *_ in called] == [step for step in range(STEPS) for _ in range(2 * 2)]


def test_a_resumed_run_is_bit_identical_and_noise_makes_another_of_it(make_qwen2: Make, tmp_path: Path) -> None:
    straight, resumed, plain = (make_qwen2(num_hidden_layers=2) for _ in range(3))
    whole = train(noisy(straight), tmp_path / "a", save_strategy="steps", save_steps=STEPS // 2)
    noisy(resumed)
    again = train(resumed, tmp_path / "b", resume=tmp_path / "a" / f"checkpoint-{STEPS // 2}")
    assert logged(again, "loss") == logged(whole, "loss")
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in straight.state_dict().items())
    qsurgeon.apply(Recipe(version=1, rules=(Rule(target=("layers",), weight="mxfp4", input="mxfp4"),)), plain)
    without = logged(train(plain, tmp_path / "c"), "loss")
    assert without[:2] == logged(whole, "loss")[:2]  # the stage without noise
    assert without[2] != logged(whole, "loss")[2]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_recomputing_changes_no_bit(make_qwen2: Make, tmp_path: Path, reentrant: bool) -> None:
    plain, again = (noisy(make_qwen2(num_hidden_layers=2)) for _ in range(2))
    train(plain, tmp_path / "a")
    train(again, tmp_path / "b", **recomputing(True, use_reentrant=reentrant))
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_watch_says_the_sigma_of_the_last_step(make_qwen2: Make) -> None:
    model = noisy(
        make_qwen2(num_hidden_layers=2), schedule="constant", sigma_end=None, stages=None, mode="tiers",
        multipliers={"layers.0": 2.0},
    ).train()  # fmt: skip
    ids = torch.tensor([[1, 2, 3]])
    with qsurgeon.Watch(model, every=1) as watch:
        assert "qsurgeon/noise_sigma/input_layernorm" not in watch.step()
        with qsurgeon.noise(model, step=0):
            model(ids, labels=ids).loss.backward()
        numbers = watch.step()
    names = ("input_layernorm", "post_attention_layernorm")
    assert [numbers[f"qsurgeon/noise_sigma/{name}"] for name in names] == pytest.approx([0.3, 0.3])


def test_an_error_ends_the_step(make_qwen2: Make, tmp_path: Path) -> None:
    model = noisy(make_qwen2(num_hidden_layers=1), schedule="constant", sigma_end=None, stages=None)

    def fail(*_: Any) -> None:
        assert {sigma_now(norm) for norm in noisy_norms(model).values()} == {0.2}
        raise KeyboardInterrupt

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path)
    assert {sigma_now(norm) for norm in noisy_norms(model).values()} == {0.0}


def test_a_loop_that_names_no_step_is_told_once(make_qwen2: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("qsurgeon.layers.noise.norm._told", set()):
        model = noisy(make_qwen2(num_hidden_layers=1)).train()
        ids = torch.tensor([[1, 2, 3]])
        with qsurgeon.noise(model, step=0, steps=3):
            model(ids)
        with torch.no_grad():
            model(ids)
        with qsurgeon.disabled(model):
            model(ids)
        model.eval()(ids)
        assert capsys.readouterr().err == ""
        model.train()(ids)
        model(ids)
    assert capsys.readouterr().err == (
        "qsurgeon: model.layers.0.input_layernorm is trained and has no noise: its recipe says sigma 0.2 to 0.02, "
        "exponential in 4 stages, and no step was named. Put each step inside of: with qsurgeon.noise(model, step=…, "
        "steps=…). transformers' Trainer does it itself\n"
    )


def test_rollouts_of_trl_have_the_noise_of_their_step(make_qwen2: Make, tmp_path: Path, called: Any) -> None:
    """Under ``during: rollout``: what is trained is clean, and each step's rollouts have noise, not the first's."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = noisy(make_qwen2(vocab_size=384, num_hidden_layers=1), during="rollout", schedule="linear", stages=None).to(
        torch.bfloat16
    )
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, **recomputing(False), max_steps=3, report_to=[],
        save_strategy="no", per_device_train_batch_size=4, num_generations=4, max_completion_length=3,
        steps_per_generation=1, generation_kwargs={"min_new_tokens": 3}, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trl.GRPOTrainer(
        model,
        lambda completion_ids, **_: [float(sum(ids) % 17) for ids in completion_ids],
        arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"Ava has {n} pens."} for n in range(8)]),
        processing_class=hf.AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left"),
    ).train()
    rollouts = sorted({(step, sigma) for step, sigma, _, phase in called if phase == "rollout"})
    assert rollouts == [(step, pytest.approx(sigma)) for step, sigma in enumerate((0.2, 0.11, 0.02))]
    assert {sigma for _, sigma, _, phase in called if phase == "training"} == {0.0}
