"""What tests of packed weights share: a recipe, a packed folder, an adapter, what is compared."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import qsurgeon
from qsurgeon.recipe import Recipe

TOKENS = torch.arange(1, 13).reshape(2, 6)
ADAPTER = {"r": 4, "target_modules": "all-linear", "lora_alpha": 8, "task_type": "CAUSAL_LM"}

Maker = Callable[..., Any]


def make_recipe(storage: str = "packed", **fields: Any) -> Recipe:
    rules = [{"target": ["layers"], "exclude": ["layers.0.mlp?"], "weight": "nvfp4", "input": "mxfp4"}]
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": rules, **fields})


@pytest.fixture(scope="session")
def recipe() -> Callable[..., Recipe]:
    """Return a maker of recipes: ``storage``, packed unless told otherwise, and fields in place of its own."""
    return make_recipe


@pytest.fixture(scope="session")
def folder(small_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with packed weights. It is shared: copy it before changing it."""
    path = tmp_path_factory.mktemp("packed") / "packed"
    qsurgeon.apply(make_recipe(), small_model()).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A packed folder to change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def logits() -> Callable[[Any], Tensor]:
    """Return what computes a model's logits, without gradients."""

    def compute(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(TOKENS).logits
        return found

    return compute


@pytest.fixture(scope="session")
def different() -> Callable[[nn.Module, nn.Module], list[str]]:
    """Return what names the tensors of two models that are not the same to the bit."""

    def compare(one: nn.Module, other: nn.Module) -> list[str]:
        first, second = one.state_dict(), other.state_dict()
        assert first.keys() == second.keys()
        return [
            key for key in first if first[key].dtype != second[key].dtype or not torch.equal(first[key], second[key])
        ]

    return compare


@pytest.fixture(scope="session")
def moved() -> Callable[[Any], Any]:
    """Return what moves the weights that a model trains away from where they began, and returns the model."""

    def move(model: Any) -> Any:
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        return model

    return move


@pytest.fixture(scope="session")
def adapted(moved: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return what puts a LoRA adapter on a model, always the same, and not the zero that peft begins with."""

    def adapt(model: Any, autocast: bool = True, **fields: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(**{**ADAPTER, **fields})
        return moved(peft.get_peft_model(model, config, autocast_adapter_dtype=autocast))

    return adapt


@pytest.fixture(scope="session")
def step() -> Callable[[Any], tuple[Tensor, dict[str, Tensor]]]:
    """Return what runs a model forward and backward: the logits, and the gradients by name."""

    def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        output = model(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    return run
