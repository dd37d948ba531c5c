import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qsurgeon
from qsurgeon.formats import CATALOG
from qsurgeon.recipe import load_recipe, shipped_recipes
from qsurgeon.recipe.select import Namespace, parse_pattern

SHIPPED = shipped_recipes()
README = (Path(__file__).parents[1] / "recipes" / "README.md").read_text("utf-8")

Make = Callable[..., Any]

each_recipe = pytest.mark.parametrize("name", SHIPPED)


def rows(column: str) -> dict[str, list[str]]:
    """Return the rows of the README's table whose first column is ``column``, by the word in it."""
    table = README.split(f"| {column} |", 1)[1].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {one[0].strip("`"): one[1:] for one in cells}


def words(text: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


# --- recipes


@each_recipe
def test_a_shipped_recipe_plans_on_a_model_of_its_depth(name: str, qwen2_config: Make) -> None:
    depth = 28 if name.startswith("e13/") else 2
    plan = qsurgeon.plan(name, qwen2_config(num_hidden_layers=depth))
    assert f"in {182 if depth == 28 else 14} of {7 * depth + 1} Linear modules" in plan.summary


@each_recipe
def test_a_shipped_recipe_takes_what_its_row_says(name: str, qwen2_config: Make) -> None:
    depth = 28 if name.startswith("e13/") else 2
    made = {step.quantization for step in qsurgeon.plan(name, qwen2_config(num_hidden_layers=depth)).wrapped}
    assert len(made) == 1
    how = made.pop()
    assert how is not None
    assert how.weight is not None
    expected = [how.weight_name, "–" if how.input is None else how.input_name, f"{how.weight.bits:g}"]
    assert rows("recipe")[name][:3] == expected


def test_the_catalogue_lists_the_shipped_recipes_and_no_others() -> None:
    assert sorted(rows("recipe")) == sorted(SHIPPED)


@each_recipe
def test_a_shipped_recipe_begins_with_what_it_is_for(name: str) -> None:
    first, *_ = SHIPPED[name].read_text("utf-8").splitlines()
    assert re.fullmatch(r"# \S.*[.:]", first)


@each_recipe
def test_a_shipped_recipe_says_how_to_look_at_it_first(name: str) -> None:
    assert f"# Look first:  qsurgeon plan {name} --model path/to/" in SHIPPED[name].read_text("utf-8")


@each_recipe
def test_a_shipped_recipe_names_formats_of_the_catalogue_or_its_own(name: str) -> None:
    recipe = load_recipe(name)
    known = CATALOG.keys() | recipe.own_formats
    assert {one for rule in recipe.rules for one in (rule.weight, rule.input) if one} <= known


# --- the README's examples


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL), ids=["own", "quoted"])
def test_an_example_of_the_readme_is_a_recipe_that_plans(example: str, tmp_path: Path, qwen2_config: Make) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(example, "utf-8")
    assert len(qsurgeon.plan(file, qwen2_config(num_hidden_layers=3)).wrapped) > 0


PATTERNS = rows("pattern")
EXAMPLES = [name for names, others, _ in PATTERNS.values() for name in words(names + others)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_of_the_readme_names_what_its_row_says_and_not_the_rest(pattern: str) -> None:
    names, others, _ = PATTERNS[pattern]
    found = Namespace(EXAMPLES).match(parse_pattern(pattern)).names
    assert set(words(names)) <= found
    assert not set(words(others)) & found
