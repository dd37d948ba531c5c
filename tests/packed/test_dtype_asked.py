"""Models of transformers whose code asks a weight for its dtype: packed, live and reloaded, they are what master is.

Which they are is read from the source of transformers, and their configs are made small by what the names say.
"""

import importlib
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import models
from versions import at_least

import qsurgeon
from qsurgeon.errors import PlanError
from qsurgeon.layers import packed_layers
from qsurgeon.layers.codes import plain
from qsurgeon.recipe import Recipe

# The first parameter of a module, or the weight of what is called like a Linear.
ASKS = re.compile(
    r"next\(self(\.\w+)+\.parameters\(\)\)\.dtype|\.(wo|fc\d|lm_head|proj|\w+_proj|proj_?\w+|\w*linear\w*|\w+_head)"
    r"\.weight\.dtype"
)
KEEPS = re.compile(r"_keep_in_fp32_modules(_strict)? = \[.*(\"wo\"|proj)")
FILES = sorted(Path(models.__file__).parent.glob("*/modeling_*.py"))
SMALL = (
    (r"layers?$|blocks$|depths?$", 1), (r"heads(_|$)|n_head", 2), (r"head_dim|d_kv|head_size", 16),
    (r"vocab_size|n_words", 100), (r"num_experts$|num_local_experts|n_routed_experts", 4),
    (r"image_size|input_size$", 32),
    (r"max_position|max_source|max_target|n_positions", 64),
    (r"hidden_size|d_model|dim$|intermediate_size|_dim(_|$)|ffn|n_embd|d_ff|width|channels?$|proj_size", 32),
)  # fmt: skip
# They name layers that a small model has not; and say what is made anew.
LEFT = {"layer_types", "mlp_layer_types", "out_features", "out_indices", "stage_names", "architectures"}
MOST = 1_000_000  # parameters
MIXERS = {"falcon_mamba", "mamba"}  # whose weights, until transformers 5.16, another function multiplied with


def asking(pattern: re.Pattern[str]) -> list[str]:
    return [f"{one.parent.name}.{one.stem}" for one in FILES if pattern.search(one.read_text())]


def small(value: Any, key: str = "") -> Any:
    """Return a config with fewer layers, and narrower ones."""
    if isinstance(value, dict):
        return {name: small(one, name) for name, one in value.items() if name not in LEFT}
    if isinstance(value, list | tuple) and key in ("depths", "num_heads"):
        return [small(one, key) for one in value[:2]]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if "token_id" in key or key.endswith("_token_index"):
        return min(value, 90)
    return next((min(value, size) for name, size in SMALL if re.search(name, key)), value)


def made(module: str) -> tuple[Any, Any] | None:
    """Return a model class of a module and a small config of it; None if none of them can be built so."""
    found = importlib.import_module(f"transformers.models.{module}")
    for kind in (getattr(found, name) for name in getattr(found, "__all__", ())):
        if not issubclass(kind, hf.PreTrainedModel) or "from_pretrained" in vars(kind) or not kind.config_class:
            continue
        try:
            data = kind.config_class().to_dict()
            config = kind.config_class(**{key: small(one, key) for key, one in data.items() if key not in LEFT})
            with torch.device("meta"):
                model = kind._from_config(config)
        except (ValueError, TypeError, RuntimeError, ImportError, LookupError, AttributeError, StrictDataclassError):
            continue
        linears = sum(type(one) is nn.Linear for one in model.modules())
        if linears > 1 and sum(one.numel() for one in model.parameters()) < MOST:
            return kind, config
    return None


def inputs(model: Any) -> Iterator[dict[str, Any]]:
    tokens = torch.arange(3, 11)[None]
    if model.main_input_name == "input_ids":
        yield {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}
    if model.main_input_name == "pixel_values":
        yield {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}


def computed(model: Any) -> list[torch.Tensor]:
    """Return what a model computes of what it takes alone; nothing if it takes more."""
    for given in inputs(model):
        try:
            with torch.no_grad():
                return [one for one in model(**given).to_tuple() if isinstance(one, torch.Tensor)]
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError):
            pass
    return []


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: plain(one) for name, one in (*model.named_parameters(), *model.named_buffers())}


def assert_alike(one: Any, other: Any) -> None:
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype] == []
    assert [name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())] == []
    computing = [{name: layer.compute_dtype for name, layer in packed_layers(model).items()} for model in (one, other)]
    assert computing[0] == computing[1]
    assert one.dtype == other.dtype


def recipe(storage: str) -> Recipe:
    rule = {"target": ["**"], "exclude": ["lm_head?", "dt_proj?", "router?"], "weight": "mxfp4", "input": "mxfp4"}
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": [rule]})


@pytest.mark.filterwarnings("ignore")  # of what a model that is made so small lacks
def test_they_are_what_their_masters_are_live_and_reloaded(tmp_path: Path) -> None:
    built, ran = list[str](), list[str]()
    for module in asking(ASKS):
        found = made(module)
        if found is None:
            continue
        kind, config = found
        torch.manual_seed(0)
        model = kind._from_config(config).eval()
        master = qsurgeon.apply(recipe("master"), deepcopy(model))
        if module.partition(".")[0] in MIXERS and not at_least("transformers", "5.16"):
            with pytest.raises(PlanError, match=r"Mixer\.cuda_kernels_forward takes the weight itself and computes"):
                qsurgeon.apply(recipe("packed"), model)
            continue
        qsurgeon.apply(recipe("packed"), model).save_pretrained(tmp_path)
        again = kind.from_pretrained(tmp_path).eval()
        assert_alike(model, again)
        built.append(module)
        values = computed(master)
        for one in (model, again) if values else ():
            ran.append(module)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(computed(one), values, strict=True))
    assert len(built) > 20
    assert len(set(ran)) > 15, (len(built), len(set(ran)))
    assert {one.partition(".")[0] for one in built} >= {"swinv2", "swin2sr", "t5", "sam3"}


@pytest.mark.filterwarnings("ignore")
def test_layers_that_a_class_keeps_in_float32_compute_in_it_reloaded(tmp_path: Path) -> None:
    kept = set[str]()
    for module in asking(KEEPS):
        found = made(module)
        if found is None:
            continue
        kind, config = found
        kind._from_config(config).save_pretrained(tmp_path / "plain")
        model = kind.from_pretrained(tmp_path / "plain", dtype=torch.float16)
        qsurgeon.apply(recipe("packed"), model).save_pretrained(tmp_path / "packed")
        assert_alike(model, kind.from_pretrained(tmp_path / "packed", dtype=torch.float16))
        packing = {"dtype": torch.float16, "quantization_config": model.config.quantization_config}
        assert_alike(model, kind.from_pretrained(tmp_path / "plain", **packing))
        kept |= {module for layer in packed_layers(model).values() if layer.compute_dtype == torch.float32}
    keeping = {"t5", "glm_moe_dsa", "deepseek_v32"} & {one.parent.name for one in FILES}  # 5.5 lacks the last
    assert {one.partition(".")[0] for one in kept} >= keeping
    assert len(keeping) >= 2
