"""A record says what is in the model that is saved, whatever became of the model and its config since ``apply``."""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from versions import at_least

import qsurgeon
from qsurgeon.errors import CheckpointError, NothingWrappedError, SurgeryError
from qsurgeon.layers import QuantLinear, quant_layers
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.surgery import record_in

Maker = Callable[..., Any]
TOKENS = torch.arange(1, 13).reshape(2, 6)
EVERYTHING = Recipe(version=1, rules=(Rule(target=("**",), weight="mxfp4", input="mxfp4"),))


def section(folder: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(TOKENS).logits
    return result


# --- the config is shared, or another's


def test_a_teacher_of_the_same_config_object_is_saved_in_full_precision(qwen2_config: Maker, tmp_path: Path) -> None:
    config = qwen2_config()
    student, teacher = hf.Qwen2ForCausalLM(config).eval(), hf.Qwen2ForCausalLM(config).eval()
    qsurgeon.apply("w4a4-mxfp4", student)
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    assert section(tmp_path / "teacher") is None
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert quant_layers(again) == {}
    assert torch.equal(logits(again), logits(teacher))
    assert torch.equal(logits(qsurgeon.load(tmp_path / "student")), logits(student))
    assert record_in(config) is not None  # saving the teacher leaves the student's config alone


def test_a_model_made_from_the_config_of_a_wrapped_one_is_saved_in_full_precision(
    small_model: Maker, tmp_path: Path
) -> None:
    qsurgeon.apply("w4a4-mxfp4", small_model()).save_pretrained(tmp_path / "wrapped")
    config = hf.AutoConfig.from_pretrained(tmp_path / "wrapped")
    with pytest.warns(UserWarning, match="made from a config") as caught:
        plain = hf.AutoModelForCausalLM.from_config(config)
    assert str(caught[0].message) == (
        "a Qwen2ForCausalLM that is made from a config is in full precision, also where the config is that of a model "
        "which qsurgeon wrapped; qsurgeon.load opens its checkpoint, qsurgeon.apply wraps a model"
    )
    plain.save_pretrained(tmp_path / "plain")
    assert section(tmp_path / "plain") is None


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_the_checkpoint_decides_and_not_the_config_that_is_passed(
    small_model: Maker, qwen2_config: Maker, storage: Any, tmp_path: Path
) -> None:
    model = qsurgeon.apply(EVERYTHING.model_copy(update={"storage": storage}), small_model())
    model.save_pretrained(tmp_path)
    plain = small_model().config
    for config in (model.config, plain, hf.AutoConfig.from_pretrained(tmp_path)):
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
        assert torch.equal(logits(again), logits(model))
        assert len(quant_layers(qsurgeon.load(tmp_path, config=config))) == 15
    assert record_in(plain) is None  # the caller's config stays as it was


def test_a_plain_checkpoint_under_a_wrapped_config_is_plain_and_says_so(small_model: Maker, plain_folder: Path) -> None:
    config = qsurgeon.apply("w4a4-mxfp4", small_model()).config
    with pytest.warns(UserWarning, match="in full precision") as caught:
        again = hf.AutoModelForCausalLM.from_pretrained(plain_folder, config=config)
    assert str(caught[0].message) == (
        f"{plain_folder} is a checkpoint in full precision, and is loaded as such; the config that was passed is that "
        "of a model which qsurgeon wrapped"
    )
    assert quant_layers(again) == {}


def test_parts_that_were_wrapped_make_one_record_of_the_whole(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("encoder", hf.BertModel, {}),
        ("decoder", hf.BertLMHeadModel, {"is_decoder": True, "add_cross_attention": True}),
    )
    for name, kind, more in parts:
        recipe = Recipe(version=1, rules=(Rule(target=("attention",), weight="mxfp4" if more else "nvfp4"),))
        qsurgeon.apply(recipe, kind(hf.BertConfig(**small, **more))).save_pretrained(tmp_path / name)
    whole = hf.EncoderDecoderModel.from_encoder_decoder_pretrained(str(tmp_path / "encoder"), str(tmp_path / "decoder"))
    whole.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert "quantization_config" not in config["encoder"]
    assert "quantization_config" not in config["decoder"]
    assert {rule["weight"] for rule in config["quantization_config"]["rules"]} == {"nvfp4", "mxfp4"}
    again = hf.EncoderDecoderModel.from_pretrained(tmp_path / "whole")
    assert {name: layer.quantization for name, layer in quant_layers(again).items()} == {
        name: layer.quantization for name, layer in quant_layers(whole).items()
    }


def test_a_record_of_a_part_alone_is_refused(small_model: Maker, tmp_path: Path) -> None:
    qsurgeon.apply("w4a4-mxfp4", small_model()).save_pretrained(tmp_path / "text")
    text = json.loads((tmp_path / "text/config.json").read_text())
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    with pytest.raises(CheckpointError) as caught:
        hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert str(caught.value) == (
        f"{tmp_path}/whole: text_config in its config.json has a quantization_config of qsurgeon, and the whole model "
        "has none: it was saved by a program that does not import qsurgeon. Remove that section if the weights are in "
        "full precision"
    )


# --- the model changes after apply


def test_a_resized_head_stays_wrapped(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply(EVERYTHING, small_model())
    before = model.lm_head.quantization
    model.resize_token_embeddings(100, mean_resizing=False)
    assert type(model.lm_head) is QuantLinear
    assert model.lm_head.quantization == before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(qsurgeon.load(tmp_path)), logits(model))


def test_a_packed_head_is_not_resized(small_model: Maker) -> None:
    model = qsurgeon.apply(EVERYTHING.model_copy(update={"storage": "packed"}), small_model())
    model.resize_token_embeddings(96)  # as it is
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(SurgeryError) as caught:
        model.resize_token_embeddings(100)
    assert str(caught.value) == (
        "the output head of Qwen2ForCausalLM is packed, and codes cannot be resized: resize the token embeddings "
        "first, then apply the recipe"
    )
    assert model.get_input_embeddings().num_embeddings == 96


def test_dropped_layers_are_not_in_the_record(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply(EVERYTHING, small_model(num_hidden_layers=3))
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    model.config.layer_types = model.config.layer_types[:2]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(qsurgeon.load(tmp_path)), logits(model))


def swapped(model: Any, path: str) -> None:
    parent, _, name = path.rpartition(".")
    linear = model.get_submodule(path)
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    plain.load_state_dict(linear.state_dict())
    setattr(model.get_submodule(parent), name, plain)


def test_a_module_that_was_swapped_away_is_said_and_saved_as_it_is(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply(EVERYTHING, small_model())
    swapped(model, "model.layers.0.mlp.up_proj")
    swapped(model, "lm_head")
    with pytest.warns(UserWarning, match="is a Linear now") as caught:
        model.save_pretrained(tmp_path)
    assert str(caught[0].message) == (
        "model.layers.0.mlp.up_proj was wrapped and is a Linear now (2 modules in all): it is saved as it is, in full "
        "precision"
    )
    again = qsurgeon.load(tmp_path)
    assert quant_layers(again).keys() == quant_layers(model).keys()
    assert torch.equal(logits(again), logits(model))


def test_a_model_in_which_nothing_is_wrapped_any_more_has_no_record(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", small_model())
    for path in list(quant_layers(model)):
        swapped(model, path)
    model.save_pretrained(tmp_path)
    assert section(tmp_path) is None
    with pytest.raises(NothingWrappedError, match=r"no module is wrapped; its config\.json has no quantization_config"):
        qsurgeon.load(tmp_path)


def test_a_copy_of_a_wrapped_model_has_a_record_of_its_own(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply(EVERYTHING, small_model())
    other = copy.deepcopy(model)
    swapped(other, "lm_head")
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="lm_head was wrapped and is a Linear now"):
        other.save_pretrained(tmp_path / "other")
    assert len(quant_layers(qsurgeon.load(tmp_path / "model"))) == 15
    assert len(quant_layers(qsurgeon.load(tmp_path / "other"))) == 14


def test_what_excluded_a_module_is_known_wherever_it_is(tmp_path: Path) -> None:
    config = hf.BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    recipe = Recipe(version=1, rules=(Rule(target=("encoder",), exclude=("layer.0",), weight="mxfp4"),))
    model = hf.BertForMaskedLM(config)
    qsurgeon.apply(recipe, model.bert)
    model.save_pretrained(tmp_path)
    for one in (
        model,
        hf.BertForMaskedLM.from_pretrained(tmp_path),
        hf.BertForTokenClassification.from_pretrained(tmp_path),
    ):
        rows = {row.module: row.why for row in qsurgeon.inspect(one).rows}
        assert rows["bert.encoder.layer.0.output.dense"] == "excluded by 'layer.0' of rule 'rule 1'"


# --- models in containers


class ValueHead(nn.Module):
    def __init__(self, model: Any, *, hands_on_config: bool) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = model, nn.Linear(64, 1)
        if hands_on_config:
            self.config = model.config


@pytest.mark.parametrize("storage", ["master", "packed"])
@pytest.mark.parametrize("hands_on_config", [True, False])
def test_a_model_in_a_container_is_saved_under_its_own_names(
    small_model: Maker, hands_on_config: bool, storage: Any, tmp_path: Path
) -> None:
    rules = (Rule(target=("pretrained_model",), exclude=("lm_head",), weight="mxfp4", input="mxfp4"),)
    container = ValueHead(small_model(), hands_on_config=hands_on_config)
    qsurgeon.apply(Recipe(version=1, storage=storage, rules=rules), container)
    model = container.pretrained_model
    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert (getattr(model, "hf_quantizer", None) is None) == (storage == "master")


def test_two_models_in_one_container_have_a_record_each(small_model: Maker, tmp_path: Path) -> None:
    pair: Any = nn.ModuleDict({"actor": small_model(), "critic": small_model(num_hidden_layers=1)})
    qsurgeon.apply(Recipe(version=1, rules=(Rule(target=("layers",), weight="mxfp4"),)), pair)
    for name, count in (("actor", 14), ("critic", 7)):
        pair[name].save_pretrained(tmp_path / name)
        assert len(quant_layers(qsurgeon.load(tmp_path / name))) == count


def test_parts_with_two_storages_are_not_saved_as_one(small_model: Maker, tmp_path: Path) -> None:
    model = small_model()
    qsurgeon.apply(EVERYTHING, model.model.layers[0])
    qsurgeon.apply(EVERYTHING.model_copy(update={"storage": "packed"}), model.model.layers[1])
    with pytest.raises(SurgeryError) as caught:
        model.save_pretrained(tmp_path / "out")
    assert str(caught.value) == (
        "the weight of model.layers.1.self_attn.q_proj is packed and that of model.layers.0.self_attn.q_proj is not; a "
        "checkpoint has one storage: apply recipes with the same storage to both"
    )
    assert not (tmp_path / "out").exists()


# --- live and reloaded are in one state


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_live_model_is_in_the_state_of_one_that_was_loaded(small_model: Maker, storage: Any, tmp_path: Path) -> None:
    live = qsurgeon.apply(EVERYTHING.model_copy(update={"storage": storage}), small_model())
    live.save_pretrained(tmp_path)
    loaded = qsurgeon.load(tmp_path)
    for name in ("is_quantized", "quantization_method"):
        assert getattr(live, name, None) == getattr(loaded, name, None)
    assert type(getattr(live, "hf_quantizer", None)) is type(loaded.hf_quantizer)
    assert live.config._is_quantized
    assert loaded.config._is_quantized
    assert live.config.quantization_config.record == loaded.config.quantization_config.record


@pytest.mark.filterwarnings("ignore:.*mamba_inner_fn is handed its weight:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        hf.FalconMambaConfig(
            vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=16, time_step_rank=8, eos_token_id=1
        ),
        hf.JambaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_dt_rank=8,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_models_that_ask_whether_they_are_quantized_compute_alike(config: Any, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_config(config)
    rule = Rule(target=("**",), exclude=("lm_head",), weight="mxfp4", input="mxfp4")
    has_kernels = config.model_type == "falcon_mamba" and not at_least("transformers", "5.16")
    remark = r"FalconMambaMixer\.cuda_kernels_forward takes its weight itself in some calls, unrounded"
    with pytest.warns(UserWarning, match=remark) if has_kernels else nullcontext():
        qsurgeon.apply(Recipe(version=1, rules=(rule,)), model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(qsurgeon.load(tmp_path)), logits(model))


# --- load


@pytest.mark.skipif("internlm3" not in hf.CONFIG_MAPPING, reason=f"transformers {hf.__version__} has no internlm3")
def test_a_class_with_the_config_of_another_model_type_is_opened_with_that_config(tmp_path: Path) -> None:
    config = hf.AutoConfig.for_model(
        "internlm3", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bias=True, qkv_bias=True,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config)
    qsurgeon.apply("w4a4-mxfp4", model).save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path)
    assert type(again) is type(model) is hf.LlamaForCausalLM
    assert type(again.config) is type(config)
    assert torch.equal(logits(again), logits(model))


def test_load_returns_the_loading_info_too(small_model: Maker, tmp_path: Path) -> None:
    qsurgeon.apply("w4a4-mxfp4", small_model()).save_pretrained(tmp_path)
    model, info = qsurgeon.load(tmp_path, output_loading_info=True)
    assert len(quant_layers(model)) == 14
    assert not info["missing_keys"]


def test_load_looks_into_a_subfolder(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", small_model())
    model.save_pretrained(tmp_path / "a/b")
    assert torch.equal(logits(qsurgeon.load(tmp_path, subfolder="a/b")), logits(model))
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(tmp_path, subfolder="a")
    assert str(caught.value) == f"{tmp_path}/a has no config.json; expected a model's folder"


@pytest.mark.parametrize("more", [{}, {"revision": "main"}, {"subfolder": "deep"}], ids=str)
def test_load_opens_a_hub_id_as_the_class_that_its_config_names(
    qwen2_config: Maker, more: dict[str, str], tmp_path: Path
) -> None:
    model = hf.Qwen2ForSequenceClassification(qwen2_config(num_labels=1, pad_token_id=0))
    qsurgeon.apply("w4a4-mxfp4", model)
    repository = tmp_path / "models--me--reward"
    model.save_pretrained(repository / "snapshots" / ("a" * 40) / more.get("subfolder", ""))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    again = qsurgeon.load("me/reward", cache_dir=tmp_path, **more)
    assert type(again) is hf.Qwen2ForSequenceClassification
    assert torch.equal(again.score.weight, model.score.weight)
    assert len(quant_layers(again)) == len(quant_layers(model))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_outside_of_the_wrapped_layers_is_missed_too(small_model: Maker, name: str, tmp_path: Path) -> None:
    qsurgeon.apply("w4a4-mxfp4", small_model()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load, where in ((qsurgeon.load, ""), (hf.AutoModelForCausalLM.from_pretrained, f"{tmp_path}: ")):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path)
        assert str(caught.value) == f"{where}the checkpoint has no tensor {name}"


def test_a_tensor_that_the_opened_class_has_not_is_not_missed(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", small_model()).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, ids = hf.AutoModel.from_pretrained(tmp_path).eval(), torch.arange(8)[None]
    assert torch.equal(opened(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


def test_load_refuses_a_head_that_would_be_random(small_model: Maker, tmp_path: Path) -> None:
    qsurgeon.apply("w4a4-mxfp4", small_model()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(tmp_path, auto_class=hf.AutoModelForSequenceClassification)
    assert str(caught.value) == (
        f"{tmp_path}: has no tensor score.weight, which Qwen2ForSequenceClassification would have at random (1 in "
        "all). To train it, use AutoModelForSequenceClassification.from_pretrained"
    )
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(quant_layers(model)) == 14


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_is_loaded_under_the_class_that_it_was_trained_with(
    small_model: Maker, task: str, tmp_path: Path
) -> None:
    qsurgeon.apply("w4a4-mxfp4", small_model(pad_token_id=0)).save_pretrained(tmp_path / "base")
    kind = {"CAUSAL_LM": hf.AutoModelForCausalLM, "SEQ_CLS": hf.AutoModelForSequenceClassification}[task]
    base = kind.from_pretrained(tmp_path / "base")
    model: Any = peft.get_peft_model(base, peft.LoraConfig(task_type=task, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    if task == "SEQ_CLS" and not at_least("transformers", "5.17"):
        with pytest.raises(CheckpointError) as caught:
            qsurgeon.load(tmp_path / "adapter")
        assert str(caught.value) == (
            f"{tmp_path / 'adapter'}: the adapter has a trained score, which transformers does not find in its file: "
            f"that needs transformers 5.17 or later, this is {hf.__version__}"
        )
        return
    again = qsurgeon.load(tmp_path / "adapter")
    assert type(again) is type(base)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_head_is_untied_in_a_container_too(make_qwen2: Maker, storage: Any, tmp_path: Path) -> None:
    container = nn.ModuleDict({"policy": make_qwen2()})
    rule = Rule(target=("lm_head",), weight="mxfp4")
    qsurgeon.apply(Recipe(version=1, untie=True, storage=storage, rules=(rule,)), container)
    model: Any = container["policy"]
    model.save_pretrained(tmp_path)
    assert not model.config.tie_word_embeddings
    assert torch.equal(logits(qsurgeon.load(tmp_path)), logits(model))


def test_what_torch_puts_around_a_part_changes_no_name(small_model: Maker, tmp_path: Path) -> None:
    model = small_model()
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = checkpoint_wrapper(layer)
    qsurgeon.apply(EVERYTHING, model)
    clean = {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=clean)
    assert torch.equal(logits(qsurgeon.load(tmp_path)), logits(model))
