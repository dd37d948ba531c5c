"""Exported values are what a model computes with, to the bit, in any program that reads safetensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exchange_cases import made_recipe, tensors
from transformers import AutoModelForCausalLM

import qsurgeon
from qsurgeon.exchange.dense import holds
from qsurgeon.formats import CATALOG, get_format
from qsurgeon.layers import PackedLinear, packed_layers

IDS = torch.arange(1, 9).reshape(1, 8)
LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("storage", ["master", "packed"])
@pytest.mark.parametrize(("weight", "dtype"), [("mxfp4", torch.bfloat16), ("nvfp4", torch.float32)])
def test_values_give_the_outputs_of_the_wrapped_model(
    wrapped: Callable[..., Path], tmp_path: Path, weight: str, dtype: torch.dtype, storage: str
) -> None:
    folder = wrapped(weight, None, storage)
    qsurgeon.export(folder, tmp_path / "out", "dense")
    assert tensors(tmp_path / "out")[LAYER].dtype == dtype
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(plain.model.layers[1].mlp.down_proj), plain.dtype) == (torch.nn.Linear, torch.bfloat16)
    assert torch.equal(plain(input_ids=IDS).logits, qsurgeon.load(folder)(input_ids=IDS).logits)


def test_a_rotated_weight_is_rotated_back(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    folder = wrapped("rotated", "rotated", "packed")
    qsurgeon.export(folder, tmp_path / "out", "dense")
    layer = packed_layers(qsurgeon.load(folder))[LAYER.removesuffix(".weight")]
    assert isinstance(layer, PackedLinear)
    weight = layer.quantization.weight
    assert weight is not None
    assert weight.rotation is not None
    values = weight.rotation.back(layer.opened(torch.float32))
    assert torch.equal(tensors(tmp_path / "out")[LAYER], values)


def test_the_weight_of_a_conv1d_is_stored_as_it_was(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=96, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    qsurgeon.rewrite("w4a16-mxfp4", tmp_path / "gpt2", tmp_path / "in")
    qsurgeon.export(tmp_path / "in", tmp_path / "out", "dense")
    name = "transformer.h.0.attn.c_attn.weight"
    before, after = tensors(tmp_path / "in")[name], tensors(tmp_path / "out")[name]
    assert torch.equal(after, get_format("mxfp4").fake_quantize(before, dim=0))
    assert not torch.equal(after, before)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits.isfinite().all()


def test_a_module_whose_input_alone_is_rounded_keeps_its_weight(wide_folder: Path, tmp_path: Path) -> None:
    recipe = made_recipe(None, "mxfp4").model_dump(mode="json", exclude_none=True)
    recipe["rules"].append({"target": ["layers.0.self_attn"], "weight": "mxfp4"})
    qsurgeon.rewrite(qsurgeon.Recipe.model_validate(recipe), wide_folder, tmp_path / "in")
    done = qsurgeon.export(tmp_path / "in", tmp_path / "out", "dense")
    assert done.rounded == 4
    before, after = tensors(wide_folder), tensors(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.0.self_attn.{one}_proj.weight" for one in "qkvo"
    }


def test_bfloat16_holds_every_value_of_few_digits_and_a_power_of_two() -> None:
    held = {name for name, one in CATALOG.items() if holds(torch.bfloat16, one)}
    assert held == {"mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8"}
    format = get_format("mxfp4")
    assert format.scale is not None
    codes = torch.arange(16, dtype=torch.uint8)
    scales = format.scale.decode(torch.arange(250, dtype=torch.uint8))
    values = (scales[:, None] * format.element.decode(codes)).float()
    assert torch.equal(values.to(torch.bfloat16).float(), values)
    assert not holds(torch.float16, format)
