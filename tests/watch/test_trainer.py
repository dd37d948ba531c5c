"""WatchCallback: the numbers in the logs of transformers' Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import qsurgeon
from qsurgeon.errors import NothingWrappedError, UsageError
from qsurgeon.layers import quant_layers

Hooks = Callable[[nn.Module], int]


class Reporter(TrainerCallback):
    """Keeps what a reporter gets."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.got.append(dict(logs))


def trainer(model: Any, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(8, 12)]
    given: dict[str, Any] = {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3} | options
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, save_strategy="no", **given
    )
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)


def test_the_trainers_logs_have_the_numbers_for_reporters_and_in_the_history(
    model: Any, tmp_path: Path, hooks: Hooks
) -> None:
    reporter = Reporter()
    running = trainer(model, tmp_path, [reporter], gradient_accumulation_steps=2)
    callback = qsurgeon.WatchCallback(every=2).attach(running)
    running.train()
    assert callback in running.callback_handler.callbacks
    history = running.state.log_history
    logs = [one for one in history if "loss" in one]
    assert [one["step"] for one in logs] == [2, 4, 6]
    for one in logs:
        assert (one["qsurgeon/called"], one["qsurgeon/active"]) == (1.0, 1.0)
        assert 0 <= one["qsurgeon/flip_rate"] <= 1
        assert one["qsurgeon/weight_sqnr_db/q_proj"] > 10
        assert one["qsurgeon/input_sqnr_db/down_proj"] > 10
    evaluations = [one for one in history if "eval_loss" in one]
    assert [one["step"] for one in evaluations] == [3, 6]
    for one in evaluations:
        assert (one["eval_qsurgeon/called"], one["eval_qsurgeon/active"]) == (1.0, 1.0)
    assert not [key for key in history[-1] if "qsurgeon" in key]
    assert reporter.got == [{key: value for key, value in one.items() if key != "step"} for one in history]
    assert hooks(model) == 0


def test_an_evaluation_in_full_precision_shows(model: Any, tmp_path: Path) -> None:
    class Sabotage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if control.should_evaluate:
                for layer in quant_layers(model).values():
                    layer.__class__ = nn.Linear  # type: ignore[assignment]

    running = trainer(model, tmp_path, [Sabotage(), qsurgeon.WatchCallback(every=1)], max_steps=3)
    running.train()
    (log,) = (one for one in running.state.log_history if "eval_loss" in one)
    assert (log["eval_qsurgeon/called"], log["eval_qsurgeon/active"]) == (1.0, 0.0)


def test_a_callback_behind_reporters_is_refused_before_training(model: Any, tmp_path: Path) -> None:
    running = trainer(model, tmp_path, [qsurgeon.WatchCallback()])
    running.args.report_to = ["wandb"]
    with pytest.raises(UsageError) as caught:
        running.train()
    assert str(caught.value) == (
        "wandb reports before a callback that was given to the Trainer, and would not get its numbers: "
        "use WatchCallback(...).attach(trainer)"
    )


def test_a_run_that_failed_is_closed_by_the_next_one_or_by_hand(model: Any, tmp_path: Path, hooks: Hooks) -> None:
    class Fail(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyError("mine")

    callback, fail = qsurgeon.WatchCallback(every=1), Fail()
    running = trainer(model, tmp_path, [callback, fail])
    with pytest.raises(KeyError, match="mine"):
        running.train()
    assert hooks(model) == 14
    callback.close()
    assert hooks(model) == 0
    running.evaluate()
    with pytest.raises(KeyError, match="mine"):
        running.train()
    running.remove_callback(fail)
    running.train()
    assert hooks(model) == 0


def test_a_trainer_of_a_model_that_is_not_wrapped_is_refused(make_qwen2: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(NothingWrappedError, match=r"^Qwen2ForCausalLM has no QuantLinear to watch"):
        trainer(make_qwen2(num_hidden_layers=1), tmp_path, [qsurgeon.WatchCallback()]).train()


def test_evaluations_before_training_and_after_epochs_are_watched(model: Any, tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "eval_steps": None, "max_steps": -1, "num_train_epochs": 2}
    running = trainer(model, tmp_path, [], eval_on_start=True, **options)
    qsurgeon.WatchCallback(every=1).attach(running)
    running.train()
    evaluations = [one for one in running.state.log_history if "eval_loss" in one]
    assert len(evaluations) == 3
    for one in evaluations:
        assert (one["eval_qsurgeon/called"], one["eval_qsurgeon/active"]) == (1.0, 1.0)
    trained = [one for one in running.state.log_history if "loss" in one]
    assert {one["qsurgeon/active"] for one in trained} == {1.0}


def test_attaching_twice_is_refused(model: Any, tmp_path: Path) -> None:
    callback = qsurgeon.WatchCallback()
    running = trainer(model, tmp_path, [callback])
    with pytest.raises(UsageError, match="attached already, or was given to the Trainer"):
        callback.attach(running)
