"""What is no recipe at all, or is not there; and all mistakes of one file in one run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qsurgeon.errors import RecipeError
from qsurgeon.recipe import Recipe, load_recipe, shipped_recipes

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


# --- what is not a recipe at all


@pytest.mark.parametrize(
    "text",
    [pytest.param("", id="nothing"), pytest.param("\n\n", id="blank-lines"), pytest.param("# later\n", id="a-remark")],
)
def test_an_empty_file_is_an_error(complaint: Complain, text: str) -> None:
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
def test_a_file_that_is_no_mapping_is_an_error(complaint: Complain, text: str, expected: str) -> None:
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
def test_what_is_not_yaml_is_an_error_at_its_place(complaint: Complain, text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_a_tab_is_an_error_that_says_so(complaint: Complain) -> None:
    assert complaint("version: 1\nrules:\n\t- target: [a]\n") == (
        "mine.yaml:3:1: not YAML: a tab; indent with spaces\n     - target: [a]\n    ^^^^^^^^^^^^^^"
    )


def test_a_value_that_cannot_be_read_as_its_tag_says_is_an_error(complaint: Complain) -> None:
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
def test_a_tag_on_a_value_is_one_mistake(complaint: Complain, tag: str, shown: str) -> None:
    assert complaint(f"version: 1\nrules:\n  - target: [layers]\n    weight: {tag} mxfp4\n") == (
        f"mine.yaml:4:13: '{shown}' is not read here; write plain values\n"
        f"        weight: {tag} mxfp4\n"
        f"                {'^' * (len(tag) + 6)}"
    )


def test_a_tag_on_a_mapping_is_an_error(complaint: Complain) -> None:
    assert complaint("version: 1\nrules:\n  - !!python/object:os.system {target: [layers], weight: mxfp4}\n") == (
        "mine.yaml:3:5: 'tag:yaml.org,2002:python/object:os.system' is not read here; write plain values\n"
        "      - !!python/object:os.system {target: [layers], weight: mxfp4}\n"
        "        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_a_tag_on_a_list_is_an_error(complaint: Complain) -> None:
    assert complaint("version: 1\nrules:\n  - target: !!python/tuple [layers]\n    weight: mxfp4\n") == (
        "mine.yaml:3:13: 'tag:yaml.org,2002:python/tuple' is not read here; write plain values\n"
        "      - target: !!python/tuple [layers]\n"
        "                ^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_half_a_character_is_an_error_at_its_place(complaint: Complain) -> None:
    assert complaint(PLAIN + 'model: "\\ud800"\n').startswith("mine.yaml:5:8: ")


def test_aliases_that_expand_without_end_are_an_error(complaint: Complain) -> None:
    bomb = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    bomb += [f"{one}: &{one} [{','.join([f'*{before}'] * 10)}]" for before, one in zip("abcdef", "bcdefg", strict=True)]
    assert complaint("\n".join(bomb)) == (
        "mine.yaml:1:1: has more than 10,000 values, with its aliases spelled out\n"
        "    a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        "    ^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_an_alias_inside_itself_is_an_error(complaint: Complain) -> None:
    assert complaint("version: 1\nrules: &rules\n  - *rules\n") == (
        "mine.yaml:2:8: is nested more than 20 levels deep (an alias inside itself?)\n"
        "    rules: &rules\n"
        "           ^^^^^^"
    )


def test_deep_nesting_is_an_error(complaint: Complain) -> None:
    assert complaint("version: 1\nrules: " + "[" * 20) == (
        "mine.yaml:2:27: is nested more than 20 levels deep\n"
        "    rules: [[[[[[[[[[[[[[[[[[[[\n"
        "                              ^"
    )


def test_nesting_that_would_exhaust_the_stack_is_an_error_too(complaint: Complain) -> None:
    assert complaint("[" * 100_000).startswith("mine.yaml:1:21: is nested more than 20 levels deep\n")


def test_a_long_line_is_shown_around_the_mistake(complaint: Complain) -> None:
    line = f"rules: [{{name: {'x' * 60}, target: layers, exclude: [{'y' * 60}], weight: mxfp4}}]"
    assert complaint(f"version: 1\n{line}\n") == (
        "mine.yaml:2:86: 'target' expects a list, got 'layers'; write [layers]\n"
        f"    {'x' * 40}, target: layers, exclude: [{'y' * 32}\n"
        f"    {' ' * 50}^^^^^^"
    )


def test_what_is_not_utf8_is_an_error(complaint: Complain) -> None:
    assert complaint(b"version: 1\nmodel: \xff\n") == "mine.yaml: is not UTF-8 text (byte 18)"


def test_a_file_that_is_too_large_is_an_error(complaint: Complain) -> None:
    assert complaint(b"#" * 250_001) == "mine.yaml: cannot be read: it has more than 250,000 bytes"


# --- what is not there


def failure(name: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    return str(caught.value)


def test_a_folder_is_no_recipe() -> None:
    Path("sub").mkdir()
    assert failure("sub") == "sub: is a folder; expected a recipe file"


def test_a_missing_file_is_an_error_with_the_nearest_in_its_folder(write: Write) -> None:
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


def test_all_mistakes_are_told_in_one_run_in_the_order_of_the_file(complaint: Complain) -> None:
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


def test_the_mistakes_are_also_there_one_by_one(load: Load, all_of: Names) -> None:
    with pytest.raises(RecipeError) as caught:
        load("version: 1\nrules:\n  - target: [layers]\n    weight: mxpf4\n    input: q8\n")
    assert [(mistake.where, mistake.message) for mistake in caught.value.mistakes] == [
        ("mine.yaml:4:13", "no format 'mxpf4'; did you mean 'mxfp4'?"),
        ("mine.yaml:5:12", f"no format 'q8'; expected one of: {all_of()}"),
    ]
