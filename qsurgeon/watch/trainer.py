"""WatchCallback: a Watch's numbers in the logs of transformers' Trainer."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from qsurgeon.errors import UsageError
from qsurgeon.watch.training import EVERY, ROWS, Numbers, Watch, check_counts, leaf


class WatchCallback(TrainerCallback):
    """Puts a Watch's numbers into the logs of transformers' Trainer: ``WatchCallback(every=10).attach(trainer)``.

    They are in the next log after the step that they are of, in ``trainer.state.log_history`` and in what reporters
    get. An evaluation that the Trainer's schedule calls for logs ``eval_qsurgeon/called`` and
    ``eval_qsurgeon/active``. The options are those of Watch.
    """

    def __init__(
        self, *, every: int = EVERY, rows: int = ROWS, groups: Callable[[str], str] = leaf, compiled: bool | None = None
    ) -> None:
        check_counts(every, rows)
        self._options: dict[str, Any] = {"every": every, "rows": rows, "groups": groups, "compiled": compiled}
        self._watch: Watch | None = None
        self._numbers: Numbers = {}
        self._evaluation: Numbers = {}
        self._evaluating = ExitStack()
        self._attached = False

    def attach(self, trainer: Any) -> "WatchCallback":
        """Add this callback to ``trainer``, before all that report, and return it.

        Those that come first would get the logs without the numbers.

        Raises: UsageError if it is there already: it would count every step twice.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            raise UsageError("this WatchCallback is attached already, or was given to the Trainer: do one of the two")
        flow = [place for place, one in enumerate(callbacks) if isinstance(one, DefaultFlowCallback)]
        callbacks.insert(max(flow, default=-1) + 1, self)  # after what decides whether this step evaluates
        self._attached = True
        return self

    def close(self) -> None:
        """Remove all hooks: for a training run that ended with an error; one that ended does it itself."""
        self._evaluating.close()
        if self._watch is not None:
            self._watch.close()
        self._watch, self._numbers, self._evaluation = None, {}, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch.

        Raises: NothingWrappedError, SurgeryError as Watch. UsageError if reporters would not get the numbers.
        """
        if args.report_to and not self._attached:
            raise UsageError(
                f"{', '.join(args.report_to)} reports before a callback that was given to the Trainer, and would not "
                "get its numbers: use WatchCallback(...).attach(trainer)"
            )
        self.close()
        if self._options["compiled"] is None and args.torch_compile:
            self._watch = Watch(kwargs["model"], **{**self._options, "compiled": True})
        else:
            self._watch = Watch(kwargs["model"], **self._options)
        if args.eval_on_start:
            self._evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure; watch the evaluation that comes next, if one does."""
        if self._watch is None:
            return
        self._numbers = self._watch.step() or self._numbers
        if control.should_evaluate:
            self._evaluate()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the evaluation that comes next, if one does."""
        if control.should_evaluate:
            self._evaluate()

    def _evaluate(self) -> None:
        if self._watch is not None:
            self._evaluating.close()  # of one that is still open no log told
            self._evaluation = self._evaluating.enter_context(self._watch.evaluation())

    def on_log(self, args: Any, state: Any, control: Any, logs: Numbers | None = None, **kwargs: Any) -> None:
        """Add the numbers to ``logs``, and to the history, which has a copy of them already."""
        if logs is None:
            return
        if any(key.startswith("eval_") for key in logs):
            self._evaluating.close()
            found, self._evaluation = {f"eval_{key}": value for key, value in self._evaluation.items()}, {}
        elif "loss" in logs:  # the log of a step; not the summary at the end
            found, self._numbers = self._numbers, {}
        else:
            return
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self.close()
