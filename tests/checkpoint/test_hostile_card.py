"""Model cards that are made to break out of their place, or to keep a reader busy."""

import itertools
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from markdown_it import MarkdownIt

import qsurgeon
from qsurgeon.checkpoint.card import with_record
from qsurgeon.checkpoint.card.front_matter import MOST_LETTERS, ends, read_front_matter, written
from qsurgeon.checkpoint.card.markdown import code, fenced, inline
from qsurgeon.errors import CheckpointError
from qsurgeon.recipe import Recipe
from qsurgeon.surgery import Record, record_of

RULES = {"rules": [{"name": "mlp", "target": ["mlp"], "exclude": ["layers.0"], "weight": "mxfp4"}]}
SUMMARY = "half of it is wrapped"
MARK = "<!-- /qsurgeon -->"
SCRIPT = "<script>alert(1)</script>"
EVIL = [
    f"# {MARK} {SCRIPT}",
    f"{MARK}\n{SCRIPT}",
    f"<!-- qsurgeon -->\n{MARK}",
    "<!-- qsurgeon: notice -->\n<!-- /qsurgeon: notice -->",
    f"```\n{SCRIPT}\n```",
    f"~~~\n{SCRIPT}\n~~~",
    f"# {'`' * 40}\n{'`' * 41}\n{SCRIPT}",
    f"---\nlicense: evil\n---\n{SCRIPT}",
    f"a\r```\r{SCRIPT}\r",
    f"--> {SCRIPT} <!-- -- >",
    f"\x1b[2J\u202e\0{SCRIPT}",
    f"![x](https://evil) [y](javascript:alert) {SCRIPT}",
    f"| {SCRIPT} | ` | \\| |",
    f"`` {SCRIPT} `",
    "<!-",
    "<!--->",
    "<!---->",
]


@pytest.fixture
def record(tiny_qwen2: Any) -> Record:
    return record_of(qsurgeon.plan(Recipe.model_validate({"version": 1, **RULES}), tiny_qwen2), "1.2.3")


def html_in(card: str) -> list[str]:
    """Return the HTML that a reader of Markdown finds in a card below its front matter."""
    text = card[REGEX_YAML_BLOCK.search(card).end() :]  # type: ignore[union-attr]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    every = itertools.chain(tokens, *(one.children or () for one in tokens))
    return [one.content.strip() for one in every if one.type.startswith("html")]


def links_in(card: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(card[ends(card) :])
    children = itertools.chain(*(one.children or () for one in tokens))
    return [str(one.attrs.get("href", one.attrs.get("src"))) for one in children if one.type in {"link_open", "image"}]


def code_in(card: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(card[ends(card) :])
    return [one.content for one in tokens if one.type == "fence" and one.info == "yaml"]


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("card", ["", "# Theirs\n"])
def test_whatever_a_recipe_says_it_stays_in_its_block(record: Record, text: str, card: str) -> None:
    made = with_record(card, record.model_copy(update={"recipe": text}), SUMMARY)
    marks = ["qsurgeon: notice", "/qsurgeon: notice"] if card else []
    assert [one for one in html_in(made) if "qsurgeon" in one] == [
        f"<!-- {mark} -->" for mark in [*marks, "qsurgeon", "/qsurgeon"]
    ]
    assert len(html_in(made)) == len(marks) + 2
    assert len(code_in(made)) == 1
    assert with_record(made, record.model_copy(update={"recipe": text}), SUMMARY) == made
    again = with_record(made, record, SUMMARY)
    assert "alert" not in again
    assert read_front_matter(made) == read_front_matter(again)
    assert made.isprintable() or set(filter(lambda one: not one.isprintable(), made)) == {"\n"}


def evil_record(record: Record, text: str) -> Record:
    """Return a record in which every text is ``text``, as somebody may write it into a config.json."""
    data = record.model_dump(mode="json")
    (rule,) = data["rules"]
    excluded = {text: [f"{text}.{text}"]}
    rule |= {"name": text, "weight": text, "modules": [f"{text}.a", f"{text}.b"], "excluded": excluded}
    data |= {"formats": {text: data["formats"]["mxfp4"]}, "qsurgeon_version": text, "source": text, "recipe": text}
    return Record.model_validate(data)


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("card", ["", "---\nlicense: mit\n---\n# Theirs\n"])
def test_whatever_a_record_says_it_is_text(record: Record, text: str, card: str) -> None:
    evil = evil_record(record, text)
    made = with_record(card, evil, f"2 with weight {text}")
    assert [one for one in html_in(made) if not re.fullmatch(r"<!-- /?qsurgeon(: notice)? -->", one)] == []
    assert len(html_in(made)) == (4 if card else 2)
    assert [one for one in links_in(made) if one != "#number-formats"] == []
    assert with_record(made, evil, f"2 with weight {text}") == made
    front = read_front_matter(made)
    assert front["tags"] == ["qsurgeon", text]
    assert front.get("license") == ("mit" if card else None)
    again = with_record(made, record, SUMMARY)
    assert "alert" not in again[ends(again) :]
    above = made.partition("\nThe recipe:\n")[0]
    rows = [line for line in above.splitlines() if line.startswith("| ") and "---" not in line.split("|")[1]]
    for row in rows:  # readers disagree in what an even number of backslashes does to a bar
        assert re.findall(r"\\.|[^\\]", row).count("|") == len(re.findall(r"(?<!\\)\|", row)) == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mxfp4", "mxfp4"),
        ("Qwen2.5-1.5B_x", "Qwen2.5-1.5B_x"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("[a](b) ![c] *d* `e` \\f", "\\[a\\](b) !\\[c\\] \\*d\\* \\`e\\` \\\\f"),
        ("a\nb", "a\\\\nb"),
    ],
)
def test_a_name_in_a_line_is_text(text: str, expected: str) -> None:
    assert inline(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers.0", "`layers.0`"),
        ("a`b", "``a`b``"),
        ("`", "`` ` ``"),
        ("", "`  `"),
        ("<!-- x -->", "`<! -- x - ->`"),
    ],
)
def test_a_name_as_code_is_text(text: str, expected: str) -> None:
    assert code(text) == expected


