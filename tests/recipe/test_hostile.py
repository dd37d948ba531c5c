"""Recipes that are made to hang, to exhaust memory or to break the parser: one clear mistake each, and at once."""

import os
import re
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsurgeon.errors import RecipeError
from qsurgeon.recipe import load_recipe
from qsurgeon.recipe.select import Namespace, parse_pattern
from qsurgeon.recipe.text import MOST_BYTES

MOST_CALLS = 10_000_000
PLAIN = "version: 1\nrules:\n  - target: [layers]\n    weight: mxfp4\n"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick() -> Iterator[None]:
    """Fail a test that takes much work, counted in calls of functions: time depends on what else the machine does."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        assert calls < MOST_CALLS

    before = sys.getprofile()
    sys.setprofile(count)
    yield
    sys.setprofile(before)
    assert calls < MOST_CALLS


@pytest.fixture
def lean() -> Iterator[None]:
    """Fail a test that takes much memory."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20


def complaint(name: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    return str(caught.value)


def laughs(lists: int) -> str:
    """Return YAML where each list holds the one before it nine times."""
    lines = ["a0: &a0 [ha]"]
    lines += [f"a{one}: &a{one} [{', '.join([f'*a{one - 1}'] * 9)}]" for one in range(1, lists)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"model: {'[' * 200}{']' * 200}", "mine.yaml:5:27: is nested more than 20 levels deep", id="200"),
        pytest.param(
            f"model: {'[' * 100_000}{']' * 100_000}", "mine.yaml:5:27: is nested more than 20 levels deep", id="100000"
        ),
        pytest.param(f"model: {'{a: ' * 1000}", "mine.yaml:5:84: is nested more than 20 levels deep", id="mappings"),
        pytest.param(
            "model:\n" + "\n".join(f"{' ' * level}a:" for level in range(1, 500)),
            "mine.yaml:25:21: is nested more than 20 levels deep",
            id="block-style",
        ),
        pytest.param("- " * 100_000, "mine.yaml:5:1: not YAML: expected <block end>, but found '-'", id="dashes"),
        pytest.param("model:\n  " + "- " * 100_000, "mine.yaml:6:41: is nested more than 20 levels deep", id="lists"),
        pytest.param("model: &a [*a]", "mine.yaml:5:8: is nested more than 20 levels deep (an alias", id="self"),
        pytest.param("model: &a {x: *a}", "mine.yaml:5:8: is nested more than 20 levels deep (an alias", id="self-map"),
        pytest.param(laughs(40), "mine.yaml:1:1: has more than 10,000 values, with its aliases", id="laughs"),
        pytest.param(
            f"x: &x {{a: 1}}\nmodel: {{<<: [{', '.join(['*x'] * 20_000)}]}}",
            "mine.yaml:6:39938: has more than 10,000 values",
            id="merge-keys",
        ),
        pytest.param(
            "x: &x {a: 1, <<: *x}", "mine.yaml:5:11: is nested more than 20 levels deep (an alias", id="merge-of-itself"
        ),
        pytest.param(f"model: [{'a,' * 100_000}]", "mine.yaml:5:19983: has more than 10,000 values", id="values"),
        pytest.param(f"model: {{{'a, ' * 80_000}}}", "mine.yaml:5:14989: has more than 10,000 values", id="keys"),
        pytest.param(f"version: {'9' * 100_000}", "mine.yaml:5:1: key 'version' appears twice; ", id="digits-twice"),
        pytest.param(f"untie: {'9' * 100_000}", "mine.yaml:5:8: cannot be read as int", id="digits"),
        pytest.param(f"untie: 1{':1' * 124_000}", "mine.yaml:5:8: cannot be read as int", id="base-60"),
        pytest.param("model: a\0b", "mine.yaml: not YAML: unacceptable character #x0000", id="zero-byte"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_hostile_recipe_is_a_mistake_at_once(text: str, expected: str) -> None:
    Path("mine.yaml").write_text(PLAIN + text)
    message = complaint("mine.yaml")
    assert message.startswith(expected)
    assert len(message) < 1000


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize(
    "text", [laughs(40), f"model: [{'a,' * 100_000}]", f"x: &x {{}}\nuntie: {{<<: [{'*x, ' * 20_000}]}}"]
)
def test_a_hostile_recipe_takes_no_memory(text: str) -> None:
    Path("mine.yaml").write_text(PLAIN + text)
    assert " has more than 10,000 values" in complaint("mine.yaml")


@pytest.mark.usefixtures("quick", "lean")
def test_a_file_of_one_long_line_is_refused_unread() -> None:
    with Path("mine.yaml").open("wb") as file:
        file.truncate(500_000_000)  # a hole: takes no room
    assert complaint("mine.yaml") == f"mine.yaml: cannot be read: it has more than {MOST_BYTES:,} bytes"


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"version: 1\n\xc3", b"\xed\xa0\x80"], ids=str)
def test_bytes_that_are_no_text_are_refused(data: bytes) -> None:
    Path("mine.yaml").write_bytes(data)
    assert re.fullmatch(r"mine\.yaml: is not UTF-8 text \(byte \d+\)", complaint("mine.yaml"))


