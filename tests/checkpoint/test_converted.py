"""Checkpoints whose layout is not the model's: split, joined, permuted and renamed weights, packed and not."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import conversion_mapping, modeling_utils
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from versions import at_least, needs

import qsurgeon
from qsurgeon.checkpoint import Options, rewrite
from qsurgeon.checkpoint.kept import keeping, kept_names, packed_names, past
from qsurgeon.checkpoint.writing import stream
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, packed_layers, quant_layers
from qsurgeon.recipe import Recipe
from qsurgeon.surgery import operate

_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
_TEXT = {"vocab_size": 96, **_TINY}
_IMAGE = {"image_size": 32, "patch_size": 8}
_EXPERTS = {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "pad_token_id": 0,
}  # fmt: skip
_KIMI = {
    "vision_config": {
        **_TINY, "model_type": "kimi_k25_vision", "patch_size": 8, "pos_emb_height": 4, "pos_emb_width": 4,
    },
    "text_config": {**_TEXT, **_EXPERTS},
    "projection_hidden_size": 64, "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}  # fmt: skip
_TOKENS = {"input_ids": torch.arange(1, 13).reshape(2, 6)}
_PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}

# class: (model type, config, what goes in, what one tensor of the checkpoint is split into)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], str]] = {
    "NomicBertForMaskedLM": ("nomic_bert", _TEXT, _TOKENS, "self_attn.{q,k,v}_proj"),
    "GteForMaskedLM": ("gte", _TEXT, _TOKENS, "mlp.{up,gate}_proj"),
    "JinaEmbeddingsV3ForMaskedLM": ("jina_embeddings_v3", {**_TEXT, "pad_token_id": 0}, _TOKENS, "q_proj"),
    "HrmTextForCausalLM": (
        "hrm_text", {**_TEXT, "num_layers_per_stack": 2, "num_hidden_layers": 16, "head_dim": 16}, _TOKENS, "q_proj"
    ),
    "Molmo2TextModel": ("molmo2_text", {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}, _TOKENS, "{q,k}_proj"),
    "Sapiens2Model": ("sapiens2", {**_TINY, "image_size": [32, 32], "patch_size": 8}, _PIXELS, "gate_proj"),
    "Kimi_K25ForConditionalGeneration": ("kimi_k25", _KIMI, _TOKENS, "vision_tower.layers.0.attn.{q,v}_proj"),
    "Dinov2Backbone": ("dinov2", {**_TINY, **_IMAGE, "use_swiglu_ffn": True}, _PIXELS, "gate_proj"),
    "ViTForImageClassification": ("vit", {**_TINY, **_IMAGE}, _PIXELS, "q_proj"),
}  # fmt: skip
# Before, transformers did not split the weights of some of them.
IF_PRESENT = "" if at_least("transformers", "5.21") else "?"


def recipe(storage: str, exclude: str = "lm_head?", weight: str = "nvfp4") -> Recipe:
    rule = {"target": ["**"], "exclude": ["lm_head?", "decoder?", exclude], "weight": weight, "input": "mxfp4"}
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": [rule]})


def model_class(name: str) -> Any:
    """Return a class of MODELS; the test is left out where transformers has none such."""
    if not hasattr(hf, name):
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    return getattr(hf, name)


def plain(name: str) -> Any:
    kind, fields, _, _ = MODELS[name]
    model_class(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(hf, name)._from_config(hf.AutoConfig.for_model(kind, **fields)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def folder_of(name: str) -> Path:
        folder: Path = tmp_path_factory.mktemp("converted") / name
        plain(name).save_pretrained(folder)
        return folder

    return folder_of


def outputs(model: Any, name: str) -> list[Tensor]:
    with torch.no_grad():
        found = model(**MODELS[name][2])
    return [one for one in found.to_tuple() if isinstance(one, Tensor)]


def same(model: Any, expected: Any, name: str) -> bool:
    one, other = model.state_dict(), expected.state_dict()
    tensors = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return tensors and all(map(torch.equal, outputs(model, name), outputs(expected, name)))


@pytest.mark.parametrize("part", [False, True], ids=["all", "part"])
@pytest.mark.parametrize("storage", ["master", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_and_what_is_rewritten_opens_as_the_live_model(
    folders: Callable[[str], Path], tmp_path: Path, name: str, storage: str, part: bool
) -> None:
    made = recipe(storage, f"{MODELS[name][3]}{IF_PRESENT}" if part else "lm_head?")
    live = qsurgeon.apply(made, model_class(name).from_pretrained(folders(name)).eval())
    live.save_pretrained(tmp_path / "live")
    assert same(qsurgeon.load(tmp_path / "live"), live, name)
    rewrite(made, folders(name), tmp_path / "written")
    again = qsurgeon.load(tmp_path / "written")
    assert same(again, live, name)
    assert len(packed_layers(again)) == (len(quant_layers(live)) if storage == "packed" else 0)
    again.save_pretrained(tmp_path / "again")
    assert same(qsurgeon.load(tmp_path / "again"), live, name)


@pytest.mark.parametrize("slab", [64, stream.SLAB], ids=["slabs", "whole"])
def test_rows_are_gathered_in_slabs_of_any_size(
    folders: Callable[[str], Path], tmp_path: Path, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "Kimi_K25ForConditionalGeneration"
    monkeypatch.setattr(stream, "SLAB", slab)
    rewrite(recipe("packed"), folders(name), tmp_path / "out", options=Options(max_shard_size="20KB", workers=3))
    live = qsurgeon.apply(recipe("packed"), model_class(name).from_pretrained(folders(name)).eval())
    assert same(qsurgeon.load(tmp_path / "out"), live, name)


def test_a_converted_checkpoint_is_packed_while_it_loads(folders: Callable[[str], Path]) -> None:
    name = "NomicBertForMaskedLM"
    for exclude in ("lm_head?", "q_proj", "k_proj"):
        live = qsurgeon.apply(recipe("packed", exclude), plain(name))
        config = live.config.quantization_config
        loaded = hf.NomicBertForMaskedLM.from_pretrained(folders(name), quantization_config=config)
        assert same(loaded.eval(), live, name)


def test_a_packed_checkpoint_opens_without_its_head(tmp_path: Path) -> None:
    live = qsurgeon.apply(recipe("packed"), plain("NomicBertForMaskedLM"))
    live.save_pretrained(tmp_path)
    base = hf.NomicBertModel.from_pretrained(tmp_path)
    expected = live.nomic_bert.state_dict()
    assert len(packed_layers(base)) > 0
    assert all(torch.equal(one, expected[key]) for key, one in base.state_dict().items() if key in expected)


def test_weights_that_are_not_made_of_rows_are_refused_before_anything_is_written(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = WeightConverter(
        "attn.Wqkv.weight", "self_attn.q_proj.weight", operations=[conversion_mapping.Transpose(0, 1)]
    )
    monkeypatch.setitem(_mappings(), "nomic_bert", [turned])
    source = tmp_path / "source"
    plain("NomicBertForMaskedLM").save_pretrained(source)
    with pytest.raises(CheckpointError) as caught:
        rewrite(recipe("packed"), source, tmp_path / "out")
    assert str(caught.value) == (
        "nomic_bert.layers.0.self_attn.q_proj.weight is made of nomic_bert.layers.0.attn.Wqkv.weight by more than "
        "taking rows: it cannot be packed file by file. Load the model, apply the recipe to it, and save it"
    )
    assert not list(tmp_path.glob("out*"))
    live = qsurgeon.apply(recipe("packed"), hf.NomicBertForMaskedLM.from_pretrained(source).eval())
    live.save_pretrained(tmp_path / "live")
    assert same(qsurgeon.load(tmp_path / "live"), live, "NomicBertForMaskedLM")


@needs("transformers", "5.9", "has no mapping for a class of models, only for a model_type")
def test_a_mapping_that_renames_weights_alone_takes_no_scale_away_from_its_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = WeightRenaming("intermediate.only.weight", "mlp.fc1.weight")
    monkeypatch.setitem(_mappings(), "ViTModel", [alone])
    name = "ViTForImageClassification"
    plain(name).save_pretrained(tmp_path / "source")
    assert any(key.endswith("intermediate.only.weight") for key in load_file(tmp_path / "source" / "model.safetensors"))
    live = qsurgeon.apply(recipe("packed"), plain(name))
    live.save_pretrained(tmp_path / "live")
    rewrite(recipe("packed"), tmp_path / "source", tmp_path / "written")
    names = [load_file(tmp_path / one / "model.safetensors").keys() for one in ("live", "written")]
    assert names[0] == names[1]
    for folder in ("live", "written"):
        assert same(qsurgeon.load(tmp_path / folder), live, name)


def test_a_tensor_that_is_missing_is_an_error_where_others_are_split(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    plain("NomicBertForMaskedLM").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    gone = next(key for key in tensors if key.endswith("Wqkv.weight"))
    save_file({key: one for key, one in tensors.items() if key != gone}, source / "model.safetensors", {"format": "pt"})
    for storage in ("master", "packed"):
        with pytest.raises(CheckpointError) as caught:
            rewrite(recipe(storage), source, tmp_path / "out")
        assert str(caught.value) == "no file has a tensor for nomic_bert.layers.0.self_attn.q_proj.weight"


# --- every mapping of transformers that converts a Linear's weight


def _mappings() -> dict[str, Any]:
    conversion_mapping.get_checkpoint_conversion_mapping("legacy")  # makes it
    found: Any = conversion_mapping._checkpoint_conversion_mapping_cache
    assert isinstance(found, dict)
    return found


def converting() -> Iterator[str]:
    """Yield the model types that have a mapping with a conversion of something else than experts."""
    types: dict[str, None] = {}
    for name, mapping in _mappings().items():
        own = [one for one in mapping if isinstance(one, WeightConverter)]
        if any("expert" not in pattern for one in own for pattern in one.target_patterns):
            kind = getattr(hf, name, None)
            config = getattr(kind, "config_class", None)
            types[getattr(config, "model_type", name)] = None
    yield from (one for one in types if one in hf.CONFIG_MAPPING)


def few_layers(data: dict[str, Any]) -> None:
    for key, value in data.items():
        if isinstance(value, dict):
            few_layers(value)
        elif isinstance(value, int) and ("num" in key or key in ("depth", "n_layer")) and "layers" in key:
            data[key] = min(value, 2)
        elif isinstance(value, list) and key.endswith(("layer_types", "layers_block_type")):
            data[key] = value[:2]


def skeleton_of(model_type: str) -> Any:
    """Return a model of a type, on the meta device; None for one that its default config does not describe."""
    config: Any = hf.CONFIG_MAPPING[model_type]()
    data = config.to_dict()
    few_layers(data)
    with contextlib.suppress(ValueError, StrictDataclassError):  # one that needs all of its layers
        config = type(config).from_dict(data)
    try:
        with torch.device("meta"):
            return hf.AutoModel.from_config(config)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError):
        return None


def free_linears(model: nn.Module) -> list[str]:
    seen: set[int] = set()
    found = []
    for name, one in model.named_modules():
        if type(one) is nn.Linear and id(one.weight) not in seen and "forward" not in vars(one):
            found.append(name)
            seen.add(id(one.weight))
    return found


@pytest.mark.parametrize("model_type", sorted(converting()))
def test_codes_pass_every_conversion_of_transformers_as_they_are(model_type: str) -> None:
    model = skeleton_of(model_type)
    if model is None:
        pytest.skip("its default config describes no model here")
    how = Quantization(get_format("nvfp4"), get_format("mxfp4"))
    operate(model, dict.fromkeys(free_linears(model)[:300], how), untie=True, storage="packed")
    layers = packed_names(model)
    packed = {f"{layer}.{key}" for layer, keys in layers.items() for key in keys}
    state = modeling_utils.remove_tied_weights_from_state_dict(model.state_dict(), model)
    revert = inspect.unwrap(modeling_utils.revert_weight_conversion)
    saved = keeping(revert)(model, dict(state))
    names = {id(one): name for name, one in state.items()}
    assert {names.get(id(one)) for one in saved.values()} >= packed
    transforms = past(
        conversion_mapping.get_model_conversion_mapping(model), kept_names(model, layers), model.base_model_prefix
    )
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    for stored, one in saved.items():
        if names.get(id(one)) in packed:
            found = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            assert found == (names[id(one)], None)


def test_most_mappings_were_tried() -> None:
    assert len(list(converting())) > (25 if at_least("transformers", "5.21") else 2)
