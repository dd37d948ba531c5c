import json
from collections.abc import Callable
from typing import Any

import pytest

import qsurgeon
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import get_format
from qsurgeon.formats.fields import FIELDS
from qsurgeon.layers import Quantization
from qsurgeon.recipe import FormatSpec, Recipe, Rule
from qsurgeon.surgery import Excluded, Record, inventory, read_record, record_of

NEWER = f" (written by qsurgeon 1.2.3, and this is {qsurgeon.__version__}: install qsurgeon 1.2.3 or newer)"
RECIPE = Recipe(
    version=1,
    formats={"g8": FormatSpec(like="mxfp4", block=8)},
    rules=(
        Rule(name="first", target=("layers.0",), exclude=("self_attn", "down_proj"), weight="nvfp4", input="g8"),
        Rule(target=("layers.-1",), exclude=("mlp",), weight="g8", gradient="clipped", phases="rollout"),
    ),
)


@pytest.fixture
def record(tiny_qwen2: Any) -> Record:
    return record_of(qsurgeon.plan(RECIPE, tiny_qwen2), "1.2.3", "me/tiny")


@pytest.fixture
def data(record: Record) -> dict[str, Any]:
    """The record as config.json keeps it."""
    kept: dict[str, Any] = json.loads(json.dumps(record.to_dict()))
    return kept


