"""A scan of weights: in files, in live models, interrupted, and on the command line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qsurgeon
from qsurgeon.checkpoint import Events
from qsurgeon.cli import main
from qsurgeon.errors import CallError, CheckpointError, FormatError, QSurgeonError, SurgeryError
from qsurgeon.formats.rotation import rotated
from qsurgeon.report.scanning import scan_text
from qsurgeon.scanning import measure, stored

MIXED = """
version: 1
formats:
  rotated: {like: mxfp4, hadamard: 32}
  dither: {like: mxfp4, rounding: stochastic}
  square: {like: nvfp4, block: [16, 16]}
rules:
  - {target: [q_proj], weight: nvfp4, input: nvfp4}
  - {target: [k_proj], weight: rotated, input: rotated}
  - {target: [v_proj], weight: dither}
  - {target: [o_proj], weight: square, input: mxfp8}
  - {target: [gate_proj], weight: fp8_e4m3}
  - {target: [down_proj], weight: int8, input: int8}
"""


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch operations round, to the same bits: to compile a kernel for each format takes longer than the rest."""
    monkeypatch.setenv("QSURGEON_KERNELS", "eager")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "mixed.yaml").write_text(MIXED, "utf-8")
    return tmp_path / "mixed.yaml"


def test_a_folder_and_the_live_model_of_it_have_the_same_numbers(
    recipe: Path, plain_folder: Path, small_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = qsurgeon.scan(recipe, small_model()).to_dict()
    monkeypatch.setattr(stored, "SLAB", 1024)  # so that a weight has several slabs
    files = qsurgeon.scan(recipe, plain_folder).to_dict()
    assert files["source"] == "plain"
    for one, other in zip(live["modules"], files["modules"], strict=True):
        assert one["weight"]["causes"] == pytest.approx(other["weight"]["causes"], abs=1e-4)
        same = [{key: value for key, value in row["weight"].items() if key != "causes"} for row in (one, other)]
        assert same[0].pop("block_amax_over_rms") == pytest.approx(same[1].pop("block_amax_over_rms"), rel=1e-5)
        assert same[0] == pytest.approx(same[1], rel=1e-4)
    assert len(files["modules"]) == 12


def test_each_weight_is_measured_as_its_layer_rounds_it(recipe: Path, small_model: Callable[..., Any]) -> None:
    model, found = small_model(), qsurgeon.scan(recipe, small_model()).scan
    for row in found.rows:
        weight, how = model.get_parameter(f"{row.module}.weight").detach(), row.how
        assert how.weight_grid is not None
        expected = measure(rotated(weight, how.rotation), how.weight_grid)
        assert row.weight is not None
        assert row.weight.sqnr == pytest.approx(expected.sqnr, abs=1e-3)
        assert row.weight.zeroed == expected.zeroed


def test_a_bad_layer_stands_out_and_the_others_are_like_a_gaussian(small_model: Callable[..., Any]) -> None:
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, ::32] *= 100  # one value in each block dwarfs the others
    found = qsurgeon.scan("w4a4-mxfp4", model).scan
    below = {row.module: row.weight.sqnr - row.references()["weight"].sqnr for row in found.rows if row.weight}
    worst = min(below, key=below.__getitem__)
    assert max(abs(value) for name, value in below.items() if name != worst) < 1
    assert worst == "model.layers.1.mlp.down_proj"
    sums = next(row.weight for row in found.rows if row.module == worst)
    assert sums is not None
    assert sums.zeroed_share > 0.5
    assert sums.kurtosis > 20


def test_other_formats_are_tried_in_the_recipes_place(plain_folder: Path) -> None:
    found = qsurgeon.scan("w4a16-mxfp4", plain_folder, formats=["nvfp4", "mxfp8"]).scan
    assert found.choices == ("recipe", "nvfp4", "mxfp8")
    labels = {row.name: row.choice.label for row in found.rows}
    assert labels == {"recipe": "mxfp4/-", "nvfp4": "nvfp4/-", "mxfp8": "mxfp8/-"}
    sqnr = {name: min(row.weight.sqnr for row in found.of(name) if row.weight) for name in found.choices}
    assert sqnr["recipe"] < sqnr["nvfp4"] < sqnr["mxfp8"]


