"""Suggested recipes: they beat the uniform recipe of the same bits, and the rule that spares the first and the last."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_math import make_problems

import qsurgeon
from qsurgeon.cli import main
from qsurgeon.errors import UsageError
from qsurgeon.observing import undisturbed
from qsurgeon.report.scanning import ScanReport
from qsurgeon.scanning import ALONE, Effect, Row
from qsurgeon.scanning.data import Examples, from_rows
from qsurgeon.scanning.effects import compared, said

TINY = Path(__file__).parents[2] / "examples/models/tiny-math"
SAMPLES = 24


def file_of(folder: Path, name: str, count: int, split: Any) -> Path:
    """Return a file of problems as a user has it: a prompt and its completion a line."""
    lines = [json.dumps({"prompt": p.prompt, "completion": p.completion}) for p in make_problems(count, split, seed=7)]
    (folder / name).write_text("\n".join(lines), "utf-8")
    return folder / name


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_of(tmp_path_factory.mktemp("data"), "train.jsonl", SAMPLES, "train")


@pytest.fixture(scope="module")
def found(train: Path) -> ScanReport:
    return qsurgeon.scan("w4a4-mxfp4", TINY, data=train, samples=SAMPLES, formats=["nvfp4", "mxfp8"])


def load() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    file = file_of(tmp_path_factory.mktemp("heldout"), "heldout.jsonl", 96, "heldout")
    return from_rows(file, tokenizer, 96, 512, 384)


@pytest.fixture(scope="module")
def plain(heldout: Examples) -> list[torch.Tensor]:
    model = load()
    with undisturbed(model):
        return [said(model, batch)[0] for batch in heldout.batches]


def divergence(recipe: Any, heldout: Examples, plain: Sequence[torch.Tensor]) -> float:
    """Return the mean KL of a model under a recipe, which is applied as a user applies it, from the model without."""
    model, effect = qsurgeon.apply(recipe, load()), Effect()
    with undisturbed(model):
        for batch, before in zip(heldout.batches, plain, strict=True):
            effect += compared(before, said(model, batch)[0], "kl", batch, shifts=True)
    return effect.mean_distance


def without(modules: Iterable[str]) -> qsurgeon.Recipe:
    exclude = ["<output_head>?", *modules]
    return qsurgeon.Recipe(
        version=1, rules=[{"target": ["**"], "exclude": exclude, "weight": "mxfp4", "input": "mxfp4"}]
    )


@pytest.mark.parametrize("count", [2, 4, 7, 14])
def test_sparing_what_is_suggested_beats_sparing_the_first_and_the_last(
    count: int, found: ScanReport, heldout: Examples, plain: list[torch.Tensor]
) -> None:
    names = [row.module for row in found.scan.of()]
    suggestion = found.suggest_exclude(count)
    assert len(suggestion.spared) == count
    ends = [*names[: count // 2], *names[len(names) - (count - count // 2) :]]
    ours = divergence(suggestion.recipe, heldout, plain)
    assert ours < divergence(without(ends), heldout, plain)
    assert ours == pytest.approx(divergence(without(suggestion.spared), heldout, plain), rel=1e-5)


def test_a_mixture_of_formats_beats_the_uniform_recipe_of_the_same_bits(
    found: ScanReport, heldout: Examples, plain: list[torch.Tensor]
) -> None:
    suggestion = found.suggest(4.5)
    assert suggestion.bits <= 4.5
    assert divergence(suggestion.recipe, heldout, plain) < divergence("w4a4-nvfp4", heldout, plain)


@pytest.mark.parametrize("bits", [4.25, 4.3, 5.0, 8.0, 15.0])
def test_the_bits_of_what_is_suggested_are_what_plan_says(bits: float, found: ScanReport) -> None:
    suggestion = found.suggest(bits)
    planned = qsurgeon.plan(suggestion.recipe, TINY)
    scanned = {row.module: row.values for row in found.scan.of()}
    hows = {step.module.name: step.quantization for step in planned.wrapped}
    spent = {name: how.weight.bits for name, how in hows.items() if how is not None and how.weight is not None}
    total = sum(spent.get(name, 16) * values for name, values in scanned.items()) / sum(scanned.values())
    assert total == pytest.approx(suggestion.bits)
    assert suggestion.bits <= bits
    assert set(suggestion.spared) == scanned.keys() - spent.keys()


def test_more_bits_never_cost_more(found: ScanReport) -> None:
    costs = [found.suggest(bits).cost for bits in (4.25, 4.5, 5, 6, 8, 12)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(found.suggest(4.25).before)


def test_a_budget_below_the_fewest_bits_is_refused(found: ScanReport) -> None:
    with pytest.raises(UsageError) as caught:
        found.suggest(4.2)
    assert str(caught.value) == "--suggest 4.2: the fewest bits of what was scanned are 4.25 per weight"


@pytest.mark.parametrize("bits", [16, 32])
def test_a_budget_for_full_precision_is_refused(bits: float, found: ScanReport) -> None:
    with pytest.raises(UsageError) as caught:
        found.suggest(bits)
    assert str(caught.value) == f"--suggest {bits}: every module fits in full precision; expected less than 16"


@pytest.mark.parametrize("count", [0, 42])
def test_at_least_one_module_is_spared_and_one_is_not(count: int, found: ScanReport) -> None:
    with pytest.raises(UsageError) as caught:
        found.suggest_exclude(count)
    assert str(caught.value) == f"--suggest-exclude {count}: the recipe wraps 42 modules; expected 1 to 41"


def test_a_scan_without_data_suggests_nothing() -> None:
    with pytest.raises(UsageError) as caught:
        qsurgeon.scan("w4a4-mxfp4", TINY).suggest_exclude(2)
    assert str(caught.value) == (
        "a suggestion needs to know what each layer does to the model's answer: pass --data FILE or --text FILE"
    )


def test_a_suggestion_keeps_what_else_the_recipe_says(train: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "version: 1\nsaved_inputs: full\nformats:\n  rotated: {like: mxfp4, hadamard: 32}\nrules:\n"
        "  - {name: attention, target: [self_attn], weight: rotated, input: rotated, gradient: clipped}\n"
        "  - {name: rest, target: [layers], weight: nvfp4}\n",
        "utf-8",
    )
    scan = qsurgeon.scan(tmp_path / "mine.yaml", TINY, data=train, samples=2)
    recipe = scan.suggest_exclude(3).recipe
    assert recipe.saved_inputs == "full"
    assert [(rule.name, rule.weight, rule.gradient) for rule in recipe.rules] == [
        ("attention", "rotated", "clipped"),
        ("rest", "nvfp4", "ste"),
    ]
    assert len(qsurgeon.plan(recipe, TINY).wrapped) == 39


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["qsurgeon", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_the_command_writes_recipes_that_plan_reads(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scan.json"
    line = ("scan", "w4a4-mxfp4", "-m", TINY, "--data", train, "--samples", "2", "--formats", "mxfp8", "--srdd")
    assert command(monkeypatch, *line, "-o", output, "--suggest", "6", "--suggest-exclude", "4") == 0
    out, err = capfd.readouterr()
    assert "all modules rounded, recipe: KL" in out
    recipes = [tmp_path / "scan-6-bits.yaml", tmp_path / "scan-without-4.yaml"]
    for file, first in zip(recipes, ("# 6 bits per weight", "# 4 of 42 modules in full precision"), strict=True):
        assert file.read_text("utf-8").splitlines()[0] == f"{first}, as a scan suggests it."
        assert f"see it with: qsurgeon plan {file} --model {TINY}" in err
        assert command(monkeypatch, "plan", file, "-m", TINY) == 0
    capfd.readouterr()
    data = json.loads(output.read_text("utf-8"))
    assert data["srdd"]["config"]["quant_type"] == "mxfp4"
    assert {"kl", "loss", "loss_increase"} == data["modules"][0]["effect"]["alone"].keys()
    assert command(monkeypatch, *line, "-o", tmp_path / "other.json", "--suggest-exclude", "4") == 0
    capfd.readouterr()
    assert command(monkeypatch, *line, "-o", tmp_path / "scan.json") == 2
    assert capfd.readouterr().err == f"error: {output} exists; name another file or remove it first\n"


def test_the_command_says_what_a_suggestion_needs(
    train: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "scan", "w4a4-mxfp4", "-m", TINY, "--suggest", "5", "-o", "x.json") == 2
    assert capfd.readouterr().err == (
        "error: --suggest needs to know what each layer does to the model's answer: pass --data or --text\n"
    )
    assert command(monkeypatch, "scan", "w4a4-mxfp4", "-m", TINY, "--data", train, "--suggest-exclude", "4") == 2
    assert capfd.readouterr().err == (
        "error: --suggest-exclude writes a recipe beside the output: pass --output scan.json\n"
    )


def test_the_costs_are_what_the_modules_do_alone(found: ScanReport) -> None:
    rows: list[Row] = sorted(found.scan.of(), key=lambda row: -row.effects[ALONE].mean_distance)
    assert set(found.suggest_exclude(3).spared) == {row.module for row in rows[:3]}
