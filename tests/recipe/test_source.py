from collections.abc import Callable
from pathlib import Path

import pytest

from qsurgeon.errors import RecipeError
from qsurgeon.formats import CATALOG
from qsurgeon.recipe import Recipe, find_recipe, load_recipe, shipped_recipes

PLAIN = """\
version: 1
rules:
  - target: [layers]
    weight: mxfp4
"""


def all_of(*own: str) -> str:
    """Return the names of all formats there are, and of the recipe's own."""
    return ", ".join(sorted([*CATALOG, *own]))


Complain = Callable[[str | bytes], str]


def write(name: str, text: str | bytes) -> Path:
    """Write ``name`` in the working folder, which is the test's own."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def load(text: str | bytes) -> Recipe:
    return load_recipe(write("mine.yaml", text))


def complaint(text: str | bytes) -> str:
    """Return all that is said about a recipe that says ``text``."""
    with pytest.raises(RecipeError) as caught:
        load(text)
    return str(caught.value)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- what is read


def test_a_file_is_read_into_rules() -> None:
    recipe = load(
        "version: 1\nrules:\n  - name: all\n    target: [layers, 'lm_head?']\n    weight: mxfp4\n    input: nvfp4\n"
    )
    assert recipe.model_dump(exclude_unset=True) == {
        "version": 1,
        "rules": ({"name": "all", "target": ("layers", "lm_head?"), "weight": "mxfp4", "input": "nvfp4"},),
    }


def test_the_text_of_a_recipe_is_the_file_as_it_was_written() -> None:
    text = "# a remark\n" + PLAIN + "untie:   false   # not yet\n"
    assert load(text).text == text


def test_a_byte_order_mark_does_not_count() -> None:
    assert load(PLAIN.encode("utf-8-sig")).text == PLAIN


def test_lines_may_end_as_on_windows() -> None:
    assert load(PLAIN.replace("\n", "\r\n")).rules == load(PLAIN).rules


def test_text_that_looks_like_a_date_stays_text() -> None:
    assert load(PLAIN + "model: 2024-01-01\n").model == "2024-01-01"


def test_text_outside_of_ascii_is_read() -> None:
    assert load(PLAIN + "model: größe/モデル\n").model == "größe/モデル"


def test_an_alias_is_read_where_it_stands() -> None:
    recipe = load("version: 1\nrules:\n  - target: &t [a, b]\n    weight: mxfp4\n  - target: *t\n    input: nvfp4\n")
    assert [rule.target for rule in recipe.rules] == [("a", "b"), ("a", "b")]


def test_a_shipped_recipe_is_found_by_its_name() -> None:
    assert load_recipe("w4a4-mxfp4").rules[0].weight == "mxfp4"


def test_a_shipped_recipe_in_a_folder_is_found_by_its_name() -> None:
    assert load_recipe("e13/e13g-nvfp4-w4a4").rules[0].weight == "nvfp4"


def test_a_file_wins_over_a_shipped_recipe_of_the_same_name() -> None:
    assert find_recipe(write("w4a4-mxfp4", PLAIN)) == Path("w4a4-mxfp4")


def test_the_names_of_the_shipped_recipes_are_their_paths_without_the_suffix() -> None:
    assert {"w4a4-mxfp4", "e13/e13h-mxfp4-w4a4"} <= shipped_recipes().keys()


# --- keys


def test_an_unknown_key_is_an_error_with_a_guess() -> None:
    assert complaint(PLAIN + "outptu: there\n") == (
        "mine.yaml:5:1: unknown key 'outptu'; did you mean 'output'?\n    outptu: there\n    ^^^^^^"
    )


def test_an_unknown_key_that_is_near_to_none_is_an_error_with_all_that_are_left() -> None:
    assert complaint(PLAIN + "zebra: 1\n") == (
        "mine.yaml:5:1: unknown key 'zebra'; expected one of: "
        "extends, formats, model, output, saved_inputs, storage, untie\n"
        "    zebra: 1\n"
        "    ^^^^^"
    )


def test_a_misspelt_key_is_one_mistake_and_not_a_missing_key_too() -> None:
    assert complaint("versoin: 1\nrules:\n  - taget: [layers]\n    weight: mxfp4\n") == (
        "mine.yaml:1:1: unknown key 'versoin'; did you mean 'version'?\n"
        "    versoin: 1\n"
        "    ^^^^^^^\n"
        "mine.yaml:3:5: unknown key 'taget'; did you mean 'target'?\n"
        "      - taget: [layers]\n"
        "        ^^^^^"
    )


def test_a_misspelt_weight_is_one_mistake_and_not_a_rule_without_formats_too() -> None:
    assert complaint("version: 1\nrules:\n  - target: [layers]\n    wieght: mxfp4\n") == (
        "mine.yaml:4:5: unknown key 'wieght'; did you mean 'weight'?\n        wieght: mxfp4\n        ^^^^^^"
    )


def test_misspelt_rules_are_one_mistake_and_not_a_recipe_without_rules_too() -> None:
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
"""
KEYS = [
    *("version", "model", "output", "storage", "saved_inputs", "untie", "formats", "rules"),
    *("like", "element", "block", "scale", "scale_rule", "tensor_scale"),
    *("name", "target", "types", "exclude", "weight", "input", "gradient", "phases", "saved_inputs"),
]


