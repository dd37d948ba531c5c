import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from qsurgeon.errors import CheckpointError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization
from qsurgeon.layers.kinds import LINEAR
from qsurgeon.reading import MOST_JSON
from qsurgeon.surgery import Module, inventory, operate, plain_model, read_config, skeleton

Make = Callable[..., Any]


def by_name(model: nn.Module) -> dict[str, Module]:
    return {module.name: module for module in inventory(model)}


class OwnLinear(nn.Linear):
    """A subclass may have a forward of its own."""


# --- a live model


def test_a_linear_is_listed_with_its_shape_and_size(tiny_qwen2: Any) -> None:
    assert by_name(tiny_qwen2)["model.layers.1.self_attn.k_proj"] == Module(
        name="model.layers.1.self_attn.k_proj",
        path="model.layers.1.self_attn.k_proj",
        kind="Linear",
        wraps=LINEAR,
        shape=(32, 64),
        parameters=32 * 64 + 32,
        bytes=4 * (32 * 64 + 32),
        tied_weight="",
        adapter=False,
        weight_bytes=4 * 32 * 64,
        types=("Linear",),
    )


def test_modules_are_listed_in_the_models_order_without_the_root(tiny_qwen2: Any) -> None:
    assert [module.name for module in inventory(tiny_qwen2)] == [name for name, _ in tiny_qwen2.named_modules() if name]


def test_a_module_that_only_holds_others_has_no_parameters(tiny_qwen2: Any) -> None:
    layer = by_name(tiny_qwen2)["model.layers.0"]
    assert (layer.kind, layer.type, layer.shape, layer.parameters) == ("Qwen2DecoderLayer", "", (), 0)


def test_a_tied_weight_belongs_to_the_module_that_has_it_first(tiny_qwen2: Any) -> None:
    head = by_name(tiny_qwen2)["lm_head"]
    assert (head.shape, head.parameters, head.tied_to) == ((96, 64), 0, "model.embed_tokens")


def test_a_weight_of_its_own_is_tied_to_none(make_qwen2: Make) -> None:
    head = by_name(make_qwen2(tie_word_embeddings=False))["lm_head"]
    assert (head.parameters, head.tied_to) == (96 * 64, None)


@pytest.mark.parametrize("tied", [True, False])
def test_all_parameters_are_counted_once(make_qwen2: Make, tied: bool) -> None:
    model = make_qwen2(tie_word_embeddings=tied)
    assert sum(module.parameters for module in inventory(model)) == model.num_parameters()


def test_bytes_are_of_the_models_own_dtype(tiny_qwen2: Any) -> None:
    tiny_qwen2.to(torch.bfloat16)
    assert by_name(tiny_qwen2)["model.embed_tokens"].bytes == 2 * 96 * 64


def test_a_subclass_of_linear_is_not_linear() -> None:
    assert by_name(nn.Sequential(OwnLinear(4, 4)))["0"].wraps is None


def test_a_wrapped_linear_is_still_linear(tiny_qwen2: Any) -> None:
    operate(tiny_qwen2, {"model.layers.0.mlp.up_proj": Quantization(get_format("mxfp4"), None)})
    module = by_name(tiny_qwen2)["model.layers.0.mlp.up_proj"]
    assert (module.kind, module.type) == ("QuantLinear", "Linear")


def test_a_module_without_a_weight_has_the_shape_of_its_largest_parameter() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2))
            self.gate_up = nn.Parameter(torch.zeros(2, 8, 4))

    assert by_name(nn.Sequential(Experts()))["0"].shape == (2, 8, 4)


# --- inside wrappers


def test_peft_does_not_change_the_name_of_a_linear(tiny_qwen2: Any) -> None:
    module = by_name(with_lora(tiny_qwen2))["model.layers.0.self_attn.q_proj"]
    assert (module.path, module.kind, module.adapter) == (
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer",
        "Linear",
        False,
    )


def test_what_peft_added_is_an_adapter(tiny_qwen2: Any) -> None:
    adapters = {module.name for module in inventory(with_lora(tiny_qwen2)) if module.adapter and module.wraps}
    assert adapters == {
        f"model.layers.{layer}.self_attn.q_proj.lora_{matrix}.default" for layer in range(3) for matrix in "AB"
    }


def test_the_linears_inside_peft_are_those_of_the_plain_model(make_qwen2: Make) -> None:
    plain = [module.name for module in inventory(make_qwen2()) if module.type]
    inside = [module.name for module in inventory(with_lora(make_qwen2())) if module.type]
    assert inside == plain


def test_the_plain_model_is_found_inside_peft(tiny_qwen2: Any) -> None:
    assert plain_model(with_lora(tiny_qwen2)) == ("base_model.model", tiny_qwen2)


