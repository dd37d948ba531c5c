"""transformers' own save and load: what is wrapped stays wrapped, or the load fails."""

import functools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from versions import at_least

import qsurgeon
from qsurgeon.errors import CheckpointError, NothingWrappedError, SurgeryError
from qsurgeon.formats import get_format
from qsurgeon.formats.rotation import Rotation
from qsurgeon.hf.quantizer import QSurgeonConfig
from qsurgeon.layers import Quantization, QuantLinear, quant_layers
from qsurgeon.recipe import FormatSpec, Recipe, Rule
from qsurgeon.surgery import operate

TOKENS = torch.arange(1, 13).reshape(2, 6)


Maker = Callable[..., Any]


@pytest.fixture(scope="session")
def folder(small_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "w4a4"
    qsurgeon.apply("w4a4-mxfp4", small_model()).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_config(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_a_plain_from_pretrained_rebuilds_the_wrapping(
    folder: Path, plain_folder: Path, dtype: Any, device_map: Any
) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    expected = qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(plain_folder, dtype=dtype))
    assert len(quant_layers(model)) == 14
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_a_reloaded_model_is_an_ordinary_model_to_whoever_trains_it(folder: Path) -> None:
    model = qsurgeon.load(folder)
    assert model.hf_quantizer is None
    assert not model.is_quantized
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.half()


def test_saving_again_keeps_the_record_and_an_explicit_state_dict(folder: Path, tmp_path: Path) -> None:
    model = qsurgeon.load(folder)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        == json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], state["model.norm.weight"])