def test_every_key_is_known() -> None:
    assert load(EVERY_KEY).text == EVERY_KEY


@pytest.mark.parametrize("key", KEYS)
def test_a_typo_in_any_key_is_an_error_with_the_right_key_as_the_only_guess(key: str) -> None:
    typo = f"{key[:-2]}{key[-1]}{key[-2]}"
    with pytest.raises(RecipeError) as caught:
        load(EVERY_KEY.replace(f"{key}:", f"{typo}:", 1))
    assert [mistake.message for mistake in caught.value.mistakes] == [f"unknown key '{typo}'; did you mean '{key}'?"]


def test_misspelt_formats_are_one_mistake_and_not_unknown_formats_too() -> None:
    assert complaint("version: 1\nformat:\n  own: {like: mxfp4}\nrules:\n  - target: [layers]\n    weight: own\n") == (
        "mine.yaml:2:1: unknown key 'format'; did you mean 'formats'?\n    format:\n    ^^^^^^"
    )


def test_a_missing_key_is_named_where_its_section_begins() -> None:
    assert complaint("version: 1\nrules:\n  - weight: mxfp4\n") == (
        "mine.yaml:3:5: key 'target' is missing\n      - weight: mxfp4\n        ^^^^^^^^^^^^^"
    )


def test_a_missing_version_is_named_at_the_beginning() -> None:
    assert complaint("rules:\n  - target: [layers]\n    weight: mxfp4\n") == (
        "mine.yaml:1:1: key 'version' is missing\n    rules:\n    ^^^^^^"
    )


def test_a_format_of_its_own_must_say_what_it_is_like() -> None:
    assert complaint(PLAIN + "formats:\n  mine: {block: 16}\n") == (
        "mine.yaml:6:9: key 'like' is missing\n      mine: {block: 16}\n            ^^^^^^^^^^^"
    )


def test_a_key_may_stand_only_once() -> None:
    assert complaint(PLAIN + "    weight: nvfp4\n") == (
        "mine.yaml:5:5: key 'weight' appears twice; first on line 4\n        weight: nvfp4\n        ^^^^^^"
    )


def test_a_key_that_is_a_list_is_refused() -> None:
    assert complaint(PLAIN + "[a, b]: 2\n") == ("mine.yaml:5:1: a key must be a word\n    [a, b]: 2\n    ^^^^^^")


def test_a_merge_key_is_an_unknown_key() -> None:
    text = "version: 1\nrules:\n  - &a\n    target: [layers]\n    weight: mxfp4\n  - <<: *a\n    target: [norm]\n"
    assert complaint(text).startswith(
        "mine.yaml:6:5: unknown key '<<'; expected one of: exclude, gradient, input, name, phases, saved_inputs, "
        "types, weight\n"
        "      - <<: *a\n"
        "        ^^"
    )


# --- values


def with_rule(line: str) -> str:
    return f"{PLAIN}    {line}\n"


