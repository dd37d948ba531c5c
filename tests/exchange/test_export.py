"""An export appears whole or not at all, resumes to the same bytes, and refuses what would be another model."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_cases import made_recipe, same, tensors

import qsurgeon
from qsurgeon.errors import CalibrationError, CheckpointError, ExchangeError
from qsurgeon.exchange import ENGINES, ExportOptions
from qsurgeon.exchange.engines import computed
from qsurgeon.layers import quant_layers

ATTENTION = "model.layers.1.self_attn"


def test_an_export_that_is_killed_resumes_to_the_same_bytes(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    folder = wrapped("nvfp4", None)
    code = f"""
import os, signal
from qsurgeon.checkpoint.writing.journal import Journal
before, done = Journal.add, []
def add(self, job, entry):
    before(self, job, entry)
    done.append(job)
    if len(done) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = add
import qsurgeon
from qsurgeon.exchange import ExportOptions
qsurgeon.export({str(folder)!r}, {str(tmp_path / "out")!r}, "compressed-tensors", options=ExportOptions(workers=1))
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    qsurgeon.export(folder, tmp_path / "out", "compressed-tensors", options=ExportOptions(resume=True))
    qsurgeon.export(folder, tmp_path / "other", "compressed-tensors")
    files = sorted(file.name for file in (tmp_path / "other").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_an_unfinished_export_is_not_gone_on_with_as_another(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    folder = wrapped("mxfp4", "mxfp4")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "lock").touch()
    (partial / "run.json").write_text('{"--to": "dense"}')
    (partial / "journal-0.jsonl").write_text('{"job": "x", "crcs": {}, "finite": true}\n')
    with pytest.raises(CheckpointError, match=r"--to was dense, now it is compressed-tensors"):
        qsurgeon.export(folder, tmp_path / "out", "compressed-tensors")


def test_files_keep_to_a_size_and_have_an_index(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    folder = wrapped("mxfp4", "mxfp4")
    qsurgeon.export(folder, tmp_path / "small", "compressed-tensors", options=ExportOptions(max_shard_size="100KB"))
    qsurgeon.export(folder, tmp_path / "one", "compressed-tensors")
    index = json.loads((tmp_path / "small/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert same(tensors(tmp_path / "small"), tensors(tmp_path / "one"))


def test_nothing_of_our_record_stays_but_in_the_report(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    qsurgeon.export(wrapped("mxfp4", "mxfp4"), tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    report = json.loads((tmp_path / "out/qsurgeon-export.json").read_text())
    assert report["record"]["formats"]["mxfp4"]["scale_rule"] == "floor"
    assert "qsurgeon.load" not in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/qsurgeon-plan.json").exists()


REFUSED: list[tuple[str, str | None, dict[str, Any], str]] = [
    (
        "rotated",
        "rotated",
        {},
        "model.layers.0.mlp.gate_proj: the weight's format 'rotated' rotates, which its readers would have to do; "
        "compressed-tensors has: mxfp4, nvfp4, mxfp8, mxfp6_e2m3, fp8_e4m3, fp8_e4m3_row, fp8_e4m3_128x128, int8, "
        "int4_b32, int4_b64, int4_b128. Export the values of the weights: --to dense",
    ),
    (
        "nvfp4",
        "nvfp4",
        {},
        "model.layers.0.mlp.gate_proj: compressed-tensors has no scheme for weights in nvfp4 with inputs in 'nvfp4' "
        "(nvfp4, a scale per token); it has inputs in 'nvfp4, a static scale'. Or export the weights alone: "
        "--weight-only. For a static scale say `tensor_scale: static` in the recipe's format, and let "
        "qsurgeon.calibrate(model, batches) find its number, best before training",
    ),
    (
        "mxfp4",
        "mxfp8",
        {},
        "model.layers.0.mlp.gate_proj: compressed-tensors has no scheme for weights in mxfp4 with inputs in 'mxfp8' "
        "(mxfp8); it has inputs in 'mxfp4'. Or export the weights alone: --weight-only",
    ),
    (
        "mxfp4",
        "mxfp4",
        {"phases": "training"},
        "model.layers.0.mlp.gate_proj is rounded in training only; a file is the same in all phases",
    ),
]


@pytest.mark.parametrize(("weight", "asked", "fields", "message"), REFUSED)
def test_what_files_cannot_say_is_refused_before_anything_is_written(
    wrapped: Callable[..., Path],
    tmp_path: Path,
    weight: str,
    asked: str | None,
    fields: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.export(wrapped(weight, asked, **fields), tmp_path / "out", "compressed-tensors")
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_rows_that_are_not_whole_blocks_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    qsurgeon.rewrite(made_recipe("int4_b128"), tiny_folder, tmp_path / "in")
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.export(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    assert str(caught.value) == (
        "model.layers.0.mlp.gate_proj: its 64 inputs are not whole blocks of 128, which readers of compressed-tensors "
        "expect"
    )


def test_an_input_that_is_left_out_is_exported_as_weight_only(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    done = qsurgeon.export(
        wrapped("nvfp4", "nvfp4"), tmp_path / "out", "compressed-tensors", options=ExportOptions(weight_only=True)
    )
    assert done.schemes == {("nvfp4", ""): 10}
    (group,) = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["input_activations"] is None


def test_a_folder_that_is_not_wrapped_is_refused(plain_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.export(plain_folder, tmp_path / "out", "dense")
    assert str(caught.value) == (
        f"{plain_folder}: was not written by qsurgeon: its config.json has no record of what is wrapped. A recipe is "
        f"applied by: qsurgeon apply RECIPE --model {plain_folder} --output FOLDER"
    )


def test_unknown_targets_and_engines_are_refused_with_the_nearest(plain_folder: Path, tmp_path: Path) -> None:
    for to, engine, message in (
        ("compressed_tensors", None, "nothing is exported to 'compressed_tensors'; did you mean 'compressed-tensors'?"),
        ("dense", "vllm-blackwel", "no engine 'vllm-blackwel'; did you mean 'vllm-blackwell'?"),
        ("dense", "mlx", "nothing is known of mlx-lm with dense; known are: any"),
    ):
        with pytest.raises(ExchangeError) as caught:
            qsurgeon.export(plain_folder, tmp_path / "out", to, engine)
        assert str(caught.value) == message


# --- what engines compute


def test_the_report_says_where_an_engine_computes_otherwise(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    done = qsurgeon.export(wrapped("mxfp4", "mxfp4"), tmp_path / "floor", "compressed-tensors")
    found = {one.engine: (one.trained, one.computes, one.same) for one in done.computed}
    assert found["vllm-blackwell"] == ("mxfp4, rule floor", "mxfp4, rule rceil", False)
    assert found["vllm-hopper"] == ("mxfp4, rule floor", "full precision", False)
    assert found["sglang-blackwell"] == ("mxfp4, rule floor", "refused", False)
    weights = qsurgeon.export(wrapped("mxfp4", None), tmp_path / "weights", "compressed-tensors")
    found = {one.engine: (one.trained, one.computes, one.same) for one in weights.computed}
    assert found["vllm-blackwell"] == ("full precision", "mxfp4, rule rceil", False)
    assert found["vllm-hopper"] == ("full precision", "full precision", True)


def test_an_engine_that_refuses_the_files_is_an_error(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.export(wrapped("mxfp4", "mxfp4"), tmp_path / "out", "compressed-tensors", "sglang-blackwell")
    assert str(caught.value) == (
        "model.layers.0.mlp.gate_proj: SGLang on SM100 and later refuses weights in mxfp4 with inputs in mxfp4: its "
        "4-bit inputs are NVFP4's only; use --quantization mxfp4 on a model in full precision"
    )
    assert not (tmp_path / "out.partial").exists()


def test_every_engine_is_known_of_some_target() -> None:
    for engine in ENGINES:
        assert computed("dense" if engine == "any" else "compressed-tensors", [], engine) == []


def test_an_engine_that_joins_layers_wants_one_tensor_scale(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    folder = wrapped("nvfp4", None)
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.export(folder, tmp_path / "out", "compressed-tensors", "vllm-hopper")
    assert str(caught.value) == (
        "model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj have tensor scales of their own, and vllm-hopper "
        "takes the largest for all of them: their weights would be others (3 such groups). Share the scales before "
        "training: qsurgeon.share_scales(model)"
    )
    done = qsurgeon.export(folder, tmp_path / "out", "compressed-tensors")
    assert len(done.disagree) == 3
    assert {one.engine for one in done.computed if not one.same} == {
        one for one in ENGINES if one.startswith("vllm")
    } | {"sglang-hopper"}
    model = qsurgeon.share_scales(qsurgeon.load(folder))
    model.save_pretrained(tmp_path / "shared")
    done = qsurgeon.export(tmp_path / "shared", tmp_path / "good", "compressed-tensors", "vllm-hopper")
    assert (done.disagree, all(one.same for one in done.computed)) == ((), True)
    found = tensors(tmp_path / "good")
    divisors = [found[f"{ATTENTION}.{one}_proj.weight_global_scale"] for one in "qkv"]
    amax = max(tensors(folder)[f"{ATTENTION}.{one}_proj.weight"].abs().max().item() for one in "qkv")
    assert len({one.item() for one in divisors}) == 1
    assert divisors[0].item() == pytest.approx(448 * 6 / amax)


def test_scales_are_shared_where_there_are_some(wrapped: Callable[..., Path]) -> None:
    with pytest.raises(CalibrationError) as caught:
        qsurgeon.share_scales(qsurgeon.load(wrapped("mxfp4", None)))
    assert str(caught.value) == (
        "no modules that engines join have weights with a tensor scale: there is none to share"
    )
    with pytest.raises(CalibrationError) as caught:
        qsurgeon.share_scales(qsurgeon.load(wrapped("nvfp4", None, "packed")))
    assert str(caught.value) == (
        "the weight of model.layers.0.mlp.gate_proj is packed under its own scale: share the scales of the master "
        "model, then pack it"
    )
    model = qsurgeon.share_scales(qsurgeon.load(wrapped("nvfp4", None)))
    scales = [quant_layers(model)[f"{ATTENTION}.{one}_proj"].quantizations["weight"].weight for one in "qkv"]
    assert len({one.static_scale for one in scales if one is not None}) == 1
    assert torch.isfinite(model(input_ids=torch.arange(1, 9)[None]).logits).all()
