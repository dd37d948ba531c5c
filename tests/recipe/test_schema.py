from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qsurgeon.errors import FormatError
from qsurgeon.formats import CATALOG
from qsurgeon.recipe import FormatSpec, Recipe, Rule, shipped_recipes
from qsurgeon.recipe.schema import make_format

RULE = Rule(target=("layers",), weight="mxfp4")


def recipe(*rules: Rule, **fields: Any) -> Recipe:
    return Recipe(version=1, rules=rules or (RULE,), **fields)


# --- values


def test_a_rule_takes_linears_and_excludes_none_unless_it_says_so() -> None:
    assert RULE.model_dump() == {
        "name": None,
        "target": ("layers",),
        "types": ("Linear",),
        "exclude": (),
        "weight": "mxfp4",
        "input": None,
        "gradient": "ste",
        "phases": "both",
        "adapters": "apart",
        "backward": "dequantized",
        "saved_inputs": "packed",
    }


def test_a_recipe_keeps_master_weights_and_ties_unless_it_says_so() -> None:
    assert recipe().model_dump(exclude={"rules"}) == {
        "version": 1,
        "extends": None,
        "model": None,
        "output": None,
        "storage": "master",
        "saved_inputs": "packed",
        "untie": False,
        "formats": {},
        "noise": None,
    }


