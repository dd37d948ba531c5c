"""How strong the noise is at each step: beside the formulas of QeRL and verl, written out here as they have them."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from qsurgeon.errors import UsageError
from qsurgeon.layers.noise import Moment, Strength


def strength(**fields: Any) -> Strength:
    return Strength(**{"sigma_start": 0.05, "sigma_end": 0.0005, "schedule": "exponential", **fields})


def qerl(step: int, steps: int, stages: int, start: float, end: float) -> float:
    """Return what trl_trainer/noise_scheduler.py of QeRL comes to; it divides by zero for two stages."""
    trend = [start * (end / start) ** (place / (stages - 2)) for place in range(stages - 1)]
    stage = math.floor(min(step, steps) / (steps / stages) + 1e-9)
    return 0.0 if stage == 0 else trend[min(stage - 1, stages - 2)]


@pytest.mark.parametrize("stages", [3, 4, 10, 17])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 29, 100])
def test_the_exponential_schedule_is_that_of_qerl(steps: int, stages: int) -> None:
    made = strength(stages=stages)
    found = [made.sigma(Moment(step, steps)) for step in range(steps + 1)]
    assert found == pytest.approx([qerl(step, steps, stages, 0.05, 0.0005) for step in range(steps + 1)])


def test_it_has_ten_stages_unless_told_and_begins_without_noise() -> None:
    found = [strength().sigma(Moment(step, 29)) for step in range(29)]
    assert found[:7] == pytest.approx([0, 0, 0, 0.05, 0.05, 0.05, 0.0281], abs=1e-4)
    assert found[20] == pytest.approx(0.00281, rel=2e-3)
    assert found[27:] == pytest.approx([0.0005, 0.0005])


def verl(step: int, epoch: int, of_epoch: int, epochs: int, values: int, start: float, end: float) -> float:
    """Return the noise of a step of an epoch, as verl's epoch-aware schedule has it."""
    first, last = (start * (end / start) ** (place / epochs) for place in (epoch, epoch + 1))
    stage = math.floor(step / (of_epoch / (values + 1)) + 1e-9)
    return 0.0 if stage == 0 else first * (last / first) ** (min(stage - 1, values - 1) / (values - 1))


@pytest.mark.parametrize(("epochs", "of_epoch"), [(1, 12), (2, 30), (3, 29), (2, 4)])
def test_a_schedule_of_each_epoch_is_that_of_verl(epochs: int, of_epoch: int) -> None:
    made = strength(stages=6, per_epoch=True)
    found = [made.sigma(Moment(step, epochs * of_epoch, epochs)) for step in range(epochs * of_epoch)]
    expected = [verl(at, epoch, of_epoch, epochs, 5, 0.05, 0.0005) for epoch in range(epochs) for at in range(of_epoch)]
    assert found == pytest.approx(expected)


def test_each_epoch_ends_where_the_next_one_begins() -> None:
    made = strength(stages=6, per_epoch=True)
    found = [made.sigma(Moment(step, 60, 2)) for step in range(60)]
    assert [found[5], found[29], found[30], found[35], found[59]] == pytest.approx([0.05, 0.005, 0, 0.005, 0.0005])


def test_a_constant_schedule_has_its_sigma_at_each_step_and_asks_for_no_total() -> None:
    made = Strength(sigma_start=0.01, schedule="constant")
    assert {made.sigma(Moment(step)) for step in (0, 1, 10**6)} == {0.01}
    assert made.sigma(Moment(29, 29)) == 0.01


