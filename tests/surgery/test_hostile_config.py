"""A config.json of no model is one message, whatever Python or torch make of its values, and builds nothing endless."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qsurgeon
from qsurgeon.errors import CheckpointError
from qsurgeon.surgery import read_config, skeleton


@pytest.fixture
def plan(tiny_folder: Path, tmp_path: Path) -> Any:
    """Return what plans for a model whose config.json has other values, and returns the error."""

    def make(**fields: Any) -> str:
        config = json.loads((tiny_folder / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        for act in (lambda: qsurgeon.plan("w4a4-mxfp4", tmp_path), lambda: qsurgeon.inspect(tmp_path)):
            with pytest.raises(CheckpointError) as caught:
                act()
        message = str(caught.value)
        assert len(message) < 600
        return message.replace(str(tmp_path), "model")

    return make


BUILT = "its config describes no model that can be built: "


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"pad_token_id": 96}, f"{BUILT}Padding_idx must be within num_embeddings"),
        ({"pad_token_id": 10**30}, f"{BUILT}Padding_idx must be within num_embeddings"),
        ({"pad_token_id": -97}, f"{BUILT}Padding_idx must be within num_embeddings"),
        ({"hidden_size": 10**30}, BUILT),
        ({"vocab_size": -1}, BUILT),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_act": "nothing"}, BUILT),
        ({"dtype": float("nan")}, ""),
        ({"dtype": float("inf")}, ""),
        ({"dtype": 0}, f"{BUILT}its dtype is 0"),
        ({"dtype": False}, f"{BUILT}its dtype is False"),
        ({"dtype": "float4"}, ""),
        ({"dtype": ["float32"]}, ""),
        ({"dtype": "nn"}, ""),
        ({"dtype": "int8"}, ""),
        ({"rope_parameters": 5}, ""),
        ({"rope_parameters": {"rope_type": "x"}}, ""),
        ({"layer_types": ["x"]}, ""),
        (
            {"num_hidden_layers": 10**9},
            "model/config.json: num_hidden_layers is 1,000,000,000; expected at most 100,000",
        ),
        ({"num_hidden_layers": 1e300}, "model/config.json: num_hidden_layers is "),
        ({"text_config": {"n_layers": 10**6}}, "model/config.json: n_layers is 1,000,000; expected at most 100,000"),
        ({"x": [{"num_experts": 10**6}]}, "model/config.json: num_experts is 1,000,000; expected at most 100,000"),
        ({"num_labels": 10**9}, "model/config.json: num_labels is 1,000,000,000; expected at most 10,000,000"),
        ({"architectures": "Qwen2ForCausalLM"}, ""),
        ({"architectures": [None]}, ""),
        ({"architectures": [["Qwen2ForCausalLM"]]}, ""),
        ({"architectures": {"a": 1}}, ""),
        ({"model_type": ["qwen2"]}, "model: transformers "),
        ({"quantization_config": 5}, ""),
        ({"quantization_config": {"quant_method": ["qsurgeon"]}}, ""),
        ({"quantization_config": {"quant_method": "qsurgeon"}}, ""),
    ],
    ids=lambda one: str(one)[:40],
)
def test_a_value_that_no_model_has_is_one_message(plan: Any, fields: dict[str, Any], expected: str) -> None:
    assert plan(**fields).startswith(expected)


def test_a_config_of_endless_modules_is_refused(plan: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["qsurgeon.surgery.skeleton"]  # the package has a function of that name
    monkeypatch.setattr(module, "MOST_MODULES", 20)
    with pytest.raises(CheckpointError) as caught:
        skeleton(read_config(tiny_folder))
    assert str(caught.value) == "its config describes a model of more than 20 modules"
    nn.Sequential(*(nn.ReLU() for _ in range(30)))  # what is built otherwise is not counted


def test_a_large_model_of_today_is_within_bounds() -> None:
    from transformers import DeepseekV3Config

    config = DeepseekV3Config()  # 671B parameters
    model = skeleton(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 600e9
    assert next(model.parameters()).device == torch.device("meta")