def attention(layer: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn.{one}_proj" for one in "qkvo"]


PLAIN = {"static_scale": "none", "rounding": "nearest", "hadamard": "none", "four_over_six": False, "seed": 0}


def test_a_record_holds_module_names_and_formats_in_full(data: dict[str, Any]) -> None:
    assert data == {
        "version": 1,
        "qsurgeon_version": "1.2.3",
        "storage": "master",
        "formats": {
            "nvfp4": {
                "element": "e2m1",
                "block": 16,
                "scale": "e4m3",
                "scale_rule": "nearest",
                "tensor_scale": "by_role",
                **PLAIN,
            },
            "g8": {
                "element": "e2m1",
                "block": 8,
                "scale": "e8m0",
                "scale_rule": "floor",
                "tensor_scale": "none",
                **PLAIN,
            },
        },
        "static_scales": {},
        "saved_inputs": "packed",
        "source": "me/tiny",
        "recipe": RECIPE.text,
        "rules": [
            {
                "name": "first",
                "weight": "nvfp4",
                "input": "g8",
                "gradient": "ste",
                "phases": "both",
                "modules": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
                "excluded": {"self_attn": attention(0), "down_proj": ["model.layers.0.mlp.down_proj"]},
            },
            {
                "name": "rule 2",
                "weight": "g8",
                "input": None,
                "gradient": "clipped",
                "phases": "rollout",
                "modules": attention(2),
                "excluded": {"mlp": [f"model.layers.2.mlp.{one}_proj" for one in ("gate", "up", "down")]},
            },
        ],
    }


def test_a_record_is_the_same_after_json(record: Record, data: dict[str, Any]) -> None:
    assert read_record(data, "config.json") == record


def test_a_record_gives_back_how_each_module_computes(data: dict[str, Any], tiny_qwen2: Any) -> None:
    planned = {step.module.name: step.quantization for step in qsurgeon.plan(RECIPE, tiny_qwen2).wrapped}
    assert read_record(data, "config.json").quantizations() == planned


def test_a_record_gives_back_what_excluded_each_module(data: dict[str, Any], tiny_qwen2: Any) -> None:
    steps = qsurgeon.plan(RECIPE, tiny_qwen2).steps
    planned = {step.module.name: step.fate for step in steps if isinstance(step.fate, Excluded)}
    assert read_record(data, "config.json").exclusions() == planned


def test_a_record_names_formats_that_the_catalogue_may_not_have(data: dict[str, Any]) -> None:
    data["formats"]["later"] = data["formats"].pop("nvfp4")
    data["rules"][0]["weight"] = "later"
    weight = read_record(data, "config.json").quantizations()["model.layers.0.mlp.up_proj"].weight
    assert weight is not None
    assert (weight.name, weight.to_dict()) == ("later", get_format("nvfp4").to_dict())


def test_a_record_without_source_and_recipe_is_read(data: dict[str, Any], record: Record) -> None:
    del data["source"], data["recipe"]
    assert read_record(data, "config.json") == record.model_copy(update={"source": "", "recipe": ""})


def test_the_quant_method_is_no_part_of_a_record(record: Record, data: dict[str, Any]) -> None:
    assert read_record({"quant_method": "qsurgeon", **data}, "config.json") == record


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(put("zebra", value=1), "zebra: unknown key", id="at-the-top"),
        pytest.param(put("rules", 1, "zebra", value=1), "rules.1.zebra: unknown key", id="in-a-rule"),
        pytest.param(put("version", value=3), "version is 3; expected a whole number from 1 to 2", id="version"),
        pytest.param(put("storage", value="thin"), "storage: Input should be 'master' or 'packed'", id="storage"),
        pytest.param(
            put("rules", 0, "gradient", value="stee"),
            "rules.0.gradient: Input should be 'ste', 'clipped' or 'none'",
            id="gradient",
        ),
        pytest.param(put("rules", value=None), "rules: Input should be a valid tuple", id="no-list"),
    ],
)
def test_what_a_record_cannot_say_is_an_error_at_its_place(
    data: dict[str, Any], change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    change(data)
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json")
    assert str(caught.value) == f"config.json: quantization_config.{expected}{NEWER}"


@pytest.mark.parametrize("key", ["version", "qsurgeon_version", "storage", "formats", "rules"])
def test_what_a_record_lacks_is_an_error(data: dict[str, Any], key: str) -> None:
    del data[key]
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json")
    assert (
        str(caught.value)
        == f"config.json: quantization_config.{key}: Field required{NEWER if key != 'qsurgeon_version' else ''}"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(
            put("formats", "g8", "element", value="e2m2"), "no element 'e2m2'; did you mean 'e5m2'?", id="element"
        ),
        pytest.param(
            put("formats", "g8", "scale", value="e4m3"),
            "scale rule 'floor' does not go with scale e4m3; expected one of: nearest",
            id="fields-that-do-not-combine",
        ),
    ],
)
def test_a_format_that_cannot_be_is_an_error(
    data: dict[str, Any], change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    change(data)
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json").quantizations()
    assert str(caught.value) == f"quantization_config: {expected}{NEWER}"


def test_a_block_that_is_no_number_is_an_error(data: dict[str, Any]) -> None:
    data["formats"]["g8"]["block"] = "many"
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json").quantizations()
    assert str(caught.value) == (
        f"quantization_config: block is 'many'; expected a whole number, two of them [rows, columns], or none{NEWER}"
    )


def test_a_field_that_no_format_has_is_an_error(data: dict[str, Any]) -> None:
    data["formats"]["g8"]["zebra"] = 1
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json")
    assert str(caught.value) == f"config.json: quantization_config.formats.g8.zebra: unknown key{NEWER}"


def test_a_format_that_a_record_lacks_is_an_error_that_says_so(data: dict[str, Any]) -> None:
    del data["formats"]["g8"]
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json").quantizations()
    assert str(caught.value) == f"quantization_config: no format 'g8'; expected one of: nvfp4{NEWER}"


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_a_format_lacks_is_an_error_and_never_filled_in(data: dict[str, Any], field: str) -> None:
    del data["formats"]["g8"][field]
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json")
    assert str(caught.value) == f"config.json: quantization_config.formats.g8.{field}: Field required{NEWER}"


def test_a_record_is_of_the_modules_that_its_plan_wraps(record: Record, tiny_qwen2: Any) -> None:
    names = {module.name for module in inventory(tiny_qwen2)}
    assert set(record.quantizations()) < names


def test_a_module_computes_as_its_rule_says(record: Record) -> None:
    g8 = RECIPE.format("g8")
    assert record.quantizations()["model.layers.0.mlp.up_proj"] == Quantization(get_format("nvfp4"), g8, "ste", "first")
