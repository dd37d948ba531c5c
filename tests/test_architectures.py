"""Plan, apply, forward, backward, save, load: the same on every architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import qsurgeon
from qsurgeon.layers import quant_linears

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
_ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = torch.arange(1, 13).reshape(2, 6)

# architecture: (config, what goes in, Linear modules that w4a4-mxfp4 wraps, of how many)
ARCHITECTURES: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor], int, int]] = {
    "Qwen2ForCausalLM": (lambda: hf.Qwen2Config(**_DECODER), {"input_ids": _TOKENS}, 14, 15),
    "Qwen3ForCausalLM": (lambda: hf.Qwen3Config(**_DECODER), {"input_ids": _TOKENS}, 14, 15),
    "LlamaForCausalLM": (lambda: hf.LlamaConfig(**_DECODER), {"input_ids": _TOKENS}, 14, 15),
    "Gemma3ForCausalLM": (lambda: hf.Gemma3TextConfig(**_DECODER), {"input_ids": _TOKENS}, 14, 15),
    "Phi3ForCausalLM": (
        lambda: hf.Phi3Config(**_DECODER, bos_token_id=1, eos_token_id=2),
        {"input_ids": _TOKENS},
        8,
        9,
    ),
    "MistralForCausalLM": (lambda: hf.MistralConfig(**_DECODER), {"input_ids": _TOKENS}, 14, 15),
    "OPTForCausalLM": (
        lambda: hf.OPTConfig(
            vocab_size=96,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=64,
        ),
        {"input_ids": _TOKENS},
        12,
        13,
    ),
    "GPTNeoXForCausalLM": (lambda: hf.GPTNeoXConfig(vocab_size=96, **_ENCODER), {"input_ids": _TOKENS}, 8, 9),
    "BertForSequenceClassification": (
        lambda: hf.BertConfig(vocab_size=96, **_ENCODER),
        {"input_ids": _TOKENS},
        13,
        14,
    ),
    "T5ForConditionalGeneration": (
        lambda: hf.T5Config(
            vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS},
        32,
        33,
    ),
    "ViTForImageClassification": (
        lambda: hf.ViTConfig(image_size=16, patch_size=8, num_labels=4, **_ENCODER),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
        12,
        13,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_wrapped_model_computes_trains_and_reloads_with_equal_logits(name: str, tmp_path: Path) -> None:
    make_config, inputs, wrapped, linears = ARCHITECTURES[name]
    model_class = getattr(hf, name)
    config = make_config()
    config.architectures = [name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    plain = model(**inputs).logits.detach()

    plan = qsurgeon.plan("w4a4-mxfp4", config)
    qsurgeon.apply("w4a4-mxfp4", model)
    assert plan.summary == f"{wrapped} of {linears} Linear modules are wrapped"
    assert sorted(quant_linears(model)) == sorted(step.module.name for step in plan.wrapped)

    logits = model(**inputs).logits
    assert not torch.equal(logits, plain)
    logits.square().mean().backward()
    assert [name for name, layer in quant_linears(model).items() if not _has_gradient(layer)] == []

    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path, auto_class=model_class)
    assert sorted(quant_linears(again)) == sorted(quant_linears(model))
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def _has_gradient(layer: torch.nn.Module) -> bool:
    return all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in layer.parameters())