def test_two_stages_are_one_without_noise_and_one_with() -> None:
    assert [strength(stages=2).sigma(Moment(step, 4)) for step in range(5)] == [0, 0, 0.05, 0.05, 0.05]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]), ("cosine", [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0])],
)
def test_other_schedules_go_from_the_first_step_to_the_last(schedule: str, expected: list[float]) -> None:
    made = Strength(sigma_start=1.0, sigma_end=0.0, schedule=schedule)
    assert [made.sigma(Moment(step, 5)) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_other_schedules_may_have_stages() -> None:
    made = Strength(sigma_start=0.4, sigma_end=0.1, schedule="linear", stages=4)
    assert [made.sigma(Moment(step, 8)) for step in range(8)] == pytest.approx([0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1])


def test_one_step_has_the_noise_of_the_start() -> None:
    assert Strength(sigma_start=0.4, sigma_end=0.1, schedule="linear").sigma(Moment(0, 1)) == 0.4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma_start": 0}, "'sigma_start' is 0, which is no noise: leave the noise section out"),
        ({"sigma_start": -1}, "'sigma_start' must be a finite number from 0 on, got -1"),
        ({"sigma_end": math.inf}, "'sigma_end' must be a finite number from 0 on, got inf"),
        ({"sigma_end": None}, "'schedule: exponential' needs 'sigma_end'; 'schedule: constant' has none"),
        (
            {"sigma_end": 0},
            "an exponential schedule never comes to 0; say a small 'sigma_end', or 'schedule: linear'",
        ),
        (
            {"stages": 1},
            "'stages' must be at least 2, got 1: there would be no stage but the first, which is without noise; "
            "'schedule: constant' has the same noise at each step",
        ),
        (
            {"stages": 1, "schedule": "linear"},
            "'stages' must be at least 2, got 1: there would be no stage but that of 'sigma_start'; "
            "'schedule: constant' has the same noise at each step",
        ),
        ({"schedule": "constant"}, "a constant schedule has no 'sigma_end'; leave it out, or say another 'schedule'"),
        (
            {"schedule": "constant", "sigma_end": None, "stages": 3},
            "a constant schedule has no 'stages'; leave it out, or say another 'schedule'",
        ),
        (
            {"schedule": "cosine", "per_epoch": True},
            "'per_epoch' is of the exponential schedule; this one is cosine",
        ),
    ],
)
def test_what_would_be_no_schedule_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        strength(**fields)
    assert [str(one["ctx"]["error"]) for one in caught.value.errors()] == [message]


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ({"step": -1}, "step=-1: expected a whole number from 0 on"),
        ({"step": 1.0}, "step=1.0: expected a whole number from 0 on"),
        ({"step": True}, "step=True: expected a whole number from 0 on"),
        ({"step": 0, "steps": 0}, "steps=0: expected a whole number from 1 on"),
        ({"step": 0, "steps": 3, "epochs": 0}, "epochs=0: expected a whole number from 1 on"),
        ({"step": 4, "steps": 3}, "step=4 is beyond the last of steps=3; they are counted from 0"),
    ],
)
def test_a_step_that_there_is_not_is_refused(moment: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Moment(**moment)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("made", "moment", "lacks"),
    [
        (strength(), Moment(3), "steps"),
        (strength(per_epoch=True), Moment(3, 10), "epochs"),
    ],
)
def test_a_schedule_says_what_it_needs_to_know(made: Strength, moment: Moment, lacks: str) -> None:
    with pytest.raises(UsageError) as caught:
        made.sigma(moment)
    assert str(caught.value) == (f"the noise has a schedule that needs to know {lacks}=: how many there are in all")


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (strength(), "sigma 0.05 to 0.0005, exponential in 10 stages, in rollout only"),
        (
            strength(per_epoch=True, stages=6),
            "sigma 0.05 to 0.0005, exponential in 6 stages of each epoch, in rollout only",
        ),
        (Strength(sigma_start=0.01, schedule="constant", during="both"), "sigma 0.01"),
        (strength(schedule="linear", during="training"), "sigma 0.05 to 0.0005, linear, in training only"),
    ],
    ids=["staged", "epochs", "constant", "linear"],
)
def test_it_says_itself_in_words(made: Strength, text: str) -> None:
    assert str(made) == text
