"""Untying: where a model ties more than one pair, its config cannot untie one alone."""

import pytest
import transformers as hf

import qsurgeon
from qsurgeon.errors import PlanError
from qsurgeon.recipe import Recipe

UNTIED_HEAD = Recipe.model_validate(
    {"version": 1, "untie": True, "rules": [{"target": ["lm_head"], "weight": "mxfp4", "input": "mxfp4"}]}
)


def test_untie_is_refused_where_it_would_untie_more() -> None:
    config = hf.BartConfig(
        vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        architectures=["BartForConditionalGeneration"],
    )  # fmt: skip
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(UNTIED_HEAD, config)
    assert str(caught.value) == (
        "rules[0].target: 'untie: true' cannot give lm_head a weight of its own: this model ties "
        "model.encoder.embed_tokens.weight too, and its config unties all or nothing"
    )
