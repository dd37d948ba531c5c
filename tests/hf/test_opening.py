"""What is saved from a model, whole or in part, is opened as what it was, under any class, or not at all.

What a module of the opened model should be is told by its weight: it is that of a module that was saved, or a new one.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import qsurgeon
from qsurgeon.errors import CheckpointError, NothingWrappedError
from qsurgeon.layers import PackedLinear, QuantLinear, quant_layers
from qsurgeon.layers.codes import plain
from qsurgeon.recipe import Recipe, Rule

TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model; the parts of it that a recipe is applied to, and that are saved; the classes it is opened as.

    modules: parts that cannot be saved alone. foreign: those of the classes for which transformers finds nothing in
    such a checkpoint, plain or not.
    """

    make: Callable[[], Any]
    parts: tuple[str, ...]
    classes: tuple[Any, ...]
    foreign: tuple[Any, ...] = ()
    modules: tuple[str, ...] = ()


def _bert(kind: Any) -> Any:
    return kind(hf.BertConfig(**TEXT))


def _t5() -> Any:
    config = hf.T5Config(vocab_size=99, d_model=64, d_ff=96, d_kv=32, num_heads=2, num_layers=2)
    return hf.T5ForConditionalGeneration(config)


def _qwen2() -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=False))


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.Qwen2Config(**TEXT, num_key_value_heads=2),
        image_token_index=98,
    )
    return hf.LlavaForConditionalGeneration(config)


def _gemma3() -> Any:
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=32),
        vision_config=hf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _clip() -> Any:
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION))


def _encoder_decoder() -> Any:
    decoder = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**TEXT), decoder)
    return hf.EncoderDecoderModel(config=config)


def _whisper() -> Any:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    )  # fmt: skip


CASES = {
    "bert": Case(
        lambda: _bert(hf.BertForMaskedLM),
        ("bert",),
        (hf.AutoModel, hf.AutoModelForSequenceClassification, hf.BertForPreTraining, hf.BertLMHeadModel),
    ),
    "bert-base": Case(
        lambda: _bert(hf.BertModel),
        (),
        (hf.AutoModelForTokenClassification, hf.AutoModelForMaskedLM, hf.AutoModelForSequenceClassification),
        modules=("encoder.layer.0",),
    ),
    "t5": Case(_t5, ("encoder", "decoder"), (hf.AutoModel, hf.T5EncoderModel)),
    "qwen2": Case(
        _qwen2,
        ("model",),
        (hf.AutoModel, hf.AutoModelForSequenceClassification, hf.AutoModelForTokenClassification),
        modules=("model.layers.1",),
    ),
    "llava": Case(
        _llava,
        ("model.language_model", "model.vision_tower"),
        (hf.AutoModel, hf.Qwen2Model, hf.CLIPVisionModel),
        (hf.Qwen2Model, hf.CLIPVisionModel),
        ("model.multi_modal_projector",),
    ),
    "gemma3": Case(
        _gemma3,
        ("model.language_model", "model.vision_tower"),
        (hf.AutoModel, hf.Gemma3ForCausalLM),
        (hf.Gemma3ForCausalLM,),
    ),
    "clip": Case(
        _clip,
        ("text_model", "vision_model"),
        (hf.CLIPTextModel, hf.CLIPVisionModel, hf.CLIPTextModelWithProjection),
    ),
    "encoder-decoder": Case(_encoder_decoder, ("encoder", "decoder"), ()),
    "whisper": Case(
        _whisper, ("model.encoder", "model.decoder"), (hf.AutoModel, hf.WhisperForCausalLM)
    ),
}  # fmt: skip


