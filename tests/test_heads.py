"""No shipped recipe wraps an output head, whatever the model calls it; the model is asked for its parts."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

import qsurgeon
from qsurgeon.layers import quant_layers
from qsurgeon.recipe import shipped_recipes
from qsurgeon.surgery import build_plan, inventory

RECIPES = [name for name in shipped_recipes() if not name.startswith("e13/")]  # which are for 28 layers

# class: what it wraps last, by its own names; "" for a model without an output head
HEADS = {
    "BartForConditionalGeneration": "lm_head",
    "BartForSequenceClassification": "classification_head.dense classification_head.out_proj",
    "BertForMaskedLM": "cls.predictions.decoder",
    "BertForSequenceClassification": "classifier",
    "BertModel": "",
    "BioGptForCausalLM": "output_projection",
    "CLIPForImageClassification": "classifier",
    "DeiTForImageClassificationWithTeacher": "cls_classifier distillation_classifier",
    "DistilBertForQuestionAnswering": "qa_outputs",
    "ElectraForMaskedLM": "generator_lm_head",
    "GitForCausalLM": "output",
    "Gemma3ForConditionalGeneration": "lm_head",
    "LlamaForSequenceClassification": "score",
    "ModernBertForMaskedLM": "decoder",
    "MusicgenForCausalLM": "lm_heads.0 lm_heads.1 lm_heads.2 lm_heads.3",
    "RwkvForCausalLM": "head",
    "RwkvModel": "",
    "SwinForImageClassification": "classifier",
    "T5ForConditionalGeneration": "lm_head",
    "T5ForQuestionAnswering": "qa_outputs",
    "TrOCRForCausalLM": "output_projection",
    "Wav2Vec2ForCTC": "lm_head",
    "WhisperForConditionalGeneration": "proj_out",
    "XLMWithLMHeadModel": "pred_layer.proj",
}


@cache
def made(name: str) -> Any:
    """Return a model of the class on the meta device, with few layers where its config has one number for them."""
    cls = getattr(hf, name)
    config = cls.config_class()
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, key, None), int) and not getattr(config, "layer_types", None):
            setattr(config, key, 2)
    with torch.device("meta"):
        return cls._from_config(config)


def linears(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, one in module.named_modules(prefix=prefix):
        if type(one) is nn.Linear:
            yield name


@pytest.mark.parametrize("name", HEADS)
def test_no_shipped_recipe_wraps_the_output_head(name: str) -> None:
    model, expected = made(name), set(HEADS[name].split())
    paths = {id(one): path for path, one in model.named_modules()}
    head = model.get_output_embeddings()
    asked = set() if head is None else set(linears(head, paths[id(head)]))
    assert asked <= expected
    modules = inventory(model)
    for recipe in RECIPES:
        plan = build_plan(qsurgeon.load_recipe(recipe), modules)
        wrapped = {step.module.name for step in plan.wrapped}
        left = {step.module.name for step in plan.steps if step.module.type} - wrapped
        assert wrapped, recipe
        assert not expected & wrapped, recipe
        assert {one for one in left if one.split(".")[-1] not in ("gate", "router")} == expected, recipe


def recipe_of(target: str, **fields: Any) -> Any:
    return qsurgeon.Recipe.model_validate({"version": 1, "rules": [{"target": [target], "weight": "mxfp4", **fields}]})


def test_a_head_can_be_targeted_as_well_live_from_a_folder_and_in_its_record(tmp_path: Any) -> None:
    config = hf.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=8,
        max_target_positions=8, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, tie_word_embeddings=False,
        architectures=["WhisperForConditionalGeneration"],
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "plain")
    recipe = recipe_of("<output_head>")
    assert [step.module.name for step in qsurgeon.plan(recipe, tmp_path / "plain").wrapped] == ["proj_out"]
    qsurgeon.rewrite(recipe, tmp_path / "plain", tmp_path / "out")
    loaded = qsurgeon.load(tmp_path / "out")
    assert [*quant_layers(loaded)] == ["proj_out"]
    qsurgeon.apply(recipe, model)
    assert [*quant_layers(model)] == ["proj_out"]
    assert loaded.config.quantization_config.record.rules[0].modules == ("proj_out",)


def test_a_role_that_nothing_plays_is_an_error_without_a_question_mark() -> None:
    with pytest.raises(qsurgeon.errors.PlanError) as caught:
        qsurgeon.plan(recipe_of("**", exclude=["<output_head>"]), made("BertModel"))
    assert str(caught.value) == (
        "rules[0].exclude[0]: '<output_head>' names no module; the model says of no module that it is what computes "
        "the model's outputs from its last hidden states"
    )


def test_below_an_adapter_the_head_is_the_one_it_sits_on(small_model: Any) -> None:
    model = small_model()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    heads = {one.name for one in inventory(adapted) if one.output_head and one.type}
    assert heads == {"lm_head"}


def test_a_module_that_is_no_transformers_model_has_no_head_and_what_it_holds_has() -> None:
    assert not any(one.output_head for one in inventory(nn.Sequential(nn.Linear(4, 4))))

    class Container(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.value = made("RwkvForCausalLM"), nn.Linear(4, 1)

    assert [one.name for one in inventory(Container()) if one.output_head] == ["policy.head"]


# --- parts that read no text


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("Gemma3ForConditionalGeneration", {"model.vision_tower": "image"}),
        ("WhisperForConditionalGeneration", {"model.encoder": "audio"}),
        ("GitForCausalLM", {"git.image_encoder": "image"}),
        ("BertForMaskedLM", {}),
        ("SwinForImageClassification", {}),  # it reads images, and nothing else
        ("T5ForConditionalGeneration", {}),
    ],
)
def test_a_part_that_reads_no_text_is_told_apart(name: str, towers: dict[str, str]) -> None:
    modules = inventory(made(name))
    found = {one.tower for one in modules if one.tower is not None}
    assert {one.name: one.reads for one in found} == towers
    for tower in found:
        inside = [one for one in modules if one.tower == tower]
        assert all(one.name == tower.name or one.name.startswith(f"{tower.name}.") for one in inside)
