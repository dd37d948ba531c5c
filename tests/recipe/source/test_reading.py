"""What is read of a recipe: files, keys and patterns."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qsurgeon.errors import RecipeError
from qsurgeon.recipe import Recipe, find_recipe, load_recipe, shipped_recipes

PLAIN = """\
version: 1
rules:
  - target: [layers]
    weight: mxfp4
"""


Write = Callable[[str, str | bytes], Path]
Load = Callable[[str | bytes], Recipe]
Complain = Callable[[str | bytes], str]


# --- what is read


def test_a_file_is_read_into_rules(load: Load) -> None:
    recipe = load(
        "version: 1\nrules:\n  - name: all\n    target: [layers, 'lm_head?']\n    weight: mxfp4\n    input: nvfp4\n"
    )
    assert recipe.model_dump(exclude_unset=True) == {
        "version": 1,
        "rules": ({"name": "all", "target": ("layers", "lm_head?"), "weight": "mxfp4", "input": "nvfp4"},),
    }


def test_the_text_of_a_recipe_is_the_file_as_it_was_written(load: Load) -> None:
    text = "# a remark\n" + PLAIN + "untie:   false   # not yet\n"
    assert load(text).text == text


def test_a_byte_order_mark_does_not_count(load: Load) -> None:
    assert load(PLAIN.encode("utf-8-sig")).text == PLAIN


def test_lines_may_end_as_on_windows(load: Load) -> None:
    assert load(PLAIN.replace("\n", "\r\n")).rules == load(PLAIN).rules


def test_text_that_looks_like_a_date_stays_text(load: Load) -> None:
    assert load(PLAIN + "model: 2024-01-01\n").model == "2024-01-01"


def test_text_outside_of_ascii_is_read(load: Load) -> None:
    assert load(PLAIN + "model: größe/モデル\n").model == "größe/モデル"


def test_an_alias_is_read_where_it_stands(load: Load) -> None:
    recipe = load("version: 1\nrules:\n  - target: &t [a, b]\n    weight: mxfp4\n  - target: *t\n    input: nvfp4\n")
    assert [rule.target for rule in recipe.rules] == [("a", "b"), ("a", "b")]


def test_a_shipped_recipe_is_found_by_its_name() -> None:
    assert load_recipe("w4a4-mxfp4").rules[0].weight == "mxfp4"


def test_a_shipped_recipe_in_a_folder_is_found_by_its_name() -> None:
    assert load_recipe("e13/e13g-nvfp4-w4a4").rules[0].weight == "nvfp4"


def test_a_file_wins_over_a_shipped_recipe_of_the_same_name(write: Write) -> None:
    assert find_recipe(write("w4a4-mxfp4", PLAIN)) == Path("w4a4-mxfp4")


def test_the_names_of_the_shipped_recipes_are_their_paths_without_the_suffix() -> None:
    assert {"w4a4-mxfp4", "e13/e13h-mxfp4-w4a4"} <= shipped_recipes().keys()


# --- keys


def test_an_unknown_key_is_an_error_with_a_guess(complaint: Complain) -> None:
    assert complaint(PLAIN + "outptu: there\n") == (
        "mine.yaml:5:1: unknown key 'outptu'; did you mean 'output'?\n    outptu: there\n    ^^^^^^"
    )


def test_an_unknown_key_that_is_near_to_none_is_an_error_with_all_that_are_left(complaint: Complain) -> None:
    assert complaint(PLAIN + "zebra: 1\n") == (
        "mine.yaml:5:1: unknown key 'zebra'; expected one of: "
        "extends, formats, model, noise, output, saved_inputs, storage, untie\n"
        "    zebra: 1\n"
        "    ^^^^^"
    )


def test_a_misspelt_key_is_one_mistake_and_not_a_missing_key_too(complaint: Complain) -> None:
    assert complaint("versoin: 1\nrules:\n  - taget: [layers]\n    weight: mxfp4\n") == (
        "mine.yaml:1:1: unknown key 'versoin'; did you mean 'version'?\n"
        "    versoin: 1\n"
        "    ^^^^^^^\n"
        "mine.yaml:3:5: unknown key 'taget'; did you mean 'target'?\n"
        "      - taget: [layers]\n"
        "        ^^^^^"
    )


def test_a_misspelt_weight_is_one_mistake_and_not_a_rule_without_formats_too(complaint: Complain) -> None:
    assert complaint("version: 1\nrules:\n  - target: [layers]\n    wieght: mxfp4\n") == (
        "mine.yaml:4:5: unknown key 'wieght'; did you mean 'weight'?\n        wieght: mxfp4\n        ^^^^^^"
    )


def test_misspelt_rules_are_one_mistake_and_not_a_recipe_without_rules_too(complaint: Complain) -> None:
    assert complaint(PLAIN.replace("rules", "ruels")) == (
        "mine.yaml:2:1: unknown key 'ruels'; did you mean 'rules'?\n    ruels:\n    ^^^^^"
    )


EVERY_KEY = """\
version: 1
model: some/folder
output: other/folder
storage: master
saved_inputs: full
untie: true
formats:
  mine: {like: mxfp4, element: e2m1, block: 16, scale: e4m3, scale_rule: nearest, tensor_scale: row}
