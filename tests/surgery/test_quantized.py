"""What a config says of a quantization, as a dict and as one of transformers'."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import BitsAndBytesConfig

from qsurgeon.errors import CheckpointError
from qsurgeon.surgery import foreign_method, refuse_foreign, refuse_quantized

Make = Callable[..., Any]
OURS = {"quantization_config": {"quant_method": "qsurgeon"}}
UNNAMED = "a method that its config does not name"


@pytest.fixture(params=["dict", "config"])
def make(request: pytest.FixtureRequest, qwen2_config: Make) -> Make:
    """Return a maker of a config with the fields it is given, in either shape."""

    def make(**fields: Any) -> Any:
        config = qwen2_config()
        if request.param == "dict":
            return config.to_dict() | fields
        for key, value in fields.items():
            setattr(config, key, value)
        return config

    return make


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        (OURS, None),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}, "text_config": {"x": 1}}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        (OURS | {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, UNNAMED),
        ({"quantization_config": {}}, UNNAMED),
        ({"quantization_config": ["gptq"]}, UNNAMED),
    ],
    ids=str,
)
def test_the_method_is_found_wherever_it_is_said(make: Make, fields: dict[str, Any], method: str | None) -> None:
    assert foreign_method(make(**fields)) == method


def test_the_method_of_transformers_own_is_its_name(qwen2_config: Make) -> None:
    config = qwen2_config()
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert foreign_method(config) == "bitsandbytes"


def test_no_config_has_no_method() -> None:
    assert foreign_method(None) is None


def test_full_precision_passes_both_and_ours_passes_one(make: Make) -> None:
    refuse_foreign(make(), "m")
    refuse_quantized(make(), "m")
    refuse_foreign(make(**OURS), "m")
    with pytest.raises(CheckpointError) as caught:
        refuse_quantized(make(**OURS), "m")
    assert str(caught.value) == "m was rewritten by qsurgeon already; apply the recipe to the model it came from"


@pytest.mark.parametrize("refuse", [refuse_foreign, refuse_quantized])
def test_what_something_else_quantized_passes_neither(make: Make, refuse: Callable[[Any, str], None]) -> None:
    with pytest.raises(CheckpointError) as caught:
        refuse(make(quantization_config={"quant_method": "awq"}), "m")
    assert str(caught.value) == "m is quantized already, by awq; expected a checkpoint in full precision"