@pytest.mark.parametrize(
    ("section", "field"),
    [
        pytest.param(RULE, "weight", id="rule"),
        pytest.param(FormatSpec(like="mxfp4"), "like", id="format"),
        pytest.param(recipe(), "untie", id="recipe"),
    ],
)
def test_nothing_changes_after_loading(section: Any, field: str) -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        setattr(section, field, "other")


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        pytest.param(Rule, {"target": ["layers"], "wieght": "mxfp4", "weight": "mxfp4"}, id="rule"),
        pytest.param(FormatSpec, {"like": "mxfp4", "blok": 16}, id="format"),
        pytest.param(Recipe, {"version": 1, "rules": [RULE], "ouptut": "there"}, id="recipe"),
    ],
)
def test_an_unknown_key_is_refused_in_python_too(section: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        section(**fields)


def test_a_rule_without_formats_is_refused() -> None:
    with pytest.raises(ValidationError, match="a rule needs a format for weight, for input, or for both"):
        Rule(target=("layers",))


def test_a_rule_for_inputs_alone_is_a_rule() -> None:
    assert Rule(target=("layers",), input="mxfp4").weight is None


def test_a_recipe_without_rules_is_refused() -> None:
    with pytest.raises(ValidationError, match="a recipe needs rules, or another recipe to extend"):
        Recipe(version=1)


def test_a_bad_pattern_is_refused_in_python_too() -> None:
    with pytest.raises(ValidationError, match=r"bad pattern 'a\.\.b': a component is empty"):
        Rule(target=("a..b",), weight="mxfp4")


def test_a_rule_is_called_by_its_name() -> None:
    assert recipe(Rule(name="decoder", target=("layers",), weight="mxfp4")).rule_name(0) == "decoder"


def test_a_rule_without_a_name_is_called_by_its_place() -> None:
    assert recipe(RULE, RULE).rule_name(1) == "rule 2"


def test_a_place_in_a_recipe_made_in_python_is_its_path() -> None:
    assert recipe().where("rules", 0, "target", 0) == ("rules[0].target[0]", "")


# --- formats


def test_a_format_of_the_catalogue_is_meant_by_its_name() -> None:
    assert recipe().format("nvfp4") is CATALOG["nvfp4"]


def test_a_format_of_its_own_replaces_fields_of_another() -> None:
    own = recipe(formats={"mine": FormatSpec(like="mxfp4", block=16, scale_rule="even")}).format("mine")
    assert (own.name, own.to_dict()) == (
        "mine",
        CATALOG["mxfp4"].to_dict() | {"block": 16, "scale_rule": "even"},
    )


def test_an_unknown_format_is_an_error_that_knows_the_recipes_own() -> None:
    with pytest.raises(FormatError) as caught:
        recipe(formats={"mine": FormatSpec(like="mxfp4")}).format("q8")
    assert str(caught.value) == f"no format 'q8'; expected one of: {', '.join(sorted([*CATALOG, 'mine']))}"


def test_a_format_of_its_own_cannot_take_a_name_of_the_catalogue() -> None:
    with pytest.raises(FormatError) as caught:
        make_format("mxfp4", FormatSpec(like="nvfp4"), {})
    assert str(caught.value) == "'mxfp4' is a format of the catalogue; name yours otherwise"


def test_a_format_that_is_like_none_is_an_error() -> None:
    with pytest.raises(FormatError) as caught:
        make_format("mine", FormatSpec(like="nvpf4"), {})
    assert str(caught.value) == "no format 'nvpf4'; did you mean 'nvfp4'?"


# --- text


def test_the_text_of_a_recipe_made_in_python_is_its_fields_as_yaml() -> None:
    assert recipe(untie=True).text == ("version: 1\nuntie: true\nrules:\n- target:\n  - layers\n  weight: mxfp4\n")


def test_the_text_of_a_recipe_made_in_python_says_all_of_it() -> None:
    made = recipe(
        Rule(name="one", target=("layers.{0,-1}", "lm_head?"), exclude=("**.q_proj",), input="mine", gradient="none"),
        formats={"mine": FormatSpec(like="mxfp4", block=16)},
        output="there",
    )
    assert Recipe.model_validate(yaml.safe_load(made.text)) == made


# --- the JSON Schema


def faults(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str = "recipe") -> Iterator[str]:
    """Yield what a JSON Schema has against ``value``: as much of the standard as ours uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        tried = [list(faults(value, one, root, at)) for one in schema["anyOf"]]
        yield from [] if [] in tried else tried[0]
    kinds: dict[str, tuple[type, ...]] = {
        "object": (dict,),
        "array": (list,),
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "null": (type(None),),
    }
    if "type" in schema and type(value) not in kinds[schema["type"]]:
        yield f"{at} is no {schema['type']}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{at} is not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} is none of {schema['enum']}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{at} lacks {key}" for key in schema.get("required", ()) if key not in value)
        for key, item in value.items():
            inner = known.get(key, schema.get("additionalProperties", True))
            if inner is False:
                yield f"{at} has no {key}"
            elif inner is not True:
                yield from faults(item, inner, root, f"{at}.{key}")
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), root, f"{at}[{place}]")


SCHEMA = Recipe.model_json_schema()


@pytest.mark.parametrize("file", [pytest.param(file, id=name) for name, file in shipped_recipes().items()])
def test_the_json_schema_accepts_each_shipped_recipe(file: Path) -> None:
    assert list(faults(yaml.safe_load(file.read_text("utf-8")), SCHEMA, SCHEMA)) == []


def test_the_json_schema_accepts_formats_of_ones_own() -> None:
    fields = {"like": "mxfp4", "element": "e2m1", "block": 16, "scale": "e4m3", "scale_rule": "nearest"}
    value = {"version": 1, "formats": {"mine": fields}, "rules": [{"target": ["layers"], "weight": "mine"}]}
    assert list(faults(value, SCHEMA, SCHEMA)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({"zebra": 1}, "recipe has no zebra", id="unknown-key"),
        pytest.param({"version": 2}, "recipe.version is not 1", id="version"),
        pytest.param({"rules": [{"weight": "mxfp4"}]}, "recipe.rules[0] lacks target", id="missing-key"),
        pytest.param(
            {"rules": [{"target": ["a"], "wieght": "b"}]}, "recipe.rules[0] has no wieght", id="typo-in-a-rule"
        ),
        pytest.param({"rules": [{"target": "a"}]}, "recipe.rules[0].target is no array", id="text-for-a-list"),
        pytest.param(
            {"rules": [{"target": ["a"], "gradient": "stee"}]},
            "recipe.rules[0].gradient is none of ['ste', 'clipped', 'none']",
            id="gradient",
        ),
        pytest.param(
            {"formats": {"mine": {"like": "mxfp4", "scale": "e8m1"}}},
            "recipe.formats.mine.scale is none of ['e8m0', 'e4m3', 'bf16', 'fp32', 'none']",
            id="scale",
        ),
    ],
)
def test_the_json_schema_refuses_what_the_loader_refuses(change: dict[str, Any], expected: str) -> None:
    value = {"version": 1, "rules": [{"target": ["layers"], "weight": "mxfp4"}], **change}
    assert list(faults(value, SCHEMA, SCHEMA)) == [expected]


@pytest.mark.parametrize(
    "schema", [pytest.param(SCHEMA, id="recipe"), pytest.param(SCHEMA["$defs"]["Rule"], id="rule")]
)
def test_the_json_schema_describes_every_key(schema: dict[str, Any]) -> None:
    bare = [key for key, field in schema["properties"].items() if "description" not in str(field)]
    assert bare == []


def test_two_rules_of_one_name_are_refused() -> None:
    rule = {"name": "same", "target": ["layers"], "weight": "mxfp4"}
    with pytest.raises(ValueError, match="two rules are called 'same'; a name tells which one decided"):
        Recipe.model_validate({"version": 1, "rules": [rule, rule]})
