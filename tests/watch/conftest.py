"""What tests of watching share: a wrapped model of two layers, one step of its training, its hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qsurgeon
from qsurgeon.recipe import Recipe, Rule


def make_recipe(**rule: Any) -> Recipe:
    return Recipe(version=1, rules=(Rule(target=("layers",), **rule),))


@pytest.fixture(scope="session")
def recipe() -> Callable[..., Recipe]:
    """Return a maker of recipes with one rule for all layers; its keywords are the rule's."""
    return make_recipe


@pytest.fixture
def model(make_qwen2: Callable[..., Any]) -> Any:
    made = make_qwen2(num_hidden_layers=2)
    return qsurgeon.apply(make_recipe(weight="nvfp4", input="mxfp4"), made).train()


@pytest.fixture(scope="session")
def hooks() -> Callable[[nn.Module], int]:
    """Return what counts the hooks of a model."""
    return lambda model: sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.fixture(scope="session")
def train() -> Callable[[Any], None]:
    """Return what trains a model for one step."""
    ids = torch.arange(24).view(2, 12)

    def step(model: Any, lr: float = 1e-2) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad.sign()
                    parameter.grad = None

    return step
