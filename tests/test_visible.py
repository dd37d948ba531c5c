"""Nothing that somebody else chose steers a terminal, or looks like a line of ours."""

import json
import logging
import pickle
import shutil
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qsurgeon
from qsurgeon.cli import main
from qsurgeon.cli.printing import tamed_messages
from qsurgeon.errors import Mistake, QSurgeonError, RecipeError, in_words
from qsurgeon.recipe import Recipe
from qsurgeon.telling import say
from qsurgeon.visible import one_line, visible

Says = Callable[..., tuple[int, str]]

EVIL = "\x1b[2J\x1b]0;pwned\a\nqsurgeon: all is fine\r\u202e\u2028[bold]x[/bold]"
SHOWN = "\\x1b[2J\\x1b]0;pwned\\x07\\nqsurgeon: all is fine\\r\\u202e\\u2028[bold]x[/bold]"


def steers(text: str) -> list[str]:
    """Return the characters of what was printed that are more than text."""
    return [one for one in text if one != "\n" and unicodedata.category(one) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]


def every_line_is_ours(text: str) -> bool:
    return not any(line.startswith("qsurgeon: all is fine") for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0", "model.layers.0"),
        ("größer ×2 → Δ 日本", "größer ×2 → Δ 日本"),
        (EVIL, SHOWN),
        ("a\0b\x7f\x85\x9b", "a\\x00b\\x7f\\x85\\x9b"),
        ("a\tb", "a\\tb"),
        ("\ud800 \udcff", "\\ud800 \\udcff"),
        ("\u2066a\u2069\u200b\ufeff", "\\u2066a\\u2069\\u200b\\ufeff"),
        ("\U000e0041", "\\U000e0041"),
        ("\\x1b", "\\x1b"),
    ],
)
def test_what_is_not_printable_is_written_as_python_writes_it(text: str, expected: str) -> None:
    assert one_line(text) == expected
    assert one_line(expected) == expected


def test_every_character_is_printable_afterwards() -> None:
    assert one_line("".join(map(chr, range(0x110000)))).isprintable()


def test_only_line_breaks_stay_in_text_of_several_lines() -> None:
    assert visible("a\x1b\nb\r\n\tc\u2028") == "a\\x1b\nb\\r\n\\tc\\u2028"


@pytest.mark.parametrize(
    "kind", [QSurgeonError, *(one for one in QSurgeonError.__subclasses__() if "__init__" not in vars(one))]
)
def test_an_error_is_one_line(kind: type[QSurgeonError]) -> None:
    error = kind(f"{EVIL}: is wrong")
    assert str(error) == f"{SHOWN}: is wrong"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_mistake_is_a_line_and_its_excerpt() -> None:
    error = RecipeError([Mistake(EVIL, EVIL, f"    {EVIL}\n    ^")])
    first, *rest = str(error).split("\n")
    assert first == f"{SHOWN}: {SHOWN}"
    assert steers("\n".join(rest)) == []


def test_an_error_of_the_machine_is_one_line() -> None:
    assert in_words(OSError(2, "No such file", EVIL)) == f"{SHOWN}: No such file"


def test_what_is_said_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    assert capsys.readouterr().err == f"qsurgeon: {SHOWN}\n"


# --- reports


def evil_recipe() -> Recipe:
    rule = {"name": EVIL, "target": ["mlp"], "exclude": ["layers.0"], "weight": "mxfp4"}
    return Recipe.model_validate({"version": 1, "rules": [rule]})


@pytest.mark.parametrize("fold", [True, False])
def test_a_report_shows_the_name_of_a_rule_as_text(tiny_qwen2: Any, fold: bool) -> None:
    from qsurgeon.report.inspection import report_of
    from qsurgeon.report.rows import report_text

    report = report_of(qsurgeon.plan(evil_recipe(), tiny_qwen2))
    text = report_text(report, fold=fold, width=2000)
    assert steers(text) == []
    assert every_line_is_ours(text)
    assert f"rule '{SHOWN}'" in text
    assert len(text.splitlines()) == len(
        report_text(report_of(qsurgeon.plan(PLAIN, tiny_qwen2)), fold=fold).split("\n")
    )
    assert json.loads(report.to_json())["modules"][-1]["why"] == report.rows[-1].why  # JSON has it to the letter


