"""The values of a recipe: what is expected of each, and of the formats of its own."""

from collections.abc import Callable

import pytest

from qsurgeon.recipe import Recipe

PLAIN = """\
version: 1
rules:
  - target: [layers]
    weight: mxfp4
"""


Load = Callable[[str | bytes], Recipe]
Complain = Callable[[str | bytes], str]
Names = Callable[..., str]


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
def test_a_value_of_the_wrong_kind_is_told_what_is_expected(complaint: Complain, text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_one_text_among_patterns_that_is_a_number_is_one_mistake(complaint: Complain) -> None:
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
def test_a_word_that_a_key_cannot_be_is_an_error_with_the_nearest_that_it_can(
    complaint: Complain, text: str, expected: str
) -> None:
    assert complaint(text) == expected


def test_the_only_type_misspelt_is_one_mistake(complaint: Complain) -> None:
    assert complaint(with_rule("types: [Lineer]")) == (
        "mine.yaml:5:13: 'types' cannot be 'Lineer'; did you mean 'Linear'?\n"
        "        types: [Lineer]\n"
        "                ^^^^^^"
    )


@pytest.mark.parametrize("version", ["true", "1.0"])
def test_a_version_is_the_whole_number_and_nothing_that_equals_it(complaint: Complain, version: str) -> None:
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
def test_what_must_not_be_empty_is_told_so(complaint: Complain, text: str, expected: str) -> None:
    assert complaint(text) == expected


# --- formats


@pytest.mark.parametrize("role", ["weight", "input"])
def test_an_unknown_format_is_an_error_with_a_guess(complaint: Complain, role: str) -> None:
    assert complaint(f"version: 1\nrules:\n  - target: [layers]\n    {role}: mxpf4\n") == (
        f"mine.yaml:4:{7 + len(role)}: no format 'mxpf4'; did you mean 'mxfp4'?\n"
        f"        {role}: mxpf4\n"
        f"        {' ' * len(role)}  ^^^^^"
    )


def test_an_unknown_format_near_to_none_is_an_error_with_all_there_are(complaint: Complain, all_of: Names) -> None:
    assert complaint(PLAIN.replace("mxfp4", "q8") + "formats:\n  own: {like: mxfp4}\n") == (
        f"mine.yaml:4:13: no format 'q8'; expected one of: {all_of('own')}\n        weight: q8\n                ^^"
    )


def test_a_format_of_the_recipes_own_is_known_to_its_rules(load: Load) -> None:
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


def test_a_format_may_be_like_one_above_it(load: Load) -> None:
    recipe = load(PLAIN + "formats:\n  g16: {like: mxfp4, block: 16}\n  g16e: {like: g16, scale_rule: even}\n")
    assert (recipe.format("g16e").block, recipe.format("g16e").scale_rule) == (16, "even")


def test_a_format_that_is_like_none_is_an_error_with_a_guess(complaint: Complain) -> None:
    assert complaint(with_format("like: mxpf4")) == (
        "mine.yaml:6:9: no format 'mxpf4'; did you mean 'mxfp4'?\n      mine: {like: mxpf4}\n            ^^^^^^^^^^^^^"
    )


def test_a_format_cannot_be_like_one_below_it(complaint: Complain, all_of: Names) -> None:
    assert complaint(PLAIN + "formats:\n  b: {like: a}\n  a: {like: mxfp4}\n") == (
        f"mine.yaml:6:6: no format 'a'; expected one of: {all_of()}\n      b: {{like: a}}\n         ^^^^^^^^^"
    )


def test_a_format_cannot_be_like_itself(complaint: Complain) -> None:
    assert complaint(with_format("like: mine")) == (
        "mine.yaml:6:9: no format 'mine'; did you mean 'mxint8'?\n      mine: {like: mine}\n            ^^^^^^^^^^^^"
    )


def test_a_format_that_is_like_a_broken_one_is_no_mistake_of_its_own(complaint: Complain) -> None:
    assert complaint(PLAIN + "formats:\n  a: {like: mxpf4}\n  b: {like: a}\n") == (
        "mine.yaml:6:6: no format 'mxpf4'; did you mean 'mxfp4'?\n      a: {like: mxpf4}\n         ^^^^^^^^^^^^^"
    )


def test_fields_that_do_not_combine_are_an_error(complaint: Complain) -> None:
    assert complaint(with_format("like: mxfp4, scale: e4m3")) == (
        "mine.yaml:6:9: scale rule 'floor' does not go with scale e4m3; expected one of: nearest\n"
        "      mine: {like: mxfp4, scale: e4m3}\n"
        "            ^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_a_tensor_scale_above_powers_of_two_is_an_error(complaint: Complain) -> None:
    assert complaint(with_format("like: mxfp4, tensor_scale: row")) == (
        "mine.yaml:6:9: tensor_scale 'row' with scale e8m0: powers of two span FP32's range already; "
        "leave it at 'none'\n"
        "      mine: {like: mxfp4, tensor_scale: row}\n"
        "            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_a_block_holds_at_least_one_value(complaint: Complain) -> None:
    assert complaint(with_format("like: mxfp4, block: 0")) == (
        "mine.yaml:6:30: block is 0; at least 1 value must share a scale\n"
        "      mine: {like: mxfp4, block: 0}\n"
        "                                 ^"
    )


@pytest.mark.parametrize("like", ["mxfp4", "nvfp4"])
def test_a_name_of_the_catalogue_is_taken(complaint: Complain, like: str) -> None:
    assert complaint(f"{PLAIN}formats:\n  mxfp4: {{like: {like}, block: 16}}\n") == (
        "mine.yaml:6:10: 'mxfp4' is a format of the catalogue; name yours otherwise\n"
        f"      mxfp4: {{like: {like}, block: 16}}\n"
        "             ^^^^^^^^^^^^^^^^^^^^^^^^"
    )


@pytest.mark.parametrize("name", ["4bit", "my format"])
def test_a_format_needs_a_name_that_a_rule_can_say(complaint: Complain, name: str) -> None:
    said = complaint(f"{PLAIN}formats:\n  '{name}': {{like: mxfp4}}\n")
    assert said.startswith(
        f"mine.yaml:6:{7 + len(name)}: '{name}' cannot name a format: a name begins with a letter and has no spaces\n"
    )


def test_a_format_cannot_be_named_as_tables_show_none(complaint: Complain) -> None:
    assert complaint(PLAIN + "formats:\n  '-': {like: mxfp4}\n").startswith("mine.yaml:6:")


def test_two_operands_that_are_not_rotated_alike_are_an_error_where_the_input_stands(complaint: Complain) -> None:
    text = PLAIN.replace("mxfp4", "turned") + "    input: mxfp4\nformats:\n  turned: {like: mxfp4, hadamard: 32}\n"
    assert complaint(text) == (
        "mine.yaml:5:12: hadamard 32 of the weight's format and none of the input's: both operands are rotated alike, "
        "or their product is another\n"
        "        input: mxfp4\n"
        "               ^^^^^"
    )


def test_every_field_of_a_format_can_be_set(load: Load) -> None:
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
