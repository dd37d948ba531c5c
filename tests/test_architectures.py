"""Plan, apply, forward, backward, save, load: the same on every architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import qsurgeon
from qsurgeon.layers import quant_layers
from qsurgeon.recipe import Recipe

_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
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
        lambda: hf.T5Config(  # type: ignore[call-arg]
            vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS},
        32,
        33,
    ),
    "ViTForImageClassification": (
        lambda: hf.ViTConfig(image_size=16, patch_size=8, num_labels=4, **_ENCODER),  # type: ignore[call-arg]
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
    assert f"in {wrapped} of {linears} Linear modules" in plan.summary
    assert sorted(quant_layers(model)) == sorted(step.module.name for step in plan.wrapped)

    logits = model(**inputs).logits
    assert not torch.equal(logits, plain)
    logits.square().mean().backward()
    assert [name for name, layer in quant_layers(model).items() if not _has_gradient(layer)] == []

    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path, auto_class=model_class)
    assert sorted(quant_layers(again)) == sorted(quant_layers(model))
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


_MOE: dict[str, Any] = {**_DECODER, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
# Whose files have other names than their modules, or whose experts are stored one by one and joined when they load.
RENAMED: dict[str, Callable[[], Any]] = {
    "Qwen3MoeForCausalLM": lambda: hf.Qwen3MoeConfig(**_MOE, num_experts=4),
    "MixtralForCausalLM": lambda: hf.MixtralConfig(**_DECODER, num_local_experts=4),
    "DeepseekV3ForCausalLM": lambda: hf.DeepseekV3Config(
        **{**_MOE, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    ),
    "Qwen2_5_VLForConditionalGeneration": lambda: hf.Qwen2_5_VLConfig(
        text_config={**_DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
    ),
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RENAMED])
def test_a_packed_folder_is_the_model_packed_in_memory(name: str, tmp_path: Path) -> None:
    config, inputs = RENAMED[name]() if name in RENAMED else ARCHITECTURES[name][0](), {"input_ids": _TOKENS}
    inputs = ARCHITECTURES[name][1] if name in ARCHITECTURES else inputs
    config.architectures = [name]
    model_class = getattr(hf, name)
    torch.manual_seed(0)
    model_class(config).eval().save_pretrained(tmp_path / "model", max_shard_size="100kB")
    # T5 casts what goes into `wo` to the dtype of its weight.
    rule = {"target": ["**"], "exclude": ["lm_head?", "wo?", "gate?"], "weight": "nvfp4", "input": "nvfp4"}
    recipe = Recipe.model_validate({"version": 1, "storage": "packed", "rules": [rule]})
    qsurgeon.rewrite(recipe, tmp_path / "model", tmp_path / "out")
    live = qsurgeon.apply(recipe, model_class.from_pretrained(tmp_path / "model"))
    again = qsurgeon.load(tmp_path / "out", auto_class=model_class)
    state, other = live.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert [key for key in state if not torch.equal(state[key], other[key])] == []
    assert torch.equal(again.eval()(**inputs).logits, live.eval()(**inputs).logits)


def _has_gradient(layer: torch.nn.Module) -> bool:
    return all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in layer.parameters())