# --- what is no file


@pytest.mark.parametrize("name", ["pipe", "pipe.yaml"])
def test_a_pipe_is_refused_and_not_waited_for(name: str) -> None:
    os.mkfifo(name)
    assert complaint(name) == f"{name}: is not a regular file; expected a recipe file"
    Path("mine.yaml").write_text(f"version: 1\nextends: {name}\n")
    assert complaint("mine.yaml").startswith("mine.yaml:2:10: is not a regular file; expected a recipe file\n")


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(name: str) -> None:
    assert complaint(name) == f"{name}: is not a regular file; expected a recipe file"
    Path("mine.yaml").symlink_to(name)
    assert complaint("mine.yaml") == "mine.yaml: is not a regular file; expected a recipe file"


def test_a_folder_by_the_name_of_a_recipe_is_refused() -> None:
    Path("mine.yaml").mkdir()
    assert complaint("mine.yaml") == "mine.yaml: is a folder; expected a recipe file"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x" * 5000, f"no recipe '{'x' * 5000}'; expected one of: "),
        (f"{'x' * 5000}.yaml", f"{'x' * 5000}.yaml: no such file"),
        ("x/" * 5000, f"{'x/' * 4999}x: no such file"),
        ("a\0b", "no recipe 'a\\x00b'; expected one of: "),
    ],
    ids=["long", "long-file", "long-path", "zero-byte"],
)
def test_a_name_that_no_file_can_have_is_not_found(name: str, expected: str) -> None:
    assert complaint(name).startswith(expected)


def test_a_link_to_itself_is_no_file() -> None:
    Path("mine.yaml").symlink_to("mine.yaml")
    assert complaint("mine.yaml") == "mine.yaml: no such file; did you mean 'mine.yaml'?"


# --- many files, many mistakes


def test_a_long_chain_of_recipes_is_refused_where_it_gets_too_long() -> None:
    for place in range(500):
        Path(f"{place}.yaml").write_text(f"version: 1\nextends: {place + 1}.yaml\n")
    Path("500.yaml").write_text(PLAIN)
    assert complaint("0.yaml") == (
        "20.yaml:2:10: more than 20 recipes extend each other\n    extends: 21.yaml\n             ^^^^^^^"
    )


@pytest.mark.usefixtures("quick")
def test_of_many_mistakes_the_first_hundred_are_shown_and_all_are_there() -> None:
    Path("mine.yaml").write_text(PLAIN + "".join(f"k{place}: 1\n" for place in range(1000)))
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml")
    lines = str(caught.value).splitlines()
    assert len(caught.value.mistakes) == 1000
    assert len(lines) == 301
    assert lines[297].startswith("mine.yaml:104:1: unknown key 'k99'; ")
    assert lines[300] == "… and 900 more mistakes"


def test_a_hundred_mistakes_are_all_shown() -> None:
    Path("mine.yaml").write_text(PLAIN + "".join(f"k{place}: 1\n" for place in range(100)))
    assert complaint("mine.yaml").count("unknown key") == 100
    assert "more mistakes" not in complaint("mine.yaml")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("pattern", ["**." * 5000 + "zzz", "**.*." * 5000 + "zzz", "a.**.**.b"])
def test_a_pattern_of_many_stars_is_matched_at_once(pattern: str) -> None:
    names = Namespace(["a.b", *(f"model.layers.{one}.mlp.experts.{two}.up" for one in range(9) for two in range(20))])
    assert names.match(parse_pattern(pattern)).names == ({"a.b"} if pattern.startswith("a") else set())


# --- numbers