def test_conv1d_is_measured_along_its_inputs(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=96, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    found = qsurgeon.scan("w4a16-mxfp4", tmp_path / "gpt2").scan
    assert [row.step.module.type for row in found.rows] == ["Conv1D"] * 4
    grid = qsurgeon.get_format("mxfp4").as_weight
    for row in found.rows:
        assert row.weight is not None
        expected = measure(model.get_parameter(f"{row.step.module.path}.weight").detach().mT, grid)
        assert row.weight.sqnr == pytest.approx(expected.sqnr, abs=1e-3)


def test_a_weight_that_is_joined_when_it_is_loaded_is_measured_as_it_is_then(tmp_path: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "vl")
    live, files = (qsurgeon.scan("w4a16-mxfp4", one).scan for one in (model, tmp_path / "vl"))
    assert {row.module: row.weight.zeroed for row in live.rows if row.weight} == {
        row.module: row.weight.zeroed for row in files.rows if row.weight
    }


# --- interrupted


class Stops(Events):
    """Stops a run after some units."""

    def __init__(self, after: int) -> None:
        self.left, self.notes = after, list[str]()

    def advance(self, count: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_an_interrupted_scan_goes_on_to_the_same_bytes(recipe: Path, plain_folder: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.json", tmp_path / "scan.json"
    qsurgeon.scan(recipe, plain_folder, output=whole)
    with pytest.raises(KeyboardInterrupt) as stopped:
        qsurgeon.scan(recipe, plain_folder, output=output, events=Stops(5), workers=1)
    assert str(stopped.value) == f"; finished work is kept in {output}.partial, and the same command resumes it"
    assert not output.exists()
    done = (tmp_path / "scan.json.partial/units.jsonl").read_text("utf-8").count('"unit"')
    assert done >= 5
    events = Stops(100)
    qsurgeon.scan(recipe, plain_folder, output=output, events=events)
    assert events.notes == [f"{output}.partial is an unfinished run of this: {done} parts are done"]
    assert output.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "scan.json.partial").exists()


def test_a_line_that_a_crash_cut_off_is_done_again(recipe: Path, plain_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scan.json"
    with pytest.raises(KeyboardInterrupt):
        qsurgeon.scan(recipe, plain_folder, output=output, events=Stops(5), workers=1)
    units = tmp_path / "scan.json.partial/units.jsonl"
    units.write_bytes(units.read_bytes()[:-10])
    qsurgeon.scan(recipe, plain_folder, output=output)
    assert json.loads(output.read_text("utf-8")) == qsurgeon.scan(recipe, plain_folder).to_dict()


def test_another_scan_does_not_go_on_with_it(recipe: Path, plain_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scan.json"
    with pytest.raises(KeyboardInterrupt):
        qsurgeon.scan(recipe, plain_folder, output=output, events=Stops(2), workers=1)
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.scan(recipe, plain_folder, output=output, formats=["nvfp4"])
    assert str(caught.value) == (
        f"{output}.partial was started by a run that this one cannot resume: --formats was not there, now it is nvfp4. "
        "Delete it to start over, or repeat the original run"
    )


# --- what is wrong


def refused(kind: type[QSurgeonError], *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        qsurgeon.scan(*args, **options)
    return str(caught.value)


def test_an_output_is_never_overwritten(plain_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scan.json").write_text("mine")
    assert refused(CheckpointError, "w4a4-mxfp4", plain_folder, output=tmp_path / "scan.json") == (
        f"{tmp_path}/scan.json exists; name another file or remove it first"
    )
    assert refused(CheckpointError, "w4a4-mxfp4", plain_folder, output=tmp_path / "no/scan.json") == (
        f"{tmp_path}/no: no such folder, where scan.json is to be written"
    )


def test_a_weight_that_is_not_finite_is_named(plain_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_folder, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "bad/model.safetensors", metadata={"format": "pt"})
    assert refused(CheckpointError, "w4a4-mxfp4", tmp_path / "bad") == (
        "model.layers.1.mlp.up_proj.weight has values that are not finite; it cannot be scanned"
    )


def test_what_is_wrapped_already_is_refused(
    small_model: Callable[..., Any], plain_folder: Path, tmp_path: Path
) -> None:
    assert refused(SurgeryError, "w4a4-mxfp4", qsurgeon.apply("w4a4-mxfp4", small_model())) == (
        "model.layers.0.self_attn.q_proj is wrapped already; scan the model before a recipe is applied to it"
    )
    qsurgeon.rewrite("w4a4-mxfp4", plain_folder, tmp_path / "done")
    assert refused(CheckpointError, "w4a4-mxfp4", tmp_path / "done") == (
        f"{tmp_path}/done was rewritten by qsurgeon; scan the checkpoint that it was made from"
    )


def test_a_format_that_cannot_take_the_place_of_the_recipes_is_refused(recipe: Path, plain_folder: Path) -> None:
    assert refused(FormatError, "w4a4-mxfp4", plain_folder, formats=["mxpf4"]) == (
        "no format 'mxpf4'; did you mean 'mxfp4'?"
    )
    assert refused(FormatError, recipe, plain_folder, formats=["square"]) == (
        "--formats square: block 16×16 of format 'square' spans rows: an input's rows are tokens, whose values must "
        "not depend on each other; such a block is for weights"
    )


def test_a_config_is_no_model_to_scan(small_model: Callable[..., Any]) -> None:
    assert refused(CallError, "w4a4-mxfp4", small_model().config) == (
        "qsurgeon.scan(recipe, model): a config (Qwen2Config) is no model; expected a live one, a folder or a hub id"
    )


# --- shown


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["qsurgeon", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_the_command_prints_a_table_and_writes_all_numbers(
    plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scan.json"
    assert command(monkeypatch, "scan", "w4a4-mxfp4", "--model", plain_folder, "-o", output) == 0
    out, err = capfd.readouterr()
    assert f"all numbers are in {output}" in err
    head, *lines = out.splitlines()
    assert head.split() == [
        "weight", "n", "format", "dB", "worst", "‖e‖/‖x‖", "|e|/|x|", "zeroed", "clipped", "kurtosis", "amax", "p50",
        "amax", "p99", "scale", "clipping", "deadzone", "grid",
    ]  # fmt: skip
    assert lines[0].startswith("model.layers.{0..1}.self_attn.q_proj  2  mxfp4   19.")
    assert lines[7].split()[:5] == ["gaussian", "mxfp4", "18.8", "11.5%", "21.1%"]
    data = json.loads(output.read_text("utf-8"))
    assert data["gaussian"]["weight"]["mxfp4"]["mean_relative_error"] == pytest.approx(0.21, abs=0.002)
    assert command(monkeypatch, "scan", "w4a4-mxfp4", "--model", plain_folder, "--json") == 0
    assert json.loads(capfd.readouterr().out) == data


def test_modules_that_differ_in_a_number_share_a_line_unless_all_are_asked_for(plain_folder: Path) -> None:
    found = qsurgeon.scan("w4a4-mxfp4", plain_folder)
    assert str(found).count("model.layers.{0..1}") == 7
    assert scan_text(found.scan, fold=False).count("q_proj") >= 2


def test_a_narrow_terminal_loses_columns_and_is_told(plain_folder: Path) -> None:
    text = scan_text(qsurgeon.scan("w4a4-mxfp4", plain_folder).scan, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "not shown at this width: grid, amax p50" in text
