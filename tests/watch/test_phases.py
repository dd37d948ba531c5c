"""Watch where rules have phases: what does not round in the phase at hand is not off by mistake, and is said to be."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import qsurgeon
from qsurgeon.layers import quant_layers
from qsurgeon.recipe import Recipe, Rule

IDS = torch.arange(1, 25).view(2, 12)
Numbers = dict[str, float]


def apply(model: Any, *phases: str) -> Any:
    """Return the model with a rule for each of its layers."""
    rules = tuple(
        Rule(name=f"rule {number}", target=(f"layers.{number}",), weight="mxfp4", input="mxfp4", phases=one)
        for number, one in enumerate(phases)
    )
    return qsurgeon.apply(Recipe(version=1, rules=rules), model)


@pytest.fixture
def plain(make_qwen2: Callable[..., Any]) -> Any:
    return make_qwen2(num_hidden_layers=2)


def watched(model: Any, *calls: Callable[[Any], Any]) -> Numbers:
    with qsurgeon.Watch(model, every=1) as watch:
        for call in calls:
            call(model)
        numbers = watch.step()
    return {key.removeprefix("qsurgeon/"): numbers[key] for key in list(numbers)[:3]}


def train(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


def roll_out(model: Any) -> None:
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("phases", "calls", "active", "in_phase"),
    [
        (("rollout", "rollout"), (train,), 1.0, 0.0),
        (("training", "training"), (train,), 1.0, 1.0),
        (("rollout", "rollout"), (roll_out,), 1.0, 1.0),
        (("training", "training"), (roll_out,), 1.0, 0.0),
        (("both", "rollout"), (train,), 1.0, 0.5),
        (("training", "rollout"), (roll_out, train), 1.0, 1.0),
        (("training", "rollout"), (train, roll_out), 1.0, 1.0),
        (("rollout", "rollout"), (), 0.0, 0.0),
    ],
)
def test_what_does_as_its_rule_says_in_the_phase_is_active(
    plain: Any, phases: tuple[str, ...], calls: tuple[Any, ...], active: float, in_phase: float
) -> None:
    numbers = watched(apply(plain, *phases), *calls)
    assert numbers == {"called": float(bool(calls)), "active": active, "in_phase": in_phase}


def test_without_phases_there_is_no_such_number(plain: Any) -> None:
    assert "in_phase" not in watched(apply(plain, "both", "both"), train)


def _off(layer: Any) -> Callable[[Any], Any]:
    return lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def _always(layer: Any) -> Callable[[Any], Any]:
    def rounded(x: Any) -> Any:
        with qsurgeon.phase("rollout"):
            return type(layer).forward(layer, x)

    return rounded


@pytest.mark.parametrize(
    ("broken", "block", "in_phase"),
    [(_off, lambda: qsurgeon.phase("rollout"), 1.0), (_always, nullcontext, 0.0)],
    ids=["does not round", "rounds"],
)
def test_a_layer_that_does_other_than_its_rule_says_is_not_active(
    plain: Any, broken: Any, block: Callable[[], AbstractContextManager[Any]], in_phase: float
) -> None:
    model = apply(plain, "rollout", "rollout")
    for name, layer in quant_layers(model).items():
        if "layers.0" in name:
            layer.forward = broken(layer)
    with block():
        numbers = watched(model, train)
    assert numbers == {"called": 1.0, "active": 0.5, "in_phase": in_phase}


def test_a_model_that_is_disabled_in_its_phase_is_not_active(plain: Any) -> None:
    model = apply(plain, "training", "training")
    with qsurgeon.disabled(model):
        assert watched(model, train) == {"called": 1.0, "active": 0.0, "in_phase": 1.0}


def test_an_evaluation_says_so_too(plain: Any) -> None:
    model = apply(plain, "rollout", "rollout")
    with qsurgeon.Watch(model, every=1) as watch, torch.no_grad(), watch.evaluation() as numbers:
        model(input_ids=IDS)
    assert numbers == {"qsurgeon/called": 1.0, "qsurgeon/active": 1.0, "qsurgeon/in_phase": 0.0}
