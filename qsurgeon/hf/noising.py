"""transformers' Trainer, and those of TRL, name each step of training to the norms that have noise.

Nothing is to be done for it: ``Trainer.train`` adds a callback where the model has such norms. The noise lasts from the
beginning of a step to its end, rollouts that a step makes included; an evaluation comes after it, and has none.
"""

from contextlib import ExitStack
from math import ceil
from typing import Any

from transformers import Trainer, TrainerCallback

from qsurgeon.layers.noise import Moment, noise, noisy_norms
from qsurgeon.patching import Method, patch

SIGMA = "qsurgeon/noise_sigma"


class NoiseCallback(TrainerCallback):
    """Names the steps of a Trainer, and logs sigma, of a norm whose multiplier is 1, as ``qsurgeon/noise_sigma``."""

    def __init__(self) -> None:
        self._step = ExitStack()
        self._sigma: float | None = None

    def close(self) -> None:
        """End the step that has begun, if one has."""
        self._step.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin a step. Epochs count as equally long."""
        self.close()
        norm = next(iter(noisy_norms(model).values()))
        epochs = max(1, ceil(state.num_train_epochs))
        moment = Moment(state.global_step, state.max_steps, epochs)
        self._step.enter_context(noise(model, **vars(moment)))
        self._sigma = norm.noise.strength.sigma(moment)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step."""
        self.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add sigma of the last step to the log of a step, and to the history, which has a copy of it already."""
        if logs is None or "loss" not in logs or self._sigma is None:
            return
        logs[SIGMA] = self._sigma
        if state.log_history:
            state.log_history[-1][SIGMA] = self._sigma


def _naming(train: Method) -> Method:
    def train_with_noise(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not noisy_norms(self.model):
            return train(self, *args, **kwargs)
        callback = NoiseCallback()
        callbacks = self.callback_handler.callbacks
        callbacks.insert(0, callback)  # before all that may evaluate at the end of a step, or report
        try:
            return train(self, *args, **kwargs)
        finally:
            callback.close()
            callbacks.remove(callback)

    return train_with_noise


patch(Trainer, "train", _naming)
