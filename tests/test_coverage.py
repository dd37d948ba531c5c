"""How much of the parameters of published mixture-of-experts models a shipped recipe takes."""

from typing import Any

import pytest
import transformers as hf

import qsurgeon

_ALL: dict[str, Any] = {"tie_word_embeddings": False}
_HEAD: dict[str, Any] = {"head_dim": 128}  # an attribute that the signature of Qwen3MoeConfig does not name
SHAPES: dict[str, Any] = {
    "Qwen3-235B-A22B": hf.Qwen3MoeConfig(
        **_ALL, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, **_HEAD,
        intermediate_size=12288, moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    ),
    "DeepSeek-V3": hf.DeepseekV3Config(
        **_ALL, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128,
        intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
        first_k_dense_replace=3, vocab_size=129280,
    ),
    "GPT-OSS-120B": hf.GptOssConfig(
        **_ALL, hidden_size=2880, num_hidden_layers=36, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
        intermediate_size=2880, num_local_experts=128, num_experts_per_tok=4, vocab_size=201088,
    ),
    "Mixtral-8x22B": hf.MixtralConfig(
        **_ALL, hidden_size=6144, num_hidden_layers=56, num_attention_heads=48, num_key_value_heads=8,
        intermediate_size=16384, num_local_experts=8, num_experts_per_tok=2, vocab_size=32000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_recipe_takes_nearly_all_parameters(name: str) -> None:
    plan = qsurgeon.plan("w4a4-mxfp4", SHAPES[name])
    taken = sum(step.module.parameters for step in plan.wrapped)
    everything = sum(step.module.parameters for step in plan.steps)
    assert everything > 1e11
    assert taken / everything >= 0.95
    assert plan.summary.startswith(f"{taken / everything:.1%} of the parameters are wrapped, in ")
    routers = [step for step in plan.steps if step.module.name.rpartition(".")[2] in ("router", "gate")]
    assert routers
    assert not any(step.quantization for step in routers)