PLAIN = Recipe.model_validate(
    {"version": 1, "rules": [{"name": "a", "target": ["mlp"], "exclude": ["layers.0"], "weight": "mxfp4"}]}
)


def test_a_record_that_somebody_else_wrote_is_shown_as_text(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    qsurgeon.rewrite(PLAIN, tiny_folder, folder)
    text = (folder / "config.json").read_text()
    mean = json.dumps(EVIL)[1:-1]
    assert text.count('"mxfp4"') == 2
    text = text.replace('"mxfp4"', f'"{mean}"').replace('"name": "a"', f'"name": "{mean}"')
    (folder / "config.json").write_text(text)
    report = qsurgeon.inspect(folder)
    assert report.rows[-2].why
    assert any(row.weight == EVIL for row in report.rows)
    assert (
        report.summary
        == "41.8% of the parameters are wrapped, in 6 of 22 Linear modules (5.6% are in no Linear, most in Embedding): "
        f"6 with weight {SHOWN}, input -"
    )
    assert report.summary in str(report).splitlines()
    assert steers(str(report)) == []
    assert every_line_is_ours(str(report))


# --- commands


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Says:
    """Return what runs a command: its exit code, and all that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qsurgeon", *map(str, words)])
        capfd.readouterr()
        try:
            main()
        except SystemExit as done:
            return int(done.code or 0), "".join(capfd.readouterr())
        raise AssertionError("a command exits")

    return run


@pytest.mark.parametrize("field", ["model_type", "architectures"])
def test_a_command_shows_a_config_that_somebody_else_wrote_as_text(
    tiny_folder: Path, tmp_path: Path, field: str, says: Says
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "in"))
    config = json.loads((folder / "config.json").read_text())
    config[field] = [EVIL] if isinstance(config[field], list) else EVIL
    (folder / "config.json").write_text(json.dumps(config))
    _, printed = says("inspect", folder)
    assert "pwned" in printed
    assert steers(printed) == []
    assert every_line_is_ours(printed)


def test_what_a_recipe_calls_its_output_is_text(tiny_folder: Path, tmp_path: Path, says: Says) -> None:
    recipe = {"version": 1, "output": "out\x1b[2J\nqsurgeon: all is fine", "model": str(tiny_folder)}
    rules = [{"name": EVIL, "target": ["mlp"], "weight": "mxfp4"}]
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe | {"rules": rules}))
    code, printed = says("apply", "mine.yaml")
    assert (tmp_path / recipe["output"] / "config.json").is_file()  # type: ignore[operator]
    assert code == 0
    assert steers(printed) == []
    assert every_line_is_ours(printed)


def test_what_other_libraries_log_and_warn_of_is_text(caplog: pytest.LogCaptureFixture) -> None:
    before = warnings.formatwarning, logging.getLogRecordFactory()
    with tamed_messages():
        logging.getLogger("transformers").warning("keys %s", EVIL)
        shown = warnings.formatwarning(EVIL, UserWarning, "x.py", 1, "")
    expected = SHOWN.replace("\\n", "\n    ")
    assert caplog.messages == [f"keys {expected}"]
    assert shown.splitlines()[:2] == f"x.py:1: UserWarning: {expected}".split("\n")
    assert (warnings.formatwarning, logging.getLogRecordFactory()) == before


def test_a_command_in_our_own_process_leaves_the_messages_of_others_as_it_found_them(says: Says) -> None:
    before = warnings.formatwarning, logging.getLogRecordFactory()
    says("formats")
    says("plan")
    assert (warnings.formatwarning, logging.getLogRecordFactory()) == before