def made(name: str) -> Any:
    """Return a model of ``CASES``, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name].make().eval()


HEADS = ("lm_head?", "cls?", "proj_out?")  # some are tied
RULES = (
    Rule(target=("q_proj?", "query?", "q?", "SelfAttention?"), exclude=HEADS, weight="nvfp4", input="mxfp8"),
    Rule(target=("**",), exclude=(*HEADS, "DenseReluDense.wo?"), weight="mxfp4"),  # T5 asks that one for its dtype
)
OPENED = [
    (name, applied, storage)
    for name, case in CASES.items()
    for applied, storage in (("", "master"), ("", "packed"), *((part, "master") for part in case.parts[:1]))
    if case.classes
]
SAVED = [
    (name, applied, saved, storage)
    for name, case in CASES.items()
    for applied, saved, storage in (
        ("", "", "master"),
        ("", "", "packed"),
        *(("", part, "master") for part in case.parts),
        *(
            (part, "", storage)
            for part, storage in zip(case.parts + case.modules, cycle(("packed", "master")), strict=False)
        ),
        *((part, part, "packed") for part in case.parts[:1]),
    )
]
STORAGES = ("master", "packed")


def recipe(storage: Any) -> Recipe:
    return Recipe(version=1, storage=storage, rules=RULES)


def contents(model: torch.nn.Module) -> dict[bytes, QuantLinear | None]:
    """Return how each Linear of ``model`` computes, by what its weight holds."""
    found: dict[bytes, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel():
            found[plain(module.weight).detach().contiguous().view(torch.uint8).numpy().tobytes()] = (
                module if isinstance(module, QuantLinear) else None
            )
    return found


def differences(opened: torch.nn.Module, saved: torch.nn.Module) -> Iterator[str]:
    """Yield in what the Linear modules of ``opened`` differ from those of ``saved`` that have the same weight."""
    expected = contents(saved)
    seen = 0
    for weight, how in contents(opened).items():
        before = expected.get(weight)
        seen += weight in expected
        if (how is None) != (before is None):
            yield f"{how} was {before}"
        elif how is not None and before is not None and how.quantization != before.quantization:
            yield f"{how.quantization} was {before.quantization}"
        elif type(how) is not type(before):
            yield f"{type(how)} was {type(before)}"
    if not seen:
        yield "nothing of what was saved is there"


def part_of(model: Any, path: str) -> Any:
    return model.get_submodule(path) if path else model


def wrapped(name: str, part: str, storage: str) -> Any:
    model = made(name)
    qsurgeon.apply(recipe(storage), part_of(model, part))
    return model


@pytest.mark.parametrize(("name", "applied", "saved", "storage"), SAVED)
def test_what_was_applied_and_saved_whole_or_in_part_comes_back(
    name: str, applied: str, saved: str, storage: str, tmp_path: Path
) -> None:
    model = part_of(wrapped(name, applied, storage), saved)
    model.save_pretrained(tmp_path)
    options = {}
    if isinstance(model, hf.BertModel) and model.pooler is None:
        # By itself a BertModel has a pooler; that of a BertForMaskedLM has none.
        with pytest.raises(CheckpointError) as caught:
            type(model).from_pretrained(tmp_path)
        assert str(caught.value) == f"{tmp_path}: the checkpoint has no tensor pooler.dense.bias"
        options = {"add_pooling_layer": False}
    again = type(model).from_pretrained(tmp_path, **options)
    assert type(qsurgeon.load(tmp_path, **options)) is type(model)
    assert list(differences(again, model)) == []
    assert len(quant_layers(again)) == len(quant_layers(model))
    assert qsurgeon.inspect(again).summary == qsurgeon.inspect(model).summary


@pytest.mark.parametrize(("name", "applied", "storage"), OPENED)
def test_what_was_saved_is_opened_under_any_class_as_what_it_was(
    name: str, applied: str, storage: str, tmp_path: Path
) -> None:
    model = wrapped(name, applied, storage)
    model.save_pretrained(tmp_path / "wrapped")
    for kind in CASES[name].classes:
        if kind in CASES[name].foreign:
            with pytest.raises(NothingWrappedError, match=r"no tensor of .* belongs to a"):
                kind.from_pretrained(tmp_path / "wrapped")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class that has nothing of what was wrapped
            again = kind.from_pretrained(tmp_path / "wrapped")
        assert list(differences(again, model)) == [], kind


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, case in CASES.items() for kind in case.foreign])
def test_a_class_is_foreign_to_a_plain_checkpoint_too(name: str, kind: Any, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    plain, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) >= {key for key, _ in plain.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_a_class_that_opens_a_part_is_saved_and_opened_again(name: str, tmp_path: Path) -> None:
    wrapped(name, "", "master").save_pretrained(tmp_path / "whole")
    for place, kind in enumerate(CASES[name].classes[:1]):
        first = kind.from_pretrained(tmp_path / "whole")
        first.save_pretrained(tmp_path / str(place))
        again = type(first).from_pretrained(tmp_path / str(place))
        assert list(differences(again, first)) == []
        assert len(quant_layers(again)) == len(quant_layers(first)) > 0
        told = {"architectures": [type(first).__name__], "_name_or_path": str(tmp_path / str(place))}
        assert again.config.to_dict() == first.config.to_dict() | told


@pytest.mark.parametrize(("name", "storage"), list(zip(CASES, cycle(STORAGES), strict=False)))
def test_the_streamed_checkpoint_is_opened_as_the_live_one(name: str, storage: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path / "plain")
    try:
        qsurgeon.rewrite(recipe(storage), tmp_path / "plain", tmp_path / "streamed")
    except CheckpointError as error:
        pytest.skip(str(error))
    model = wrapped(name, "", storage)
    assert list(differences(qsurgeon.load(tmp_path / "streamed"), model)) == []
    section = json.loads((tmp_path / "streamed/config.json").read_text())["quantization_config"]
    model.save_pretrained(tmp_path / "live")
    live = json.loads((tmp_path / "live/config.json").read_text())["quantization_config"]
    assert {**section, "source": ""} == {**live, "source": ""}


@pytest.mark.parametrize("storage", STORAGES)
def test_a_part_that_its_class_has_and_the_saved_model_had_not_is_missed_where_it_is_opened(
    storage: str, tmp_path: Path
) -> None:
    model = _bert(hf.BertForMaskedLM).eval()
    qsurgeon.apply(recipe(storage), model)
    model.base_model.save_pretrained(tmp_path)  # a BertModel without a pooler
    opened = hf.BertForTokenClassification.from_pretrained(tmp_path).eval()  # it has none either
    ids = torch.arange(8)[None]
    assert torch.equal(opened.base_model(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
    with pytest.raises(CheckpointError, match=r"^the checkpoint has no tensor pooler\.dense\.weight$"):
        hf.BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["embeddings.LayerNorm.weight", "encoder.layer.1.output.dense.bias"])
@pytest.mark.parametrize("kind", [hf.BertModel, hf.BertForMaskedLM, hf.BertForTokenClassification])
def test_a_tensor_that_both_classes_have_is_missed_under_each(kind: Any, lost: str, tmp_path: Path) -> None:
    model = _bert(hf.BertForSequenceClassification)
    qsurgeon.apply(recipe("master"), model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"bert.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"^the checkpoint has no tensor bert\.{re.escape(lost)}$"):
        kind.from_pretrained(tmp_path)


def test_all_storages_are_tried() -> None:
    assert {type(layer) for layer in quant_layers(wrapped("qwen2", "", "packed")).values()} == {PackedLinear}