@pytest.mark.usefixtures("quick", "lean")
@pytest.mark.parametrize(
    "pattern",
    [
        "9" * 5000,
        f"-{'9' * 5000}",
        f"layers.{'9' * 5000}",
        f"layers.{{{'9' * 5000}}}",
        f"layers.{{0,-{'9' * 5000}}}",
        f"layers.{{{'9' * 5000},x}}.mlp",
        "layers.9999999999",
    ],
    ids=lambda one: one[:12],
)
def test_a_number_of_many_digits_names_nothing(pattern: str) -> None:
    names = Namespace(["layers.0.mlp", "layers.1.mlp"])
    parsed = parse_pattern(pattern)
    match = names.match(parsed)
    assert match.names == ({"layers.0.mlp"} if ",-" in pattern else set())
    assert names.hint(parsed)


@pytest.mark.usefixtures("quick", "lean")
@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("0..999999999", "the range 0..999999999 has more than 10000 numbers"),
        ("-999999999..-1", "the range -999999999..-1 has more than 10000 numbers"),
        ("0..9999999999", "'0..9999999999' is not a name, a number or a glob"),
        (f"0..{'9' * 5000}", f"'0..{'9' * 5000}' is not a name, a number or a glob"),
        (f"{'9' * 5000}..0", f"'{'9' * 5000}..0' is not a name, a number or a glob"),
    ],
    ids=lambda one: one[:16],
)
def test_a_range_of_many_numbers_is_a_mistake(item: str, expected: str) -> None:
    Path("mine.yaml").write_text(f"version: 1\nrules:\n  - target: ['layers.{{{item}}}']\n    weight: mxfp4\n")
    assert f"bad pattern 'layers.{{{item}}}': {expected}" in complaint("mine.yaml")


# --- what `extends` reaches

SECRETS = {
    "shadow": "root:$6$hunter2:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
    "netrc": "machine x login y password hunter2\n",
    "hosts.yml": "github.com:\n    oauth_token: hunter2\n    user: me\n",
    "logging": "version: 1\nhandlers: {mail: {credentials: [me, hunter2]}}\n",
    "key": "-----BEGIN KEY-----\nhunter2\n-----END KEY-----\n",
    "list": "- hunter2\n- &a [*a, hunter2]\n",
    "token": "hunter2",
    "env": "TOKEN=hunter2 # {\n\tx: [",
    "json": '{"auths": {"hub": {"auth": "hunter2"}}}',
    "tagged": "!hunter2 x: 1\n",
    "alias": "*hunter2\n",
    "twice": "hunter2: 1\nhunter2: 2\n",
}


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("depth", [1, 2])
def test_a_file_that_is_no_recipe_is_not_quoted(name: str, depth: int) -> None:
    Path(name).write_text(SECRETS[name])
    Path("mine.yaml").write_text(f"version: 1\nextends: {name if depth == 1 else 'between.yaml'}\n")
    Path("between.yaml").write_text(f"version: 1\nextends: {name}\n")
    message = complaint("mine.yaml")
    assert "hunter2" not in message
    first, *rest = message.splitlines()
    where = "mine.yaml" if depth == 1 else "between.yaml"
    assert first == f"{where}:2:10: '{name}' is not a recipe: it has no 'version: 1' with 'rules' or 'extends'"
    assert rest == [f"    extends: {name}", f"             {'^' * len(name)}"]


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nrules:\n  - target: [x]\n    weight: mxfp5\n",
        '{"version": 1, "rules": [{"target": ["x"], "weight": "mxfp5"}]}',
        '{\n  "version": 1,\n  "rules": [{"target": ["x"], "weight": "mxfp5"}]\n}',
    ],
)
def test_a_recipe_with_a_mistake_is_quoted(text: str) -> None:
    Path("base.yaml").write_text(text)
    Path("mine.yaml").write_text("version: 1\nextends: base.yaml\n")
    assert "no format 'mxfp5'" in complaint("mine.yaml")
    assert "base.yaml:" in complaint("mine.yaml")


def test_what_lies_in_other_folders_is_not_told(tmp_path: Path) -> None:
    Path("other").mkdir()
    Path("other/secret-name.yaml").write_text("")
    Path("here").mkdir()
    Path("here/secret-name.yaml").write_text("")
    for name in ("../other/x.yaml", "../other/secret-nam.yaml", str(tmp_path / "other" / "x.yaml")):
        Path("here/mine.yaml").write_text(f"version: 1\nextends: {name}\n")
        assert complaint("here/mine.yaml").splitlines()[0] == "here/mine.yaml:2:10: no such file"
    Path("here/mine.yaml").write_text("version: 1\nextends: secret-nam.yaml\n")
    assert complaint("here/mine.yaml").splitlines()[0].endswith("no such file; did you mean 'here/secret-name.yaml'?")
