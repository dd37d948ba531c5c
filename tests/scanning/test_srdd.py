"""SRDD's scan beside ours: its metrics by hand, its keys, and that it flags what nothing is wrong with."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qsurgeon
from qsurgeon.errors import CalibrationError
from qsurgeon.scanning.srdd import issues_of, metrics_of, residual_layers


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch operations round, to the same bits."""
    monkeypatch.setenv("QSURGEON_KERNELS", "eager")


def test_its_metrics_are_those_of_its_scanner() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([6.0, 2.4, 0.2, -6.0])  # under scale 1 they become 6, 2, 0 and -6
    noise = 0.4**2 + 0.2**2
    assert metrics_of(x) == pytest.approx(
        {
            "sqnr_db": 10 * math.log10((36 + 2.4**2 + 0.04 + 36) / noise),
            "deadzone_ratio": 1 / 32,
            "saturation_ratio": 2 / 32,
            "relative_error": (0.4 / 2.4 + 1) / 32,
            "mean_abs_error": 0.6 / 32,
            "max_abs_error": 0.4,
            "output_norm": math.sqrt(36 + 2.4**2 + 0.04 + 36),
        },
        rel=1e-5,
    )


def test_it_flags_a_gaussian_tensor_which_is_the_best_that_mxfp4_can_meet() -> None:
    torch.manual_seed(0)
    found = issues_of(metrics_of(torch.randn(1024, 1024)))
    assert [one.partition("=")[0] for one in found] == ["low_sqnr", "high_deadzone", "high_relative_error"]
    assert found[0] == "low_sqnr=18.8dB"
    assert issues_of({"sqnr_db": 20.0, "deadzone_ratio": 0.05, "saturation_ratio": 0.01, "relative_error": 0.1}) == []


def test_its_report_has_its_keys(small_model: Callable[..., Any]) -> None:
    ids = torch.arange(24).reshape(2, 12)
    found = qsurgeon.scan("w4a4-mxfp4", small_model(), data=[{"input_ids": ids}], srdd=True).to_dict()["srdd"]
    assert found.keys() == {"config", "report", "recommendations", "timestamp"}
    assert found["config"]["num_layers"] == 2
    assert found["report"]["summary"]["problematic_layer_ids"] == [0, 1]
    assert found["report"]["per_layer"][1].keys() == {
        "layer_id", "sqnr_db", "deadzone_ratio", "saturation_ratio", "relative_error", "mean_abs_error",
        "max_abs_error", "output_norm", "is_problematic", "issues",
    }  # fmt: skip
    assert found["report"]["statistics"]["sqnr_db"].keys() == {"min", "max", "mean", "std"}
    assert found["recommendations"]["strategy"] == "reconsider_quantization"
    model, outputs = small_model(), list[torch.Tensor]()
    model.model.layers[1].register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model(ids)
    expected = sum(metrics_of(sample)["relative_error"] for sample in outputs[0]) / 2
    assert found["report"]["per_layer"][1]["relative_error"] == pytest.approx(expected, rel=1e-4)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        residual_layers(nn.Linear(2, 2))
    assert str(caught.value) == "Linear has no list of layers, whose outputs SRDD rounds"