def test_a_plain_model_is_its_own(tiny_qwen2: Any) -> None:
    assert plain_model(tiny_qwen2) == ("", tiny_qwen2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
def test_compiling_does_not_change_the_name_of_a_linear(tiny_qwen2: Any) -> None:
    module = by_name(torch.compile(tiny_qwen2))["model.layers.0.self_attn.q_proj"]  # type: ignore[arg-type]
    assert module.path == "_orig_mod.model.layers.0.self_attn.q_proj"


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


# --- from a config alone


def test_a_skeleton_has_the_modules_of_the_live_model(make_qwen2: Make, qwen2_config: Make) -> None:
    assert inventory(skeleton(qwen2_config())) == inventory(make_qwen2())


def test_a_skeleton_holds_no_data(qwen2_config: Make) -> None:
    assert {parameter.device.type for parameter in skeleton(qwen2_config()).parameters()} == {"meta"}


def test_a_skeleton_has_the_dtype_of_its_config(qwen2_config: Make) -> None:
    assert {parameter.dtype for parameter in skeleton(qwen2_config(dtype="bfloat16")).parameters()} == {torch.bfloat16}


def test_a_config_without_architectures_is_the_base_model(qwen2_config: Make) -> None:
    assert type(skeleton(qwen2_config(architectures=None))).__name__ == "Qwen2Model"


def test_an_unknown_architecture_is_an_error(qwen2_config: Make) -> None:
    with pytest.raises(CheckpointError) as caught:
        skeleton(qwen2_config(architectures=["QuantumForCausalLM"]))
    assert str(caught.value).startswith(
        f"transformers {transformers.__version__} has no architecture 'QuantumForCausalLM'; the nearest it has: '"
    )


def test_a_folder_is_read_by_its_config(tiny_folder: Path) -> None:
    assert read_config(tiny_folder).architectures == ["Qwen2ForCausalLM"]


def test_a_config_file_is_read(tiny_folder: Path) -> None:
    assert read_config(tiny_folder / "config.json").architectures == ["Qwen2ForCausalLM"]


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == f"{tmp_path} has no config.json; expected a model's folder"


def test_a_file_that_is_no_config_is_an_error(tiny_folder: Path) -> None:
    file = tiny_folder / "model.safetensors"
    with pytest.raises(CheckpointError) as caught:
        read_config(file)
    assert str(caught.value) == f"{file} is a file; expected a model's folder, a config.json or a hub id"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path / "nowhere")
    assert str(caught.value) == f"{tmp_path / 'nowhere'}: no such folder"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("{", "{folder}/config.json: is not JSON: ", id="not-json"),
        pytest.param("[]", "{folder}/config.json: expected a JSON object, got list", id="a-list"),
        pytest.param('{"a": ' * 100_000, "{folder}/config.json: is nested too deep", id="deep"),
        pytest.param(
            '{"model_type": "qwen2", "model_type": "bert"}',
            "{folder}/config.json: key 'model_type' appears twice",
            id="two-model-types",
        ),
        pytest.param("{}", "{folder}: its config.json has no model_type; expected the config of ", id="no-model-type"),
        pytest.param(
            '{"model_type": "qwem2"}',
            "{folder}: transformers {version} has no model type 'qwem2'; the nearest it has: 'qwen2', ",
            id="unknown-model-type",
        ),
        pytest.param(
            '{"model_type": ["qwen2"]}',
            "{folder}: transformers {version} has no model type '['qwen2']'; the nearest it has: 'qwen2'",
            id="list-of-model-types",
        ),
        pytest.param(
            '{"model_type": "qwen2", "hidden_size": "wide"}', "no model at '{folder}': ", id="text-for-a-number"
        ),
    ],
)
def test_a_config_that_transformers_cannot_read_is_an_error_that_names_it(
    tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(expected.format(folder=tmp_path, version=transformers.__version__))


def test_a_config_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(100 * MOST_JSON)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == f"{tmp_path}/config.json: cannot be read: it has more than 33,554,432 bytes"


def test_an_architecture_that_is_no_model_is_an_error(tmp_path: Path, qwen2_config: Make) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**qwen2_config().to_dict(), "architectures": ["AutoConfig"]}))
    with pytest.raises(CheckpointError) as caught:
        skeleton(read_config(tmp_path))
    assert str(caught.value).startswith(f"transformers {transformers.__version__} has no architecture 'AutoConfig'")


def test_an_architecture_of_another_config_is_an_error(qwen2_config: Make) -> None:
    with pytest.raises(CheckpointError) as caught:
        skeleton(qwen2_config(architectures=["BertModel"]))
    assert str(caught.value) == "architecture 'BertModel' does not go with a Qwen2Config"