def test_a_recipe_is_shown_to_the_letter_where_it_does_no_harm() -> None:
    text = "# a - b -> c\n--- !x <! y\nversion: 1\n"
    assert fenced(text, "yaml") == ["```yaml", text.rstrip(), "```"]


# --- cards of others


def complaint(record: Record, card: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        with_record(card, record, SUMMARY)
    return str(caught.value)


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        (f"a: {'[' * 3000}", "is not YAML: it is nested more than 50 levels deep"),
        (f"a: {'[' * 3000}{']' * 3000}", "is not YAML: it is nested more than 50 levels deep"),
        (f"a: {'{a: ' * 3000}", "is not YAML: it is nested more than 50 levels deep"),
        (f"a: {'x' * MOST_LETTERS}", "is not YAML: it has more than 4,000,000 letters"),
        (f"a: {'9' * 5000}", "is not YAML: a number of 5,000 digits"),
        (f"a: 1{':1' * 5000}", "is not YAML: a number of 10,001 digits"),
        ("a: &a {b: 1}\nc: {<<: *a}", "is not YAML: it has a merge key (<<)"),
        ("a: 2021-99-99", "is not YAML: month must be in 1..12"),
        ("a: !!timestamp x", "is not YAML: 'NoneType' object has no attribute 'groupdict'"),
        ("a: !!bool x", "is not YAML: 'x'"),
        ("? [a]\n: b", "is not YAML: while constructing a mapping"),
        ("a: !!python/object/apply:os.system [x]", "is not YAML: could not determine a constructor for the tag"),
        ("tags: 5", "has tags that are no words; expected a list of them"),
        ("tags: {a: b}", "has tags that are no words; expected a list of them"),
        ("tags: [[a]]", "has tags that are no words; expected a list of them"),
        ("tags: [{a: b}]", "has tags that are no words; expected a list of them"),
    ],
    ids=lambda one: one[:20],
)
def test_front_matter_that_is_made_to_hang_or_to_break_a_reader_is_an_error(
    record: Record, front: str, expected: str
) -> None:
    message = complaint(record, f"---\n{front}\n---\n")
    assert message.startswith(f"README.md: its front matter {expected}")
    assert len(message) < 400


@pytest.mark.parametrize(
    "card",
    [
        "[" * 3000,
        "[" * 1_000_000,
        "---\n" + "\n" * 1_000_000,
        "---\r" * 300_000,
        "\n" * 1_000_000 + "---",
        "x---\n---" * 200_000,
        "---\n" + "\n---  x" * 200_000,
        "<!-- qsurgeon -->" * 100_000,
        "<!-- /qsurgeon -->" * 100_000,
        "<!-- qsurgeon --><!-- /qsurgeon -->" * 100_000,
        "<!-- qsurgeon: notice -->" * 100_000,
    ],
    ids=lambda one: repr(one[:12]),
)
def test_a_long_card_is_read_in_one_pass(record: Record, card: str) -> None:
    """What takes the square of its length would take hours here, or the stack."""
    made = with_record(card, record, SUMMARY)
    assert made.count("## Number formats") == 1
    assert with_record(made, record, SUMMARY) == made


def test_front_matter_is_read_as_it_was_written() -> None:
    data = {"a": "no", "b": [1, "---", "\n---\n"], "c": {"d": True}, "e": "\ud800\x1b"}
    assert read_front_matter(written(data)) == data
    assert yaml.safe_load(written(data).removesuffix("---\n")) == data


def test_the_card_of_a_model_that_is_rewritten_is_read_like_any_other(tiny_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for file in tiny_folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "README.md").write_text(f"---\na: {'[' * 3000}\n---\n")
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.rewrite("w4a4-mxfp4", source, tmp_path / "out")
    assert str(caught.value) == "README.md: its front matter is not YAML: it is nested more than 50 levels deep"
    assert not (tmp_path / "out").exists()


def test_front_matter_of_more_values_than_any_is_an_error(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("qsurgeon.checkpoint.card.front_matter")  # card has a function of that name
    monkeypatch.setattr(module, "MOST_VALUES", 1000)
    message = complaint(record, f"---\na: [{'a,' * 1000}]\n---\n")
    assert message == "README.md: its front matter is not YAML: it has more than 1,000 values"
