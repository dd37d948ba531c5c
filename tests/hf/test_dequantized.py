"""Models that transformers dequantized while it loaded them: wrapped and saved, they are saved as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from versions import needs

import qsurgeon
from qsurgeon.recipe import Recipe

SIZE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
TOKENS = torch.arange(8)[None]
FP8: Any = hf.FineGrainedFP8Config(dequantize=True, weight_block_size=(64, 64))


def gpt_oss() -> Any:
    config = hf.GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"])
    return hf.GptOssForCausalLM(config)


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZE))


def qwen3_moe() -> Any:
    config = hf.Qwen3MoeConfig(**SIZE, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    return hf.Qwen3MoeForCausalLM(config)


def in_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Make tensors those of a published GPT-OSS; return what its config says."""
    for name in [one for one in tensors if "experts" in one and one.endswith("_proj")]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 120, dtype=torch.uint8)
    return {"quant_method": "mxfp4"}


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name in [one for one in tensors if one.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    return {"quant_method": "fp8", "weight_block_size": [64, 64]}


CASES: dict[str, tuple[Callable[[], Any], Callable[[dict[str, Tensor]], dict[str, Any]], Any]] = {
    "gpt-oss in mxfp4": (gpt_oss, in_mxfp4, hf.utils.quantization_config.Mxfp4Config(dequantize=True)),
    "dense in fp8": (qwen3, in_fp8, FP8),
    "experts in fp8": (qwen3_moe, in_fp8, FP8),
}


def fp8(name: str) -> Any:
    return pytest.param(name, marks=needs("transformers", "5.16", "imports Triton to read FP8, which CPUs have not"))


def published(name: str, folder: Path) -> Any:
    """Return a dequantized model, read from a folder as its publisher would write it."""
    torch.manual_seed(0)
    make, quantize, dequantizing = CASES[name]
    make().bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    section = quantize(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "quantization_config": section}))
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantizing).eval()


def recipe(storage: str) -> Recipe:
    rule = {"target": ["self_attn"], "weight": "mxfp4", "input": "mxfp4"}
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": [rule]})


@pytest.mark.parametrize("storage", ["master", "packed"])
@pytest.mark.parametrize("name", ["gpt-oss in mxfp4", *map(fp8, ["dense in fp8", "experts in fp8"])])
def test_a_dequantized_model_reloads_as_it_is(name: str, storage: str, tmp_path: Path) -> None:
    model = qsurgeon.apply(recipe(storage), published(name, tmp_path / "published"))
    model.save_pretrained(tmp_path / "wrapped")
    again = qsurgeon.load(tmp_path / "wrapped").eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    again.save_pretrained(tmp_path / "twice")
    assert load_file(tmp_path / "twice/model.safetensors").keys() == (
        load_file(tmp_path / "wrapped/model.safetensors").keys()
    )


class _Dequantize(ConversionOps):
    """An operation of a quantizer: nothing of it can be done backwards."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:  # type: ignore[override]
        raise AssertionError

    @property
    def reverse_op(self) -> ConversionOps:
        raise AssertionError


def test_what_any_quantizer_left_is_not_done_backwards(tmp_path: Path) -> None:
    model = qsurgeon.apply(recipe("master"), qwen3())
    left = [WeightConverter(["weight_codes", "weight_scales"], "weight", operations=[_Dequantize(object())])]
    model._weight_conversions = left
    model.save_pretrained(tmp_path)
    assert model._weight_conversions is left
    assert torch.equal(qsurgeon.load(tmp_path).eval()(TOKENS).logits, model.eval()(TOKENS).logits)
