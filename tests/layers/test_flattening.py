"""FullyShardedDataParallel, which flattens parameters: codes are refused by name, or left out."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

import qsurgeon
from qsurgeon.errors import CodesError
from qsurgeon.layers import PackedLinear, packed_layers

pytestmark = pytest.mark.usefixtures("alone")

TOKENS = torch.arange(1, 13).reshape(2, 6)
Q = "model.layers.0.self_attn.q_proj.weight"


def flattened(model: Any, **options: Any) -> FullyShardedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a process alone has nobody to shard with
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def step(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1).step()
    with torch.no_grad():
        after: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS).loss
    return torch.stack([loss.detach(), after])


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize(
    "options",
    [
        {"use_orig_params": True},
        {"use_orig_params": False},
        {"use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy({Qwen2DecoderLayer})},
        {"use_orig_params": False, "auto_wrap_policy": ModuleWrapPolicy({PackedLinear})},
    ],
    ids=["whole", "whole and flat", "layers", "each and flat"],
)
def test_codes_are_refused_by_name(small_model: Callable[..., Any], options: dict[str, Any]) -> None:
    model = adapted(qsurgeon.apply("w4a4-mxfp4-packed", small_model()))
    for parameter in [one for one in model.parameters() if one.is_floating_point()]:
        parameter.requires_grad_(False)
    with pytest.raises(CodesError) as caught:
        flattened(model, **options)
    assert str(caught.value) == (
        f"{Q} holds packed codes, and FullyShardedDataParallel flattens parameters into one of floats. Shard with "
        "fully_shard (accelerate's fsdp_version: 2), leave packed layers out with ignored_states, or use storage: "
        "master"
    )


def test_packed_layers_that_are_left_out_stay_as_they_are(small_model: Callable[..., Any]) -> None:
    expected = step(adapted(qsurgeon.apply("w4a4-mxfp4-packed", small_model())))
    model = adapted(qsurgeon.apply("w4a4-mxfp4-packed", small_model()))
    before = {name: layer.weight.clone() for name, layer in packed_layers(model).items()}
    found = step(flattened(model, use_orig_params=True, ignored_states=[*packed_layers(model).values()]))
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in packed_layers(model).items())


@pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
def test_masters_train_as_they_do_alone(small_model: Callable[..., Any], original: bool) -> None:
    expected = step(qsurgeon.apply("w4a4-mxfp4", small_model()))
    model = qsurgeon.apply("w4a4-mxfp4", small_model())
    policy = ModuleWrapPolicy({Qwen2DecoderLayer})
    found = step(flattened(model, use_orig_params=original, auto_wrap_policy=policy))
    torch.testing.assert_close(found, expected)
