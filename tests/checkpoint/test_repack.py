"""A trained model with master weights is packed as it is, and computes what it did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qsurgeon
from qsurgeon.checkpoint import Options, rewrite
from qsurgeon.errors import CheckpointError, PlanError, SurgeryError
from qsurgeon.layers import PackedLinear, QuantLinear, packed_layers, quant_layers
from qsurgeon.recipe import Recipe

Maker = Callable[..., Any]

TOKENS = torch.arange(1, 13).reshape(2, 6)
FORMATS = {
    "static": {"like": "nvfp4", "tensor_scale": "static"},
    "turned": {"like": "mxfp4", "hadamard": 16},
    "also-mxfp4": {"like": "mxfp4"},
}
DOWN = "model.layers.0.mlp.down_proj"


def recipe(storage: str, **rule: Any) -> Recipe:
    rules = [{"target": ["layers"], "weight": "mxfp4", "input": "mxfp4", **rule}]
    return Recipe.model_validate({"version": 1, "storage": storage, "formats": FORMATS, "rules": rules})


def trained(model: Any) -> Any:
    """Take a step that moves every weight."""
    model(TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD(model.parameters(), 0.5).step()
    model.zero_grad()
    return model


@pytest.fixture
def master(small_model: Maker) -> Any:
    return trained(qsurgeon.apply(recipe("master"), small_model()))


@pytest.fixture
def folder(master: Any, tmp_path: Path) -> Path:
    master.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    "rule",
    [{}, {"weight": "nvfp4"}, {"weight": "turned", "input": "turned"}, {"input": None}, {"weight": None}],
    ids=str,
)
@pytest.mark.parametrize("live", [False, True], ids=["rewrite", "apply"])
def test_what_was_trained_is_packed_and_computes_the_same_to_the_bit(
    small_model: Maker, tmp_path: Path, rule: dict[str, Any], live: bool
) -> None:
    model = trained(qsurgeon.apply(recipe("master", **rule), small_model()))
    expected = logits(model)
    assert not torch.equal(expected, logits(qsurgeon.apply(recipe("master", **rule), small_model())))
    model.save_pretrained(tmp_path / "trained")
    if live:
        assert qsurgeon.apply(recipe("packed", **rule), model) is model
        model.save_pretrained(tmp_path / "packed")
        assert torch.equal(logits(model), expected)
    else:
        rewrite(recipe("packed", **rule), tmp_path / "trained", tmp_path / "packed")
    loaded = qsurgeon.load(tmp_path / "packed")
    assert len(quant_layers(loaded)) == 14
    assert len(packed_layers(loaded)) == (14 if rule.get("weight", "") is not None else 0)
    assert torch.equal(logits(loaded), expected)


def test_the_names_of_rules_and_formats_may_differ(folder: Path, master: Any, tmp_path: Path) -> None:
    rewrite(recipe("packed", name="mine", weight="also-mxfp4"), folder, tmp_path / "packed")
    assert torch.equal(logits(qsurgeon.load(tmp_path / "packed")), logits(master))


@pytest.mark.parametrize("live", [False, True], ids=["rewrite", "apply"])
def test_static_scales_stay_what_calibration_found(small_model: Maker, tmp_path: Path, live: bool) -> None:
    model = qsurgeon.apply(recipe("master", weight="nvfp4", input="static"), small_model())
    qsurgeon.calibrate(model, [{"input_ids": TOKENS}])
    expected = logits(trained(model))
    model.save_pretrained(tmp_path / "trained")
    packed = recipe("packed", weight="nvfp4", input="static")
    if live:
        qsurgeon.apply(packed, model).save_pretrained(tmp_path / "packed")
    else:
        rewrite(packed, tmp_path / "trained", tmp_path / "packed")
    loaded = qsurgeon.load(tmp_path / "packed")
    assert torch.equal(logits(loaded), expected)
    before, after = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("trained", "packed"))
    assert after["quantization_config"]["static_scales"] == before["quantization_config"]["static_scales"]
    assert len(before["quantization_config"]["static_scales"]) == 14


def test_where_the_model_came_from_stays_known(small_model: Maker, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "base")
    rewrite(recipe("master"), tmp_path / "base", tmp_path / "master")
    rewrite(recipe("packed"), tmp_path / "master", tmp_path / "packed", options=Options(workers=1))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["source"] == "base"
    assert config["quantization_config"]["storage"] == "packed"
    assert json.loads((tmp_path / "packed" / "qsurgeon-plan.json").read_text())["source"] == "base"


def test_a_plan_of_a_trained_folder_says_what_would_be_packed(folder: Path, master: Any) -> None:
    for model in (folder, master):
        plan = qsurgeon.plan(recipe("packed"), model)
        assert [step.module.name for step in plan.wrapped] == list(quant_layers(master))


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "weight": (
        {"weight": "nvfp4"},
        "the weight of model.layers.0.self_attn.q_proj is rounded to mxfp4 (element e2m1, block 32, scale e8m0), and "
        "would be to nvfp4 (element e2m1, block 16, scale e4m3); the weight of model.layers.0.self_attn.k_proj",
    ),
    "input": (
        {"input": None},
        "the input of model.layers.0.self_attn.q_proj is rounded to mxfp4 (element e2m1, block 32, scale e8m0), and "
        "would be to nothing; ",
    ),
    "fewer": ({"exclude": [DOWN]}, f"{DOWN} is wrapped, and would not be. To"),
    "more": ({"target": ["**"]}, "lm_head is not wrapped, and would be. To"),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("live", [False, True], ids=["rewrite", "apply"])
def test_a_recipe_that_says_something_else_is_refused_with_what_that_is(
    folder: Path, master: Any, tmp_path: Path, name: str, live: bool
) -> None:
    rule, difference = DIFFERENT[name]
    before = logits(master)
    changed = recipe("packed", **rule)
    with pytest.raises(SurgeryError if live else CheckpointError) as caught:
        _ = qsurgeon.apply(changed, master) if live else rewrite(changed, folder, tmp_path / "packed")
    start = (
        f"{'the model' if live else folder} was rewritten by qsurgeon already, and the recipe is not the one that its "
        f"weights are rounded by: {difference}"
    )
    assert str(caught.value)[: len(start)] == start
    assert str(caught.value).endswith(
        "To pack them, take the recipe in its config.json and change nothing but the storage. To round them otherwise, "
        "which is another model than was trained, remove quantization_config from the config.json of a copy: they are "
        "in full precision"
    )
    assert not (tmp_path / "packed").exists()
    assert not packed_layers(master)
    assert torch.equal(logits(master), before)


def test_what_rounds_in_one_phase_cannot_be_packed(small_model: Maker) -> None:
    model = qsurgeon.apply(recipe("master", phases="rollout"), small_model())
    with pytest.raises(PlanError, match="a packed weight is rounded in every phase"):
        qsurgeon.apply(recipe("packed", phases="rollout"), model)
    with pytest.raises(
        SurgeryError, match=r"phases of model\.layers\.0\.self_attn\.q_proj is rollout, and would be both; "
    ):
        qsurgeon.apply(recipe("packed"), model)


def test_a_packed_folder_is_not_packed_again(folder: Path, tmp_path: Path) -> None:
    rewrite(recipe("packed"), folder, tmp_path / "packed")
    with pytest.raises(CheckpointError) as caught:
        rewrite(recipe("packed"), tmp_path / "packed", tmp_path / "again")
    assert str(caught.value) == (
        f"{tmp_path}/packed was rewritten by qsurgeon already; apply the recipe to the model it came from"
    )
    with pytest.raises(SurgeryError) as live:
        qsurgeon.apply(recipe("packed"), qsurgeon.load(tmp_path / "packed"))
    assert str(live.value) == (
        "the model was rewritten by qsurgeon already; apply the recipe to the model it came from"
    )


def test_a_live_model_that_cannot_be_packed_stays_wrapped(master: Any) -> None:
    layer = master.get_submodule(DOWN)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to("meta"))
    layer._hf_hook = object()  # as if it were offloaded
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply(recipe("packed"), master)
    assert str(caught.value) == (
        f"{DOWN} cannot be wrapped: its weight is offloaded, and its values are not here to be packed"
    )
    assert [type(one) for one in quant_layers(master).values()] == [QuantLinear] * 14
    assert master.config.quantization_config.record.storage == "master"


def test_a_packed_weight_is_never_unwrapped(small_model: Maker) -> None:
    model = qsurgeon.apply(recipe("packed"), small_model())
    with pytest.raises(SurgeryError) as caught, qsurgeon.surgery.unwrapped(model):
        pass
    assert str(caught.value) == (
        "the weight of model.layers.0.self_attn.q_proj is packed: it cannot become a plain layer's again"
    )
    assert all(isinstance(one, PackedLinear) for one in quant_layers(model).values())