def with_format(fields: str) -> str:
    return f"{PLAIN}formats:\n  mine: {{{fields}}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "version: 1\nrules:\n  - target: layers\n    weight: mxfp4\n",
            "mine.yaml:3:13: 'target' expects a list, got 'layers'; write [layers]\n"
            "      - target: layers\n"
            "                ^^^^^^",
            id="text-for-a-list",
        ),
        pytest.param(
            "version: 1\nrules:\n  - target: [layers]\n    weight: 4\n",
            "mine.yaml:4:13: 'weight' expects the name of a format, got 4\n        weight: 4\n                ^",
            id="number-for-text",
        ),
        pytest.param(
            "version: 1\nrules:\n  - target: [layers]\n    weight: [mxfp4]\n",
            "mine.yaml:4:13: 'weight' expects the name of a format, got a list\n"
            "        weight: [mxfp4]\n"
            "                ^^^^^^^",
            id="list-for-text",
        ),
        pytest.param(
            "version: 1\nrules: layers\n",
            "mine.yaml:2:8: 'rules' expects a list, got 'layers'\n    rules: layers\n           ^^^^^^",
            id="text-for-rules",
        ),
        pytest.param(
            "version: 1\nrules: {target: [layers]}\n",
            "mine.yaml:2:8: 'rules' expects a list, got a mapping; begin each rule with '- '\n"
            "    rules: {target: [layers]}\n"
            "           ^^^^^^^^^^^^^^^^^^",
            id="mapping-for-rules",
        ),
        pytest.param(
            "version: 1\nrules:\n",
            "mine.yaml:2:7: 'rules' expects a list, got nothing\n    rules:\n          ^",
            id="nothing-for-rules",
        ),
        pytest.param(
            "version: 1\nrules: [layers]\n",
            "mine.yaml:2:9: 'rules' expects a mapping (key: value), got 'layers'\n"
            "    rules: [layers]\n"
            "            ^^^^^^",
            id="text-for-a-rule",
        ),
        pytest.param(
            PLAIN + "formats: [mxfp4]\n",
            "mine.yaml:5:10: 'formats' expects a mapping (key: value), got a list\n"
            "    formats: [mxfp4]\n"
            "             ^^^^^^^",
            id="list-for-formats",
        ),
        pytest.param(
            PLAIN + "formats:\n  mine: mxfp4\n",
            "mine.yaml:6:9: 'mine' expects a mapping (key: value), got 'mxfp4'\n      mine: mxfp4\n            ^^^^^",
            id="text-for-a-format",
        ),
        pytest.param(
            PLAIN + "untie: 'yes'\n",
            "mine.yaml:5:8: 'untie' expects true or false, got 'yes'\n    untie: 'yes'\n           ^^^^^",
            id="text-for-true",
        ),
        pytest.param(
            with_format("like: mxfp4, block: '16'"),
            "mine.yaml:6:30: block is '16'; expected a whole number, two of them [rows, columns], or none\n"
            "      mine: {like: mxfp4, block: '16'}\n"
            "                                 ^^^^",
            id="text-for-a-number",
        ),
        pytest.param(
            with_format("like: mxfp4, block: 16.5"),
            "mine.yaml:6:30: block is 16.5; expected a whole number, two of them [rows, columns], or none\n"
            "      mine: {like: mxfp4, block: 16.5}\n"
            "                                 ^^^^",
            id="fraction-for-a-number",
        ),
        pytest.param(
            PLAIN + "model: .nan\n",
            "mine.yaml:5:8: 'model' expects text, got NaN\n    model: .nan\n           ^^^^",
            id="nan-for-text",
        ),
        pytest.param(
            PLAIN + "extends: 3\n",
            "mine.yaml:5:10: 'extends' expects text, got 3\n    extends: 3\n             ^",
            id="number-for-a-recipe",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_what_is_expected(text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_one_text_among_patterns_that_is_a_number_is_one_mistake() -> None:
    assert complaint("version: 1\nrules:\n  - target: [0]\n    weight: mxfp4\n") == (
        "mine.yaml:3:14: 'target' expects text, got 0\n      - target: [0]\n                 ^"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            PLAIN.replace("version: 1", "version: 2"),
            "mine.yaml:1:10: 'version' must be the whole number 1, got 2\n    version: 2\n             ^",
            id="version",
        ),
        pytest.param(
            PLAIN + "storage: thin\n",
            "mine.yaml:5:10: 'storage' cannot be 'thin'; expected one of: master, packed\n"
            "    storage: thin\n"
            "             ^^^^",
            id="storage",
        ),
        pytest.param(
            with_rule("gradient: clip"),
            "mine.yaml:5:15: 'gradient' cannot be 'clip'; did you mean 'clipped'?\n"
            "        gradient: clip\n"
            "                  ^^^^",
            id="gradient",
        ),
        pytest.param(
            with_rule("types: [Linear, Lineer]"),
            "mine.yaml:5:21: 'types' cannot be 'Lineer'; did you mean 'Linear'?\n"
            "        types: [Linear, Lineer]\n"
            "                        ^^^^^^",
            id="one-of-the-types",
        ),
        pytest.param(
            with_format("like: mxfp4, element: e2m2"),
            "mine.yaml:6:32: no element 'e2m2'; did you mean 'e5m2'?\n"
            "      mine: {like: mxfp4, element: e2m2}\n"
            "                                   ^^^^",
            id="element",
        ),
        pytest.param(
            with_format("like: mxfp4, scale: e8m1"),
            "mine.yaml:6:30: no scale 'e8m1'; did you mean 'e8m0'?\n"
            "      mine: {like: mxfp4, scale: e8m1}\n"
            "                                 ^^^^",
            id="scale",
        ),
        pytest.param(
            with_format("like: mxfp4, scale_rule: flor"),
            "mine.yaml:6:35: no scale rule 'flor'; did you mean 'floor'?\n"
            "      mine: {like: mxfp4, scale_rule: flor}\n"
            "                                      ^^^^",
            id="scale-rule",
        ),
        pytest.param(
            with_format("like: nvfp4, tensor_scale: rows"),
            "mine.yaml:6:37: no tensor scale 'rows'; did you mean 'row'?\n"
            "      mine: {like: nvfp4, tensor_scale: rows}\n"
            "                                        ^^^^",
            id="tensor-scale",
        ),
    ],
)
def test_a_word_that_a_key_cannot_be_is_an_error_with_the_nearest_that_it_can(text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_the_only_type_misspelt_is_one_mistake() -> None:
    assert complaint(with_rule("types: [Lineer]")) == (
        "mine.yaml:5:13: 'types' cannot be 'Lineer'; did you mean 'Linear'?\n"
        "        types: [Lineer]\n"
        "                ^^^^^^"
    )


@pytest.mark.parametrize("version", ["true", "1.0"])
def test_a_version_is_the_whole_number_and_nothing_that_equals_it(version: str) -> None:
    assert complaint(PLAIN.replace("version: 1", f"version: {version}")) == (
        f"mine.yaml:1:10: 'version' must be the whole number 1, got {version}\n"
        f"    version: {version}\n"
        f"             {'^' * len(version)}"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "version: 1\nrules:\n  - target: []\n    weight: mxfp4\n",
            "mine.yaml:3:13: 'target' must not be empty\n      - target: []\n                ^^",
            id="target",
        ),
        pytest.param(
            with_rule("types: []"),
            "mine.yaml:5:12: 'types' must not be empty\n        types: []\n               ^^",
            id="types",
        ),
        pytest.param(
            with_rule("name: ''"),
            "mine.yaml:5:11: 'name' must not be empty\n        name: ''\n              ^^",
            id="name",
        ),
        pytest.param(
            "version: 1\nrules: []\n",
            "mine.yaml:1:1: a recipe needs rules, or another recipe to extend\n    version: 1\n    ^^^^^^^^^^",
            id="rules",
        ),
        pytest.param(
            "version: 1\n",
            "mine.yaml:1:1: a recipe needs rules, or another recipe to extend\n    version: 1\n    ^^^^^^^^^^",
            id="no-rules-at-all",
        ),
        pytest.param(
            "version: 1\nrules:\n  - target: [layers]\n",
            "mine.yaml:3:5: a rule needs a format for weight, for input, or for both\n"
            "      - target: [layers]\n"
            "        ^^^^^^^^^^^^^^^^",
            id="no-format",
        ),
        pytest.param(
            "version: 1\nrules:\n  - target: [layers]\n    weight:\n",
            "mine.yaml:3:5: a rule needs a format for weight, for input, or for both\n"
            "      - target: [layers]\n"
            "        ^^^^^^^^^^^^^^^^",
            id="nothing-for-a-format",
        ),
    ],
)
def test_what_must_not_be_empty_is_told_so(text: str, expected: str) -> None:
    assert complaint(text) == expected


