"""The section ``noise:`` of a recipe's file: each mistake at its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import qsurgeon
from qsurgeon.errors import RecipeError

RULES = "version: 1\nrules:\n  - {target: [layers], weight: mxfp4}\n"


def write(folder: Path, **noise: Any) -> Path:
    file = folder / "mine.yaml"
    file.write_text(RULES + yaml.safe_dump({"noise": {"sigma_start": 0.1, "schedule": "constant", **noise}}), "utf-8")
    return file


def complaints(folder: Path, **noise: Any) -> list[str]:
    file = write(folder, **noise)
    with pytest.raises(RecipeError) as caught:
        qsurgeon.load_recipe(file)
    return [one.message for one in caught.value.mistakes]


def test_a_section_is_read(tmp_path: Path) -> None:
    noise = qsurgeon.load_recipe(write(tmp_path, mode="tiers", multipliers={"layers.0": 2}, seed=3)).noise
    assert noise is not None
    assert (noise.sigma_start, noise.schedule, noise.during, noise.by_pattern) == (
        0.1, "constant", "rollout", {"layers.0": 2.0},
    )  # fmt: skip


DOCS = (Path(__file__).parents[2] / "docs" / "noise.md").read_text("utf-8")


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL), ids=["first", "tiers"])
def test_an_example_of_the_page_plans(example: str, tmp_path: Path, qwen2_config: Any) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(example, "utf-8")
    noise = qsurgeon.plan(file, qwen2_config(num_hidden_layers=3)).noise
    assert noise is not None
    assert len(noise.modules) == 6


def test_it_is_inherited_and_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path)
    for own, sigma in (("", 0.1), ("noise: {sigma_start: 0.3, schedule: constant}\n", 0.3)):
        file = tmp_path / "child.yaml"
        file.write_text("version: 1\nextends: mine.yaml\n" + own, "utf-8")
        noise = qsurgeon.load_recipe(file).noise
        assert noise is not None
        assert noise.sigma_start == sigma


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigmaend": 1}, "unknown key 'sigmaend'; did you mean 'sigma_end'?"),
        ({"num_stages": 5}, "unknown key 'num_stages'; here it is called 'stages'"),
        ({"noise_type": "x"}, "unknown key 'noise_type'; expected one of: "),
        ({"schedule": "cosin"}, "'schedule' cannot be 'cosin'; did you mean 'cosine'?"),
        ({"mode": "globl"}, "'mode' cannot be 'globl'; did you mean 'global'?"),
        ({"during": "eval"}, "'during' cannot be 'eval'; expected one of: both, rollout, training"),
        ({"sigma_start": "a"}, "'sigma_start' expects a number, got 'a'"),
        ({"seed": -1}, "'seed' must be at least 0, got -1"),
        ({"target": "layers"}, "'target' expects a list, got 'layers'; write [layers]"),
        (
            {"multipliers": {"layers.0": 1}},
            "'mode: global' takes no multipliers and no errors, got 'multipliers'",
        ),
        ({"mode": "targeted"}, "'mode: targeted' takes 'multipliers' or 'errors' and 'worst', got nothing"),
        ({"mode": "variable"}, "'mode: variable' takes 'errors', got nothing"),
        (
            {"mode": "tiers", "errors": {"layers.0": 1}},
            "'mode: tiers' takes 'multipliers' or 'errors' and 'tiers', got 'errors'",
        ),
        (
            {"mode": "targeted", "errors": {"layers.0": 1, "layers.1": 2}, "worst": 2},
            "'worst: 2' of 2 errors is all of them; 'mode: global' says so",
        ),
        (
            {"mode": "targeted", "multipliers": {"layers.0": -1}},
            "'layers.0' in 'multipliers' must be a finite number from 0 on, got -1",
        ),
        (
            {"mode": "variable", "errors": {"layers.0": 0}},
            "'layers.0' in 'errors' must be a finite number above 0, got 0",
        ),
        (
            {
                "mode": "tiers",
                "errors": {"layers.0": 1},
                "tiers": [{"least": 0.3, "multiplier": 1.2}, {"least": 0.4, "multiplier": 1.5}],
            },
            "the tiers must stand with the largest 'least' first, and no two alike",
        ),
        (
            {"mode": "tiers", "errors": {"layers.0": 1}, "tiers": [{"least": 0.3, "factor": 1.2}]},
            "unknown key 'factor'; here it is called 'multiplier'",
        ),
        ({"schedule": "linear"}, "'schedule: linear' needs 'sigma_end'; 'schedule: constant' has none"),
    ],
)
def test_a_mistake_is_told_in_words_of_the_recipe(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (found,) = complaints(tmp_path, **fields)
    assert found.startswith(message)


def test_a_mistake_is_told_at_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{RULES}noise:\n  sigma_start: 0.1\n  schedule: sometimes\n", "utf-8")
    with pytest.raises(RecipeError) as caught:
        qsurgeon.load_recipe(file)
    assert [one.where for one in caught.value.mistakes] == [f"{file}:6:13"]
