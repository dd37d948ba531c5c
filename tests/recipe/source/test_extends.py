"""A recipe that extends another."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qsurgeon.errors import RecipeError
from qsurgeon.recipe import Recipe, load_recipe

PLAIN = """\
version: 1
rules:
  - target: [layers]
    weight: mxfp4
"""


Write = Callable[[str, str | bytes], Path]
Load = Callable[[str | bytes], Recipe]
Complain = Callable[[str | bytes], str]
Names = Callable[..., str]


# --- extends


BASE = """\
version: 1
model: base-model
output: base-output
formats:
  g16: {like: mxfp4, block: 16}
rules:
  - name: base
    target: [layers, norm]
    weight: g16
"""


def test_the_rules_of_the_extended_recipe_come_after(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nrules:\n  - name: own\n    target: [layers.0]\n    weight: nvfp4\n")
    assert [rule.name for rule in recipe.rules] == ["own", "base"]


def test_what_a_recipe_does_not_set_the_extended_one_does(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\noutput: own-output\n")
    assert (recipe.model, recipe.output) == ("base-model", "own-output")


def test_a_recipe_may_only_extend(load: Load) -> None:
    recipe = load("version: 1\nextends: w4a4-mxfp4\n")
    assert recipe.rules == load_recipe("w4a4-mxfp4").rules


def test_the_formats_of_the_extended_recipe_are_known(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    recipe = load(
        "version: 1\nextends: base.yaml\n"
        "formats:\n  g8: {like: g16, block: 8}\n"
        "rules:\n  - target: [layers.0]\n    weight: g8\n    input: g16\n"
    )
    assert {name: format.block for name, format in recipe.own_formats.items()} == {"g16": 16, "g8": 8}


def test_a_format_of_the_extended_recipe_may_be_redefined_from_another_of_ones_own(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nformats:\n  g8: {like: mxfp4, block: 8}\n  g16: {like: g8}\n")
    assert recipe.format("g16").block == 8


def test_a_chain_of_recipes_is_merged_in_order(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    rule = "rules:\n  - name: {name}\n    target: [layers]\n    weight: mxfp4\n"
    write("middle.yaml", "version: 1\nextends: base.yaml\n" + rule.format(name="middle"))
    recipe = load("version: 1\nextends: middle.yaml\n" + rule.format(name="own"))
    assert [rule.name for rule in recipe.rules] == ["own", "middle", "base"]


def test_a_path_is_looked_for_beside_the_recipe_that_names_it(write: Write) -> None:
    write("sub/base.yaml", BASE)
    recipe = load_recipe(write("sub/own.yaml", "version: 1\nextends: base.yaml\n"))
    assert recipe.rule_name(0) == "base"


def test_values_of_the_extended_recipe_are_found_in_its_file(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nrules:\n  - target: [layers.0]\n    weight: nvfp4\n")
    assert recipe.where("rules", 1, "target", 1) == (
        "base.yaml:8:22",
        "        target: [layers, norm]\n                         ^^^^",
    )


def test_values_of_the_recipe_itself_are_found_in_its_file(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nrules:\n  - target: [layers.0]\n    weight: nvfp4\n")
    assert recipe.where("rules", 0, "target", 0) == (
        "mine.yaml:4:14",
        "      - target: [layers.0]\n                 ^^^^^^^^",
    )


def test_the_text_of_a_merged_recipe_stands_alone(write: Write, load: Load) -> None:
    write("base.yaml", BASE)
    merged = load("version: 1\nextends: base.yaml\noutput: own-output\n")
    again = load_recipe(write("elsewhere/merged.yaml", merged.text))
    assert again.model_dump() == merged.model_dump()


def test_an_extended_recipe_that_is_not_there_is_an_error_at_its_name(complaint: Complain) -> None:
    assert complaint("version: 1\nextends: base.yaml\n").startswith("mine.yaml:2:10: no such file")


def test_a_misspelt_shipped_name_to_extend_is_an_error_with_a_guess(write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("sub/mine.yaml", "version: 1\nextends: w4a4-mxpf4\n"))
    assert str(caught.value) == (
        "sub/mine.yaml:2:10: no recipe 'w4a4-mxpf4'; did you mean 'w4a4-mxfp4'?\n"
        "    extends: w4a4-mxpf4\n"
        "             ^^^^^^^^^^"
    )


def test_a_folder_cannot_be_extended(complaint: Complain) -> None:
    Path("sub").mkdir()
    assert complaint("version: 1\nextends: sub\n") == (
        "mine.yaml:2:10: is a folder; expected a recipe file\n    extends: sub\n             ^^^"
    )


def test_a_recipe_cannot_extend_itself(complaint: Complain) -> None:
    assert complaint("version: 1\nextends: mine.yaml\n") == (
        "mine.yaml:2:10: 'mine.yaml' extends this recipe in turn\n    extends: mine.yaml\n             ^^^^^^^^^"
    )


def test_recipes_cannot_extend_each_other(write: Write, complaint: Complain) -> None:
    write("other.yaml", "version: 1\nextends: mine.yaml\n")
    assert complaint("version: 1\nextends: other.yaml\n") == (
        "other.yaml:2:10: 'mine.yaml' extends this recipe in turn\n    extends: mine.yaml\n             ^^^^^^^^^"
    )


def test_mistakes_in_the_extended_recipe_name_its_file_and_come_last(write: Write, complaint: Complain) -> None:
    write("base.yaml", PLAIN.replace("weight", "wieght"))
    assert complaint("version: 1\nextends: base.yaml\nzebra: 1\n") == (
        "mine.yaml:3:1: unknown key 'zebra'; expected one of: "
        "formats, model, noise, output, rules, saved_inputs, storage, untie\n"
        "    zebra: 1\n"
        "    ^^^^^\n"
        "base.yaml:4:5: unknown key 'wieght'; did you mean 'weight'?\n"
        "        wieght: mxfp4\n"
        "        ^^^^^^"
    )


def test_a_format_that_a_broken_extended_recipe_might_have_is_no_mistake(write: Write, complaint: Complain) -> None:
    write("base.yaml", "")
    assert complaint("version: 1\nextends: base.yaml\nrules:\n  - target: [layers]\n    weight: g16\n") == (
        "base.yaml: is empty; a recipe starts with 'version: 1'"
    )


def test_an_unknown_format_beside_an_extended_recipe_is_an_error_with_its_formats_too(
    write: Write, complaint: Complain, all_of: Names
) -> None:
    write("base.yaml", BASE)
    assert complaint("version: 1\nextends: base.yaml\nrules:\n  - target: [layers]\n    weight: q8\n") == (
        f"mine.yaml:5:13: no format 'q8'; expected one of: {all_of('g16')}\n        weight: q8\n                ^^"
    )


def test_a_rule_may_not_have_the_name_of_one_that_it_extends(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\nextends: w4a4-mxfp4\nrules:\n  - name: linears\n    target: [down_proj]\n    weight: mxfp8\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value) == (
        f"{file}:4:11: the recipe it extends has a rule 'linears', too\n      - name: linears\n              ^^^^^^^"
    )