rules:
  - name: one
    target: [layers]
    types: [Linear]
    exclude: [lm_head]
    weight: nvfp4
    input: mxfp8
    gradient: clipped
    phases: training
    adapters: apart
"""
KEYS = [
    *("version", "model", "output", "storage", "saved_inputs", "untie", "formats", "rules"),
    *("like", "element", "block", "scale", "scale_rule", "tensor_scale"),
    *("name", "target", "types", "exclude", "weight", "input", "gradient", "phases", "saved_inputs", "adapters"),
]


def test_every_key_is_known(load: Load) -> None:
    assert load(EVERY_KEY).text == EVERY_KEY


@pytest.mark.parametrize("key", KEYS)
def test_a_typo_in_any_key_is_an_error_with_the_right_key_as_the_only_guess(load: Load, key: str) -> None:
    typo = f"{key[:-2]}{key[-1]}{key[-2]}"
    with pytest.raises(RecipeError) as caught:
        load(EVERY_KEY.replace(f"{key}:", f"{typo}:", 1))
    assert [mistake.message for mistake in caught.value.mistakes] == [f"unknown key '{typo}'; did you mean '{key}'?"]


def test_misspelt_formats_are_one_mistake_and_not_unknown_formats_too(complaint: Complain) -> None:
    assert complaint("version: 1\nformat:\n  own: {like: mxfp4}\nrules:\n  - target: [layers]\n    weight: own\n") == (
        "mine.yaml:2:1: unknown key 'format'; did you mean 'formats'?\n    format:\n    ^^^^^^"
    )


def test_a_missing_key_is_named_where_its_section_begins(complaint: Complain) -> None:
    assert complaint("version: 1\nrules:\n  - weight: mxfp4\n") == (
        "mine.yaml:3:5: key 'target' is missing\n      - weight: mxfp4\n        ^^^^^^^^^^^^^"
    )


def test_a_missing_version_is_named_at_the_beginning(complaint: Complain) -> None:
    assert complaint("rules:\n  - target: [layers]\n    weight: mxfp4\n") == (
        "mine.yaml:1:1: key 'version' is missing\n    rules:\n    ^^^^^^"
    )


def test_a_format_of_its_own_must_say_what_it_is_like(complaint: Complain) -> None:
    assert complaint(PLAIN + "formats:\n  mine: {block: 16}\n") == (
        "mine.yaml:6:9: key 'like' is missing\n      mine: {block: 16}\n            ^^^^^^^^^^^"
    )


def test_a_key_may_stand_only_once(complaint: Complain) -> None:
    assert complaint(PLAIN + "    weight: nvfp4\n") == (
        "mine.yaml:5:5: key 'weight' appears twice; first on line 4\n        weight: nvfp4\n        ^^^^^^"
    )


def test_a_key_that_is_a_list_is_refused(complaint: Complain) -> None:
    assert complaint(PLAIN + "[a, b]: 2\n") == ("mine.yaml:5:1: a key must be a word\n    [a, b]: 2\n    ^^^^^^")


def test_a_merge_key_is_an_unknown_key(complaint: Complain) -> None:
    text = "version: 1\nrules:\n  - &a\n    target: [layers]\n    weight: mxfp4\n  - <<: *a\n    target: [norm]\n"
    assert complaint(text).startswith(
        "mine.yaml:6:5: unknown key '<<'; expected one of: adapters, backward, exclude, gradient, input, name, phases, "
        "saved_inputs, types, weight\n"
        "      - <<: *a\n"
        "        ^^"
    )


# --- patterns


def test_a_bad_pattern_is_one_mistake_at_its_place(complaint: Complain) -> None:
    assert complaint("version: 1\nrules:\n  - target: ['layers.{0']\n    weight: mxfp4\n") == (
        "mine.yaml:3:14: bad pattern 'layers.{0': a brace is not closed\n"
        "      - target: ['layers.{0']\n"
        "                 ^^^^^^^^^^^"
    )


def test_a_bad_pattern_among_good_ones_is_named_at_its_place(complaint: Complain) -> None:
    assert complaint(PLAIN.replace("[layers]", "[layers, a..b]")) == (
        "mine.yaml:3:22: bad pattern 'a..b': a component is empty\n"
        "      - target: [layers, a..b]\n"
        "                         ^^^^"
    )


def test_a_bad_exclude_pattern_is_named_at_its_place(complaint: Complain) -> None:
    assert complaint(PLAIN + "    exclude: [re:.*_proj]\n") == (
        "mine.yaml:5:15: bad pattern 're:.*_proj': "
        "patterns are globs, not regular expressions; write '*_proj'\n"
        "        exclude: [re:.*_proj]\n"
        "                  ^^^^^^^^^^"
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        pytest.param(
            "[layers, lm_head?]",
            "mine.yaml:3:29: not YAML: inside [ ] a pattern with '?' must stand in quotes\n"
            "      - target: [layers, lm_head?]\n"
            "                                ^^",
            id="question-mark-last",
        ),
        pytest.param(
            "[lm_head?, layers]",
            "mine.yaml:3:21: not YAML: inside [ ] a pattern with '?' must stand in quotes\n"
            "      - target: [lm_head?, layers]\n"
            "                        ^^^^^^^^^^",
            id="question-mark-first",
        ),
        pytest.param(
            "[layers.{0,-1}]",
            "mine.yaml:3:21: not YAML: inside [ ] a pattern with '{' must stand in quotes\n"
            "      - target: [layers.{0,-1}]\n"
            "                        ^^^^^^^",
            id="braces",
        ),
    ],
)
def test_a_pattern_that_yaml_reads_otherwise_must_stand_in_quotes(
    complaint: Complain, patterns: str, expected: str
) -> None:
    assert complaint(PLAIN.replace("[layers]", patterns)) == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        pytest.param(
            "[**]",
            "mine.yaml:3:15: not YAML: a pattern that begins with '*' must stand in quotes\n"
            "      - target: [**]\n"
            "                  ^^",
            id="two-stars",
        ),
        pytest.param(
            "[*_proj]",
            "mine.yaml:3:14: not YAML: a pattern that begins with '*' must stand in quotes\n"
            "      - target: [*_proj]\n"
            "                 ^^^^^^^",
            id="star-first",
        ),
    ],
)
def test_a_pattern_that_begins_with_a_star_and_has_no_quotes_is_not_yaml(
    complaint: Complain, patterns: str, expected: str
) -> None:
    assert complaint(PLAIN.replace("[layers]", patterns)) == expected


def test_a_pattern_with_braces_needs_no_quotes_on_a_line_of_its_own(load: Load) -> None:
    assert load(PLAIN.replace("[layers]", "\n      - layers.{0,-1}\n      - lm_head?")).rules[0].target == (
        "layers.{0,-1}",
        "lm_head?",
    )
