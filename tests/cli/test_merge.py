import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import qsurgeon
from qsurgeon.cli import main
from qsurgeon.layers import quant_layers

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that holds a wrapped base and an adapter of it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "tiny")
    qsurgeon.rewrite("w4a4-mxfp4", "tiny", "base")
    model = peft.get_peft_model(qsurgeon.load("base"), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained("adapter")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qsurgeon", *words])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as done:
            code = done.code
        return (code or 0, *capfd.readouterr())

    return command


def test_merge_writes_a_folder_and_shows_what_changed(run: Run) -> None:
    code, out, err = run("merge", "adapter", "--output", "out")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["module", "n", "shape", "weight", "ΔW/W", "codes", "changed", "dB"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["model.layers.{0..2}.self_attn.q_proj", "3", "64x64", "mxfp4"],
        ["model.layers.{0..2}.mlp.up_proj", "3", "128x64", "mxfp4"],
    ]
    assert lines[4].startswith("6 modules are merged, 6 of them rounded again: ΔW/W ")
    assert err.splitlines()[-1] == "load it with: qsurgeon.load('out')"
    assert len(quant_layers(qsurgeon.load("out"))) == 21


def test_merge_can_show_one_line_a_module_and_json(run: Run) -> None:
    every = run("merge", "adapter", "-o", "every", "--all")[1].splitlines()
    assert [line.split()[0] for line in every if "up_proj" in line] == [
        f"model.layers.{layer}.mlp.up_proj" for layer in range(3)
    ]
    report = json.loads(run("merge", "adapter", "-o", "json", "--json")[1])
    assert report == json.loads(Path("json/qsurgeon-merge.json").read_text())
    assert len(report["modules"]) == 6
    assert set(report["total"]) == {"relative", "codes", "changed", "share", "sqnr"}


def test_the_model_option_wins_over_the_base_that_the_adapter_names(run: Run) -> None:
    Path("base").rename("moved")
    assert run("merge", "adapter", "-o", "out")[::2] == (
        2,
        "error: base: the base that adapter names is no folder here; say where it is: --model FOLDER\n",
    )
    assert run("merge", "adapter", "-o", "out", "--model", "moved")[0] == 0


def test_merge_refuses_what_is_wrong_and_leaves_nothing(run: Run) -> None:
    code, out, err = run("merge", "tiny", "-o", "out")
    assert (code, out) == (2, "")
    assert err == "error: tiny: is not the folder of an adapter; it has no adapter_config.json\n"
    code, out, err = run("merge", "adapter", "-o", "base")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: base is the source itself; write somewhere else"
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "base", "tiny"]