def test_the_tensors_in_a_master_checkpoint_are_those_of_the_plain_model(small_model: Maker, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    plain = small_model().state_dict()
    assert sorted(stored) == sorted(plain)
    assert all(torch.equal(stored[name], plain[name]) for name in plain)


def test_a_checkpoint_with_a_head_loads_into_the_base_model(folder: Path) -> None:
    model = hf.AutoModel.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2Model"
    assert sorted(quant_layers(model))[0] == "layers.0.mlp.down_proj"
    assert len(quant_layers(model)) == 14


def test_a_checkpoint_of_a_base_model_loads_under_a_new_head_that_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    base = qsurgeon.apply("w4a4-mxfp4", hf.BertModel(config))
    base.save_pretrained(tmp_path)
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert sorted(quant_layers(model)) == sorted(f"bert.{name}" for name in quant_layers(base))
    assert type(model.classifier) is torch.nn.Linear


def test_a_sharded_checkpoint_reloads_equal(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-nvfp4", small_model())
    model.save_pretrained(tmp_path, max_shard_size="50kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(qsurgeon.load(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_an_adapter_trained_on_a_wrapped_model_reloads_on_it(folder: Path, tmp_path: Path) -> None:
    model: Any = peft.get_peft_model(qsurgeon.load(folder), peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(qsurgeon.load(folder), tmp_path)
    assert len(quant_layers(again)) == 14
    assert torch.equal(again.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


def test_a_model_with_tied_embeddings_stays_tied(small_model: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", small_model(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_missing_weight_of_a_wrapped_module_is_an_error_and_never_random(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(copy)
    assert str(caught.value) == "the checkpoint has no tensor model.layers.1.mlp.up_proj.weight"


def test_a_record_that_names_a_module_the_model_lacks_is_an_error(copy: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["quantization_config"]["rules"][0]["modules"][0] = "model.layers.9.mlp.up_proj"

    edit_config(copy, rename)
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(copy)
    assert str(caught.value) == (
        "Qwen2ForCausalLM has model.layers.0.self_attn.k_proj but no model.layers.9.mlp.up_proj, "
        "which config.json wraps"
    )


def test_a_record_none_of_whose_modules_is_there_is_an_error(copy: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["quantization_config"]["rules"][0]["modules"] = ["a.b"]

    edit_config(copy, rename)
    with pytest.raises(NothingWrappedError) as caught:
        qsurgeon.load(copy)
    assert str(caught.value) == "Qwen2ForCausalLM has none of the 1 modules that config.json wraps, such as a.b"


def test_an_unknown_key_in_the_record_is_an_error(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"].update(surprise=1))
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(copy)
    assert str(caught.value) == "config.json: quantization_config.surprise: unknown key"


def test_a_format_that_cannot_be_is_an_error(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"]["formats"]["mxfp4"].update(element="e2m9"))
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(copy)
    assert str(caught.value) == ("quantization_config: no element 'e2m9'; did you mean 'e2m3'?")


def test_the_record_goes_through_the_config_unchanged(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert QSurgeonConfig(**data).to_dict() == data
    assert hf.AutoConfig.from_pretrained(folder).quantization_config == data


def test_a_live_model_has_a_tag_for_its_model_card(small_model: Maker) -> None:
    assert qsurgeon.apply("w4a4-mxfp4", small_model()).model_tags == ["qsurgeon"]


def test_without_qsurgeon_transformers_warns_and_computes_in_full_precision(folder: Path) -> None:
    # The reason for qsurgeon.load: this is transformers' behaviour, and nothing in a master checkpoint can stop it.
    code = f"""
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Linear\n"
    assert "Unknown quantization type, got qsurgeon" in done.stderr


def test_loading_is_quiet(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        qsurgeon.load(folder)
    assert [record.getMessage() for record in caplog.records if "qsurgeon" in record.getMessage()] == []


def test_load_takes_the_class_that_the_config_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    qsurgeon.apply("w4a4-mxfp4", hf.BertForSequenceClassification(config)).save_pretrained(tmp_path)
    assert type(qsurgeon.load(tmp_path)).__name__ == "BertForSequenceClassification"


def test_an_adapter_whose_base_is_not_wrapped_is_refused(plain_folder: Path, tmp_path: Path) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(plain_folder)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    qsurgeon.apply("w4a4-mxfp4", model)
    model.save_pretrained(tmp_path)
    with pytest.raises(NothingWrappedError) as caught:
        qsurgeon.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: an adapter, and no module of its base {plain_folder} is wrapped. An adapter does not carry a "
        f"recipe: write the base first (qsurgeon apply RECIPE --model {plain_folder} --output FOLDER) and train the "
        "adapter on that"
    )


def test_a_layer_that_peft_saves_whole_is_an_adapter_and_the_one_it_stands_for_is_wrapped(small_model: Maker) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = qsurgeon.apply("w4a4-mxfp4", peft.get_peft_model(small_model(), config))
    down = [name for name in quant_layers(model) if "down_proj" in name]
    assert [name.split(".")[-1] for name in down] == ["original_module"] * 2
    rows = {row.module: row.why for row in qsurgeon.inspect(model).rows}
    assert rows["model.layers.0.mlp.down_proj"] == "rule 'linears'"
    assert rows["model.layers.0.mlp.down_proj.modules_to_save.default"] == "adapter of peft: stays in full precision"


@pytest.mark.parametrize(
    "wrap",
    [torch.nn.DataParallel, functools.partial(torch.compile, backend="eager")],
    ids=["DataParallel", "compile"],
)
def test_what_is_put_around_a_model_does_not_change_its_record(small_model: Maker, wrap: Any) -> None:
    model = small_model()
    qsurgeon.apply("w4a4-mxfp4", wrap(model))
    assert model.config.quantization_config.record.rules[0].modules[0] == "model.layers.0.self_attn.q_proj"


def test_a_model_that_something_else_quantized_is_refused_before_anything_changes(small_model: Maker) -> None:
    model = small_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", model)
    assert str(caught.value) == "the model is quantized already, by gptq; expected one in full precision"
    assert quant_layers(model) == {}


def test_plan_and_inspect_refuse_what_something_else_quantized(plain_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain_folder, tmp_path / "gptq"))
    edit_config(folder, lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    for ask in (lambda: qsurgeon.plan("w4a4-mxfp4", folder), lambda: qsurgeon.inspect(folder)):
        with pytest.raises(CheckpointError) as caught:
            ask()
        assert str(caught.value) == f"{folder} is quantized already, by gptq; expected a checkpoint in full precision"


def test_plan_refuses_a_folder_that_was_rewritten(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.plan("w4a4-mxfp4", folder)
    assert str(caught.value).startswith(
        f"{folder} was rewritten by qsurgeon already; apply the recipe to the model it came from. If it was trained"
    )


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"hidden_act": "nope"}, {"hidden_size": -8}], ids=str)
def test_a_config_that_describes_no_model_is_an_error_and_no_traceback(
    plain_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(plain_folder, tmp_path / "odd"))
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=r"its config describes no model that can be built: |no model at "):
        qsurgeon.plan("w4a4-mxfp4", folder)


def test_inspect_with_an_example_finds_the_layers_whose_parent_computes_past_them(small_model: Maker) -> None:
    mamba = hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, state_size=16, time_step_rank=8)
    ).eval()
    dt_proj = mamba.get_submodule("backbone.layers.0.mixer.dt_proj")
    how = Quantization(get_format("mxfp4"), None)
    operate(mamba, {"backbone.layers.0.mixer.dt_proj": how, "backbone.layers.0.mixer.x_proj": how})  # without a plan
    assert type(dt_proj) is QuantLinear
    report = qsurgeon.inspect(mamba, {"input_ids": TOKENS})
    past = ["dt_proj"] if at_least("transformers", "5.16") else []  # before, its mixer calls it on a CPU
    assert [row.module.split(".")[-1] for row in report.rows if row.called is False] == past
    assert report.summary.endswith("; 1 of them were never called") == bool(past)
    whole = qsurgeon.inspect(qsurgeon.apply("w4a4-mxfp4", small_model()), {"input_ids": TOKENS})
    assert [row.called for row in whole.rows].count(True) == 14
    assert [row.called for row in whole.rows].count(False) == 0


def test_formats_with_every_kind_of_field_come_back_to_the_bit(small_model: Maker, tmp_path: Path) -> None:
    formats = {
        "turned": FormatSpec(like="mxfp4", hadamard=32, seed=11),
        "square": FormatSpec(like="nvfp4", block=[16, 16], four_over_six=True),
        "dither": FormatSpec(like="mxfp8", rounding="stochastic", seed=5),
    }
    rules = (
        Rule(target=("gate_proj",), weight="turned", input="turned"),
        Rule(target=("self_attn",), weight="square", input="dither"),
        Rule(target=("down_proj",), weight="fp8_e4m3_128x128", input="int8"),
        Rule(target=("up_proj",), weight="int4_b32"),
    )
    model = qsurgeon.apply(Recipe(version=1, formats=formats, rules=rules), small_model())
    model.save_pretrained(tmp_path)
    loaded = qsurgeon.load(tmp_path)
    layers = quant_layers(loaded)
    assert {path: layer.quantization for path, layer in layers.items()} == {
        path: layer.quantization for path, layer in quant_layers(model).items()
    }
    assert layers["model.layers.0.mlp.gate_proj"].quantization.rotation == Rotation(32, 11)
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    loaded(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
