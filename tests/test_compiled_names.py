"""What torch.compile puts into a model, wherever it stands: in plans and reports, saved, calibrated and watched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model
from torch import nn

import qsurgeon
from qsurgeon.layers import quant_layers
from qsurgeon.layers.compiling import is_compiled, uncompiled
from qsurgeon.recipe import Recipe
from qsurgeon.surgery import inventory, plain_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it imports its compiler
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # and while it traces
]

Make = Callable[..., Any]
TOKENS = torch.arange(1, 9)[None]


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def whole(model: Any) -> Any:
    return compiled(model)


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def regions(model: Any) -> Any:
    return compile_regions(model, backend="eager")


def backbone(model: Any) -> Any:
    model.model = compiled(model.model)
    return model


def blocks(model: Any) -> Any:
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = compiled(block)
    return model


def layers(model: Any) -> Any:
    for block in model.model.layers:
        block.mlp.down_proj = compiled(block.mlp.down_proj)
    return model


def twice(model: Any) -> Any:
    return compiled(backbone(blocks(model)))


WAYS = [whole, in_place, regions, backbone, blocks, layers, twice]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
some_ways = pytest.mark.parametrize("way", [backbone, regions], ids=lambda way: way.__name__)  # those that compute


def recipe(storage: str = "master", **format: Any) -> Recipe:
    rules = [{"name": "all", "target": ["model.layers"], "exclude": ["layers.0"], "weight": "mxfp4", "input": "mine"}]
    fields = {"version": 1, "storage": storage, "formats": {"mine": {"like": "mxfp4", **format}}, "rules": rules}
    return Recipe.model_validate(fields)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@each_way
def test_modules_have_the_names_of_the_plain_model(small_model: Make, way: Callable[[Any], Any]) -> None:
    model = way(small_model())
    found, expected = inventory(model), inventory(small_model())
    assert [(one.name, one.kind, one.shape, one.parameters) for one in found] == [
        (one.name, one.kind, one.shape, one.parameters) for one in expected
    ]
    for one in found:
        assert type(model.get_submodule(one.path)).__name__ == one.kind
    path, plain = plain_model(model)
    assert model.get_submodule(path) is plain


@each_way
@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_recipe_applied_after_wraps_what_it_wraps_before(
    small_model: Make, way: Callable[[Any], Any], storage: str
) -> None:
    model, expected = (
        qsurgeon.apply(recipe(storage), way(small_model())),
        qsurgeon.apply(recipe(storage), small_model()),
    )
    assert len(quant_layers(model)) == len(quant_layers(expected)) == 7
    if way in (layers, regions):
        assert torch.equal(logits(model), logits(expected))
    assert str(qsurgeon.inspect(model).summary) == str(qsurgeon.inspect(expected).summary)
    assert [row.module for row in qsurgeon.inspect(model).rows] == [
        row.module for row in qsurgeon.inspect(expected).rows
    ]


@some_ways
def test_an_example_calls_every_wrapped_layer(small_model: Make, way: Callable[[Any], Any]) -> None:
    model = way(qsurgeon.apply(recipe(), small_model()))
    logits(model)  # compiled by now, without the hooks that an example needs
    rows = [row for row in qsurgeon.inspect(model, {"input_ids": TOKENS}).rows if row.called is not None]
    assert [row.called for row in rows] == [True] * 7


@each_way
@pytest.mark.parametrize("storage", ["master", "packed"])
def test_what_is_saved_has_the_names_of_the_plain_model(
    small_model: Make, way: Callable[[Any], Any], storage: str, tmp_path: Path
) -> None:
    for first in (True, False):
        model = small_model()
        model = way(qsurgeon.apply(recipe(storage), model)) if first else qsurgeon.apply(recipe(storage), way(model))
        names = [name for name, _ in model.named_modules()]
        folder = tmp_path / str(first)
        model.save_pretrained(folder)
        assert [name for name, _ in model.named_modules()] == names
        again = qsurgeon.load(folder)
        assert not is_compiled(again)
        assert torch.equal(logits(again), logits(qsurgeon.apply(recipe(storage), small_model())))


@some_ways
def test_static_scales_are_found_in_a_model_that_was_compiled(small_model: Make, way: Callable[[Any], Any]) -> None:
    static = {"like": "nvfp4", "tensor_scale": "static"}
    model, expected = (qsurgeon.apply(recipe(**static), one) for one in (way(small_model()), small_model()))
    for one in (model, expected):
        qsurgeon.calibrate(one, [{"input_ids": TOKENS}])
    found = [layer.quantization.static_scales for layer in quant_layers(model).values()]
    assert found == [layer.quantization.static_scales for layer in quant_layers(expected).values()]
    assert all(found)
    # The numbers of a model that has run, compiled, before.
    logits(model)
    qsurgeon.calibrate(model, [{"input_ids": TOKENS.flip(-1)}])
    qsurgeon.calibrate(expected, [{"input_ids": TOKENS.flip(-1)}])
    assert torch.equal(logits(model), logits(expected))


@some_ways
def test_watching_sees_every_layer_and_groups_them_by_their_plain_names(
    small_model: Make, way: Callable[[Any], Any]
) -> None:
    model, seen = way(qsurgeon.apply(recipe(), small_model())), []

    def group(name: str) -> str:
        seen.append(name)
        return name.rpartition(".")[2]

    with qsurgeon.Watch(model, every=1, groups=group) as watch:
        model(TOKENS, labels=TOKENS).loss.backward()
        numbers = watch.step()
    assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 1.0)
    assert not any("_orig_mod" in name for name in (*seen, *numbers))


def test_an_adapter_that_computes_past_a_compiled_layer_is_found(small_model: Make) -> None:
    model = qsurgeon.apply(recipe("packed"), small_model())
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for block in adapted.base_model.model.model.layers:
        block.mlp.down_proj.base_layer = compiled(block.mlp.down_proj.base_layer)
    names = [module.name for module in inventory(adapted) if module.type]
    assert names == [module.name for module in inventory(small_model()) if module.type]


def test_parts_are_compiled_again_after_the_block_and_after_an_error(small_model: Make) -> None:
    model = backbone(blocks(small_model()))
    before = [type(module).__name__ for module in model.modules()]
    inside: list[str] = []

    def fail() -> None:
        with uncompiled(model):
            inside.extend(type(module).__name__ for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [type(module).__name__ for module in small_model().modules()]
    assert [type(module).__name__ for module in model.modules()] == before