# --- patterns


def test_a_bad_pattern_is_one_mistake_at_its_place() -> None:
    assert complaint("version: 1\nrules:\n  - target: ['layers.{0']\n    weight: mxfp4\n") == (
        "mine.yaml:3:14: bad pattern 'layers.{0': a brace is not closed\n"
        "      - target: ['layers.{0']\n"
        "                 ^^^^^^^^^^^"
    )


def test_a_bad_pattern_among_good_ones_is_named_at_its_place() -> None:
    assert complaint(PLAIN.replace("[layers]", "[layers, a..b]")) == (
        "mine.yaml:3:22: bad pattern 'a..b': a component is empty\n"
        "      - target: [layers, a..b]\n"
        "                         ^^^^"
    )


def test_a_bad_exclude_pattern_is_named_at_its_place() -> None:
    assert complaint(with_rule("exclude: [re:.*_proj]")) == (
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
def test_a_pattern_that_yaml_reads_otherwise_must_stand_in_quotes(patterns: str, expected: str) -> None:
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
def test_a_pattern_that_begins_with_a_star_and_has_no_quotes_is_not_yaml(patterns: str, expected: str) -> None:
    assert complaint(PLAIN.replace("[layers]", patterns)) == expected


def test_a_pattern_with_braces_needs_no_quotes_on_a_line_of_its_own() -> None:
    assert load(PLAIN.replace("[layers]", "\n      - layers.{0,-1}\n      - lm_head?")).rules[0].target == (
        "layers.{0,-1}",
        "lm_head?",
    )


# --- formats


@pytest.mark.parametrize("role", ["weight", "input"])
def test_an_unknown_format_is_an_error_with_a_guess(role: str) -> None:
    assert complaint(f"version: 1\nrules:\n  - target: [layers]\n    {role}: mxpf4\n") == (
        f"mine.yaml:4:{7 + len(role)}: no format 'mxpf4'; did you mean 'mxfp4'?\n"
        f"        {role}: mxpf4\n"
        f"        {' ' * len(role)}  ^^^^^"
    )


def test_an_unknown_format_near_to_none_is_an_error_with_all_there_are() -> None:
    assert complaint(PLAIN.replace("mxfp4", "q8") + "formats:\n  own: {like: mxfp4}\n") == (
        f"mine.yaml:4:13: no format 'q8'; expected one of: {all_of('own')}\n        weight: q8\n                ^^"
    )


def test_a_format_of_the_recipes_own_is_known_to_its_rules() -> None:
    recipe = load(PLAIN.replace("mxfp4", "g16") + "formats:\n  g16: {like: mxfp4, block: 16}\n")
    assert recipe.format("g16").to_dict() == {
        "element": "e2m1",
        "block": 16,
        "scale": "e8m0",
        "scale_rule": "floor",
        "tensor_scale": "none",
        "static_scale": "none",
        "rounding": "nearest",
        "hadamard": "none",
        "four_over_six": False,
        "seed": 0,
    }


def test_a_format_may_be_like_one_above_it() -> None:
    recipe = load(PLAIN + "formats:\n  g16: {like: mxfp4, block: 16}\n  g16e: {like: g16, scale_rule: even}\n")
    assert (recipe.format("g16e").block, recipe.format("g16e").scale_rule) == (16, "even")


def test_a_format_that_is_like_none_is_an_error_with_a_guess() -> None:
    assert complaint(with_format("like: mxpf4")) == (
        "mine.yaml:6:9: no format 'mxpf4'; did you mean 'mxfp4'?\n      mine: {like: mxpf4}\n            ^^^^^^^^^^^^^"
    )


def test_a_format_cannot_be_like_one_below_it() -> None:
    assert complaint(PLAIN + "formats:\n  b: {like: a}\n  a: {like: mxfp4}\n") == (
        f"mine.yaml:6:6: no format 'a'; expected one of: {all_of()}\n      b: {{like: a}}\n         ^^^^^^^^^"
    )


def test_a_format_cannot_be_like_itself() -> None:
    assert complaint(with_format("like: mine")) == (
        "mine.yaml:6:9: no format 'mine'; did you mean 'mxint8'?\n      mine: {like: mine}\n            ^^^^^^^^^^^^"
    )


def test_a_format_that_is_like_a_broken_one_is_no_mistake_of_its_own() -> None:
    assert complaint(PLAIN + "formats:\n  a: {like: mxpf4}\n  b: {like: a}\n") == (
        "mine.yaml:6:6: no format 'mxpf4'; did you mean 'mxfp4'?\n      a: {like: mxpf4}\n         ^^^^^^^^^^^^^"
    )


def test_fields_that_do_not_combine_are_an_error() -> None:
    assert complaint(with_format("like: mxfp4, scale: e4m3")) == (
        "mine.yaml:6:9: scale rule 'floor' does not go with scale e4m3; expected one of: nearest\n"
        "      mine: {like: mxfp4, scale: e4m3}\n"
        "            ^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_a_tensor_scale_above_powers_of_two_is_an_error() -> None:
    assert complaint(with_format("like: mxfp4, tensor_scale: row")) == (
        "mine.yaml:6:9: tensor_scale 'row' with scale e8m0: powers of two span FP32's range already; "
        "leave it at 'none'\n"
        "      mine: {like: mxfp4, tensor_scale: row}\n"
        "            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_a_block_holds_at_least_one_value() -> None:
    assert complaint(with_format("like: mxfp4, block: 0")) == (
        "mine.yaml:6:30: block is 0; at least 1 value must share a scale\n"
        "      mine: {like: mxfp4, block: 0}\n"
        "                                 ^"
    )


@pytest.mark.parametrize("like", ["mxfp4", "nvfp4"])
def test_a_name_of_the_catalogue_is_taken(like: str) -> None:
    assert complaint(f"{PLAIN}formats:\n  mxfp4: {{like: {like}, block: 16}}\n") == (
        "mine.yaml:6:10: 'mxfp4' is a format of the catalogue; name yours otherwise\n"
        f"      mxfp4: {{like: {like}, block: 16}}\n"
        "             ^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_a_format_cannot_be_named_as_tables_show_none() -> None:
    assert complaint(PLAIN + "formats:\n  '-': {like: mxfp4}\n").startswith("mine.yaml:6:")


# --- what is not a recipe at all


@pytest.mark.parametrize(
    "text",
    [pytest.param("", id="nothing"), pytest.param("\n\n", id="blank-lines"), pytest.param("# later\n", id="a-remark")],
)
def test_an_empty_file_is_an_error(text: str) -> None:
    assert complaint(text) == "mine.yaml: is empty; a recipe starts with 'version: 1'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "- target: [layers]\n",
            "mine.yaml:1:1: expected a mapping (version: 1, rules: …), got a list\n"
            "    - target: [layers]\n"
            "    ^^^^^^^^^^^^^^^^^^",
            id="list",
        ),
        pytest.param(
            "hello\n",
            "mine.yaml:1:1: expected a mapping (version: 1, rules: …), got text\n    hello\n    ^^^^^",
            id="text",
        ),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error(text: str, expected: str) -> None:
    assert complaint(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "version: 1\nrules: [a\n",
            "mine.yaml:3:1: not YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)",
            id="bracket-not-closed",
        ),
        pytest.param(
            "version: 1\n  rules: 3\n",
            "mine.yaml:2:8: not YAML: mapping values are not allowed here: a ':' too many, or the line above lacks its "
            "':' or the blank behind its '-'\n      rules: 3\n           ^^^",
            id="wrong-indent",
        ),
        pytest.param(
            PLAIN + "---\n" + PLAIN,
            "mine.yaml:5:1: not YAML: but found another document (expected a single document in the stream)\n"
            "    ---\n"
            "    ^^^",
            id="two-documents",
        ),
        pytest.param(
            "version: 1\nrules: *others\n",
            "mine.yaml:2:8: not YAML: a pattern that begins with '*' must stand in quotes\n"
            "    rules: *others\n           ^^^^^^^",
            id="alias-of-nothing",
        ),
        pytest.param(
            PLAIN + "model: \x07\n",
            "mine.yaml: not YAML: unacceptable character #x0007: special characters are not allowed",
            id="control-character",
        ),
    ],
)
def test_what_is_not_yaml_is_an_error_at_its_place(text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_a_tab_is_an_error_that_says_so() -> None:
    assert complaint("version: 1\nrules:\n\t- target: [a]\n") == (
        "mine.yaml:3:1: not YAML: a tab; indent with spaces\n     - target: [a]\n    ^^^^^^^^^^^^^^"
    )


def test_a_value_that_cannot_be_read_as_its_tag_says_is_an_error() -> None:
    assert complaint(PLAIN + "model: !!int abc\n") == (
        "mine.yaml:5:8: cannot be read as int\n    model: !!int abc\n           ^^^^^^^^^"
    )


@pytest.mark.parametrize(
    ("tag", "shown"),
    [
        pytest.param("!!python/name:os.system", "tag:yaml.org,2002:python/name:os.system", id="python"),
        pytest.param("!mine", "!mine", id="own"),
    ],
)
def test_a_tag_on_a_value_is_one_mistake(tag: str, shown: str) -> None:
    assert complaint(f"version: 1\nrules:\n  - target: [layers]\n    weight: {tag} mxfp4\n") == (
        f"mine.yaml:4:13: '{shown}' is not read here; write plain values\n"
        f"        weight: {tag} mxfp4\n"
        f"                {'^' * (len(tag) + 6)}"
    )


def test_a_tag_on_a_mapping_is_an_error() -> None:
    assert complaint("version: 1\nrules:\n  - !!python/object:os.system {target: [layers], weight: mxfp4}\n") == (
        "mine.yaml:3:5: 'tag:yaml.org,2002:python/object:os.system' is not read here; write plain values\n"
        "      - !!python/object:os.system {target: [layers], weight: mxfp4}\n"
        "        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_a_tag_on_a_list_is_an_error() -> None:
    assert complaint("version: 1\nrules:\n  - target: !!python/tuple [layers]\n    weight: mxfp4\n") == (
        "mine.yaml:3:13: 'tag:yaml.org,2002:python/tuple' is not read here; write plain values\n"
        "      - target: !!python/tuple [layers]\n"
        "                ^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_half_a_character_is_an_error_at_its_place() -> None:
    assert complaint(PLAIN + 'model: "\\ud800"\n').startswith("mine.yaml:5:8: ")


def test_aliases_that_expand_without_end_are_an_error() -> None:
    bomb = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    bomb += [f"{one}: &{one} [{','.join([f'*{before}'] * 10)}]" for before, one in zip("abcdef", "bcdefg", strict=True)]
    assert complaint("\n".join(bomb)) == (
        "mine.yaml:1:1: has more than 10,000 values, with its aliases spelled out\n"
        "    a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        "    ^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_an_alias_inside_itself_is_an_error() -> None:
    assert complaint("version: 1\nrules: &rules\n  - *rules\n") == (
        "mine.yaml:2:8: is nested more than 20 levels deep (an alias inside itself?)\n"
        "    rules: &rules\n"
        "           ^^^^^^"
    )


def test_deep_nesting_is_an_error() -> None:
    assert complaint("version: 1\nrules: " + "[" * 20) == (
        "mine.yaml:2:27: is nested more than 20 levels deep\n"
        "    rules: [[[[[[[[[[[[[[[[[[[[\n"
        "                              ^"
    )


def test_nesting_that_would_exhaust_the_stack_is_an_error_too() -> None:
    assert complaint("[" * 100_000).startswith("mine.yaml:1:21: is nested more than 20 levels deep\n")


def test_a_long_line_is_shown_around_the_mistake() -> None:
    line = f"rules: [{{name: {'x' * 60}, target: layers, exclude: [{'y' * 60}], weight: mxfp4}}]"
    assert complaint(f"version: 1\n{line}\n") == (
        "mine.yaml:2:86: 'target' expects a list, got 'layers'; write [layers]\n"
        f"    {'x' * 40}, target: layers, exclude: [{'y' * 32}\n"
        f"    {' ' * 50}^^^^^^"
    )


def test_what_is_not_utf8_is_an_error() -> None:
    assert complaint(b"version: 1\nmodel: \xff\n") == "mine.yaml: is not UTF-8 text (byte 18)"


def test_a_file_that_is_too_large_is_an_error() -> None:
    assert complaint(b"#" * 250_001) == "mine.yaml: cannot be read: it has more than 250,000 bytes"


# --- what is not there


def failure(name: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    return str(caught.value)


def test_a_folder_is_no_recipe() -> None:
    Path("sub").mkdir()
    assert failure("sub") == "sub: is a folder; expected a recipe file"


def test_a_missing_file_is_an_error_with_the_nearest_in_its_folder() -> None:
    write("mine.yaml", PLAIN)
    assert failure("mien.yaml") == "mien.yaml: no such file; did you mean 'mine.yaml'?"


def test_a_missing_file_in_an_empty_folder_is_an_error() -> None:
    assert failure("mine.yaml") == "mine.yaml: no such file"


def test_a_missing_folder_is_an_error() -> None:
    assert failure("nowhere/mine.yaml") == "nowhere/mine.yaml: no such file"


def test_an_unknown_shipped_name_is_an_error_with_a_guess() -> None:
    assert failure("w4a4-mxpf4") == "no recipe 'w4a4-mxpf4'; did you mean 'w4a4-mxfp4'?"


def test_a_name_near_to_none_is_an_error_with_all_there_are() -> None:
    assert failure("zzzz") == f"no recipe 'zzzz'; expected one of: {', '.join(sorted(shipped_recipes()))}"


# --- several mistakes


def test_all_mistakes_are_told_in_one_run_in_the_order_of_the_file() -> None:
    text = """\
versoin: 1
rules:
  - target: [layers]
    wieght: mxfp4
  - target: [layers, a..b]
    weight: mxpf4
    gradient: stee
  - exclude: [lm_head]
    weight: mxfp4
untie: maybe
"""
    assert complaint(text) == (
        "mine.yaml:1:1: unknown key 'versoin'; did you mean 'version'?\n"
        "    versoin: 1\n"
        "    ^^^^^^^\n"
        "mine.yaml:4:5: unknown key 'wieght'; did you mean 'weight'?\n"
        "        wieght: mxfp4\n"
        "        ^^^^^^\n"
        "mine.yaml:5:22: bad pattern 'a..b': a component is empty\n"
        "      - target: [layers, a..b]\n"
        "                         ^^^^\n"
        "mine.yaml:6:13: no format 'mxpf4'; did you mean 'mxfp4'?\n"
        "        weight: mxpf4\n"
        "                ^^^^^\n"
        "mine.yaml:7:15: 'gradient' cannot be 'stee'; did you mean 'ste'?\n"
        "        gradient: stee\n"
        "                  ^^^^\n"
        "mine.yaml:8:5: key 'target' is missing\n"
        "      - exclude: [lm_head]\n"
        "        ^^^^^^^^^^^^^^^^^^\n"
        "mine.yaml:10:8: 'untie' expects true or false, got 'maybe'\n"
        "    untie: maybe\n"
        "           ^^^^^"
    )


def test_the_mistakes_are_also_there_one_by_one() -> None:
    with pytest.raises(RecipeError) as caught:
        load("version: 1\nrules:\n  - target: [layers]\n    weight: mxpf4\n    input: q8\n")
    assert [(mistake.where, mistake.message) for mistake in caught.value.mistakes] == [
        ("mine.yaml:4:13", "no format 'mxpf4'; did you mean 'mxfp4'?"),
        ("mine.yaml:5:12", f"no format 'q8'; expected one of: {all_of()}"),
    ]


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


def test_the_rules_of_the_extended_recipe_come_after() -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nrules:\n  - name: own\n    target: [layers.0]\n    weight: nvfp4\n")
    assert [rule.name for rule in recipe.rules] == ["own", "base"]


def test_what_a_recipe_does_not_set_the_extended_one_does() -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\noutput: own-output\n")
    assert (recipe.model, recipe.output) == ("base-model", "own-output")


def test_a_recipe_may_only_extend() -> None:
    recipe = load("version: 1\nextends: w4a4-mxfp4\n")
    assert recipe.rules == load_recipe("w4a4-mxfp4").rules


def test_the_formats_of_the_extended_recipe_are_known() -> None:
    write("base.yaml", BASE)
    recipe = load(
        "version: 1\nextends: base.yaml\n"
        "formats:\n  g8: {like: g16, block: 8}\n"
        "rules:\n  - target: [layers.0]\n    weight: g8\n    input: g16\n"
    )
    assert {name: format.block for name, format in recipe.own_formats.items()} == {"g16": 16, "g8": 8}


def test_a_format_of_the_extended_recipe_may_be_redefined_from_another_of_ones_own() -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nformats:\n  g8: {like: mxfp4, block: 8}\n  g16: {like: g8}\n")
    assert recipe.format("g16").block == 8


def test_a_chain_of_recipes_is_merged_in_order() -> None:
    write("base.yaml", BASE)
    rule = "rules:\n  - name: {name}\n    target: [layers]\n    weight: mxfp4\n"
    write("middle.yaml", "version: 1\nextends: base.yaml\n" + rule.format(name="middle"))
    recipe = load("version: 1\nextends: middle.yaml\n" + rule.format(name="own"))
    assert [rule.name for rule in recipe.rules] == ["own", "middle", "base"]


def test_a_path_is_looked_for_beside_the_recipe_that_names_it() -> None:
    write("sub/base.yaml", BASE)
    recipe = load_recipe(write("sub/own.yaml", "version: 1\nextends: base.yaml\n"))
    assert recipe.rule_name(0) == "base"


def test_values_of_the_extended_recipe_are_found_in_its_file() -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nrules:\n  - target: [layers.0]\n    weight: nvfp4\n")
    assert recipe.where("rules", 1, "target", 1) == (
        "base.yaml:8:22",
        "        target: [layers, norm]\n                         ^^^^",
    )


def test_values_of_the_recipe_itself_are_found_in_its_file() -> None:
    write("base.yaml", BASE)
    recipe = load("version: 1\nextends: base.yaml\nrules:\n  - target: [layers.0]\n    weight: nvfp4\n")
    assert recipe.where("rules", 0, "target", 0) == (
        "mine.yaml:4:14",
        "      - target: [layers.0]\n                 ^^^^^^^^",
    )


def test_the_text_of_a_merged_recipe_stands_alone() -> None:
    write("base.yaml", BASE)
    merged = load("version: 1\nextends: base.yaml\noutput: own-output\n")
    again = load_recipe(write("elsewhere/merged.yaml", merged.text))
    assert again.model_dump() == merged.model_dump()


def test_an_extended_recipe_that_is_not_there_is_an_error_at_its_name() -> None:
    assert complaint("version: 1\nextends: base.yaml\n").startswith("mine.yaml:2:10: no such file")


def test_a_misspelt_shipped_name_to_extend_is_an_error_with_a_guess() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("sub/mine.yaml", "version: 1\nextends: w4a4-mxpf4\n"))
    assert str(caught.value) == (
        "sub/mine.yaml:2:10: no recipe 'w4a4-mxpf4'; did you mean 'w4a4-mxfp4'?\n"
        "    extends: w4a4-mxpf4\n"
        "             ^^^^^^^^^^"
    )


def test_a_folder_cannot_be_extended() -> None:
    Path("sub").mkdir()
    assert complaint("version: 1\nextends: sub\n") == (
        "mine.yaml:2:10: is a folder; expected a recipe file\n    extends: sub\n             ^^^"
    )


def test_a_recipe_cannot_extend_itself() -> None:
    assert complaint("version: 1\nextends: mine.yaml\n") == (
        "mine.yaml:2:10: 'mine.yaml' extends this recipe in turn\n    extends: mine.yaml\n             ^^^^^^^^^"
    )


def test_recipes_cannot_extend_each_other() -> None:
    write("other.yaml", "version: 1\nextends: mine.yaml\n")
    assert complaint("version: 1\nextends: other.yaml\n") == (
        "other.yaml:2:10: 'mine.yaml' extends this recipe in turn\n    extends: mine.yaml\n             ^^^^^^^^^"
    )


def test_mistakes_in_the_extended_recipe_name_its_file_and_come_last() -> None:
    write("base.yaml", PLAIN.replace("weight", "wieght"))
    assert complaint("version: 1\nextends: base.yaml\nzebra: 1\n") == (
        "mine.yaml:3:1: unknown key 'zebra'; expected one of: "
        "formats, model, output, rules, saved_inputs, storage, untie\n"
        "    zebra: 1\n"
        "    ^^^^^\n"
        "base.yaml:4:5: unknown key 'wieght'; did you mean 'weight'?\n"
        "        wieght: mxfp4\n"
        "        ^^^^^^"
    )


def test_a_format_that_a_broken_extended_recipe_might_have_is_no_mistake() -> None:
    write("base.yaml", "")
    assert complaint("version: 1\nextends: base.yaml\nrules:\n  - target: [layers]\n    weight: g16\n") == (
        "base.yaml: is empty; a recipe starts with 'version: 1'"
    )


def test_an_unknown_format_beside_an_extended_recipe_is_an_error_with_its_formats_too() -> None:
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


def test_two_operands_that_are_not_rotated_alike_are_an_error_where_the_input_stands() -> None:
    text = PLAIN.replace("mxfp4", "turned") + "    input: mxfp4\nformats:\n  turned: {like: mxfp4, hadamard: 32}\n"
    assert complaint(text) == (
        "mine.yaml:5:12: hadamard 32 of the weight's format and none of the input's: both operands are rotated alike, "
        "or their product is another\n"
        "        input: mxfp4\n"
        "               ^^^^^"
    )


def test_every_field_of_a_format_can_be_set() -> None:
    recipe = load(
        PLAIN
        + "formats:\n"
        + "  square: {like: nvfp4, block: [16, 16], four_over_six: true, rounding: stochastic, seed: 7}\n"
        + "  static: {like: nvfp4, tensor_scale: static, static_scale: 0.02, hadamard: 128, seed: 3}\n"
        + "  row: {like: fp8_e4m3, element: e5m2, tensor_scale: row}\n"
    )
    square, static, row = (recipe.format(name) for name in ("square", "static", "row"))
    assert (square.block, square.four_over_six, square.rounding, square.seed) == ((16, 16), True, "stochastic", 7)
    assert (static.tensor_scale, static.static_scale, static.hadamard, static.seed) == ("static", 0.02, 128, 3)
    assert (row.element.name, row.block, row.scale, row.tensor_scale) == ("e5m2", None, None, "row")
