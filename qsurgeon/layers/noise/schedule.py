"""How strong the noise of a recipe is, by the step of training. Pure.

The exponential schedule is that of QeRL (arXiv 2510.11696, trl_trainer/noise_scheduler.py), also in the form that
begins again with each epoch (verl). Where those divide by zero or come to no noise at all, there is an error here.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

from qsurgeon.errors import UsageError
from qsurgeon.words import Phases

Schedule = Literal["constant", "linear", "cosine", "exponential"]
STAGES = 10  # of the exponential schedule, where a recipe does not say: QeRL's
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Moment:
    """A step of training, counted from 0, of so many in so many epochs; None where that is not known.

    Raises: UsageError for a step that there is not.
    """

    step: int
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("step", self.step, 0), ("steps", self.steps, 1), ("epochs", self.epochs, 1)):
            if value is None and name != "step":
                continue
            if type(value) is not int or value < least:
                raise UsageError(f"{name}={value!r}: expected a whole number from {least} on")
        if self.steps is not None and self.step > self.steps:
            raise UsageError(f"step={self.step} is beyond the last of steps={self.steps}; they are counted from 0")


class Strength(BaseModel):
    """The standard deviation of the noise, which is added to the weight of a norm, over the steps of training.

    A default is what a checkpoint means that was written before the field existed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigma_start: float = Field(description="Standard deviation at the first step with noise, in units of the weight.")
    sigma_end: float | None = Field(None, description="Standard deviation at the last step; not of a constant one.")
    schedule: Schedule = Field(
        description="How it goes from start to end; exponential: in stages, the first without noise."
    )
    stages: int | None = Field(
        None, description=f"In how many steps of equal length it changes; {STAGES} if exponential, else at each step."
    )
    per_epoch: StrictBool = Field(False, description="Let the stages of an exponential schedule begin with each epoch.")
    during: Phases = Field("rollout", description="When there is noise: in rollouts, in training, or in both.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Another one gives other noise.")

    @field_validator("sigma_start", "sigma_end")
    @classmethod
    def _is_a_deviation(cls, value: float | None, info: Any) -> float | None:
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"'{info.field_name}' must be a finite number from 0 on, got {value:g}")
        if value == 0 and info.field_name == "sigma_start":
            raise ValueError("'sigma_start' is 0, which is no noise: leave the noise section out")
        return value

    @model_validator(mode="after")
    def _goes_somewhere(self) -> "Strength":
        if self.schedule == "constant":
            self._refuse_without_effect()
        elif self.sigma_end is None:
            raise ValueError(f"'schedule: {self.schedule}' needs 'sigma_end'; 'schedule: constant' has none")
        if self.schedule == "exponential" and self.sigma_end == 0:
            raise ValueError("an exponential schedule never comes to 0; say a small 'sigma_end', or 'schedule: linear'")
        if self.stages is not None and self.stages < 2:
            alone = "the first, which is without noise" if self.schedule == "exponential" else "that of 'sigma_start'"
            raise ValueError(
                f"'stages' must be at least 2, got {self.stages}: there would be no stage but {alone}; "
                "'schedule: constant' has the same noise at each step"
            )
        if self.per_epoch and self.schedule != "exponential":
            raise ValueError(f"'per_epoch' is of the exponential schedule; this one is {self.schedule}")
        return self

    def _refuse_without_effect(self) -> None:
        said = [name for name in ("sigma_end", "stages") if getattr(self, name) is not None]
        if said:
            raise ValueError(f"a constant schedule has no '{said[0]}'; leave it out, or say another 'schedule'")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a moment has to say, beside the step, for the schedule to be known."""
        if self.schedule == "constant":
            return ()
        return ("steps", "epochs") if self.per_epoch else ("steps",)

    def sigma(self, moment: Moment) -> float:
        """Return the standard deviation at ``moment``, of a norm whose multiplier is 1.

        Raises: UsageError if ``moment`` does not say what the schedule needs.
        """
        for name in self.needs:
            if getattr(moment, name) is None:
                raise UsageError(f"the noise has a schedule that needs to know {name}=: how many there are in all")
        start, end, steps = self.sigma_start, self.sigma_end, moment.steps
        if steps is None or end is None:
            return start
        if self.schedule == "exponential":
            return self._staged(start, end, moment.step, steps, moment.epochs or 1)
        return _between(start, end, self._progress(moment.step, steps), cosine=self.schedule == "cosine")

    def _progress(self, step: int, steps: int) -> float:
        """Return how far the schedule has come, from 0 at the first step to 1 at the last."""
        parts = self.stages or steps
        part = min(step * parts // steps, parts - 1)
        return part / (parts - 1) if parts > 1 else 0.0

    def _staged(self, start: float, end: float, step: int, steps: int, epochs: int) -> float:
        """Return the deviation in the stage of a step; there are as many values between the ends as stages, but one."""
        stages = self.stages or STAGES
        if self.per_epoch:
            epoch = min(step * epochs // steps, epochs - 1)
            start, end = (start * (end / start) ** (place / epochs) for place in (epoch, epoch + 1))
            stage = (step * epochs - epoch * steps) * stages // steps
        else:
            stage = step * stages // steps
        stage = min(stage, stages - 1)
        if stage == 0:
            return 0.0
        return start * (end / start) ** ((stage - 1) / (stages - 2)) if stages > 2 else start

    def __str__(self) -> str:
        when = "" if self.during == "both" else f", in {self.during} only"
        if self.sigma_end is None:
            return f"sigma {self.sigma_start:g}{when}"
        stages = self.stages or (STAGES if self.schedule == "exponential" else None)
        staged = f" in {stages} stages{' of each epoch' if self.per_epoch else ''}" if stages else ""
        return f"sigma {self.sigma_start:g} to {self.sigma_end:g}, {self.schedule}{staged}{when}"


def _between(start: float, end: float, progress: float, *, cosine: bool) -> float:
    share = (1 - math.cos(math.pi * progress)) / 2 if cosine else progress
    return start + (end - start) * share


class Noise(Strength):
    """The noise of one model: how strong it is, and the multiplier of each norm that has some, by the norm's name."""

    modules: dict[str, float]
