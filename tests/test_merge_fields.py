"""Each field of a LoraConfig: what merging does with it is what peft does, or it is refused by name before any work."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import qsurgeon
from qsurgeon.errors import CheckpointError, SurgeryError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOKENS = torch.arange(1, 13).reshape(2, 6)
Q, O = "self_attn.q_proj", "self_attn.o_proj"  # noqa: E741

Maker = Callable[..., Any]

# Fields that say where an adapter came from, or how it is made and trained, and change nothing once it is.
NO_MATTER = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "qalora_group_size", "layers_pattern",
}  # fmt: skip
MERGED: dict[str, list[Any]] = {
    "r": [2],
    "lora_alpha": [3],
    "lora_dropout": [0.5],
    "use_rslora": [True],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 32}],
    "target_modules": [["q_proj", "embed_tokens"], "all-linear", ["lm_head"]],
    "exclude_modules": [["layers.0.self_attn.q_proj"]],
    "layers_to_transform": [[1]],
    "init_lora_weights": [False, "gaussian", "olora", "pissa", "orthogonal"],
    "modules_to_save": [["norm"]],
    "trainable_token_indices": [[1, 2]],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "ensure_weight_tying": [True],
    "use_qalora": [True],  # of a GPTQ layer alone
}
REFUSED: dict[str, list[Any]] = {
    "bias": ["all", "lora_only"],
    "use_dora": [True],
    "target_parameters": [["self_attn.q_proj.weight"]],
    "layer_replication": [[[0, 2]]],
    "alora_invocation_tokens": [[3]],
    "kasa_config": [peft.tuners.lora.config.KasaConfig()],
    "velora_config": [peft.tuners.lora.config.VeloraConfig()],
    "monteclora_config": [peft.tuners.lora.config.MontecloraConfig()],
}
# Refused by what the adapter's config says, whatever is in it.
BY_CONFIG: dict[str, Any] = {"arrow_config": {"top_k": 3}, "use_bdlora": {"nblocks": 2}}


def test_every_field_of_peft_has_its_place() -> None:
    assert {one.name for one in dataclasses.fields(peft.LoraConfig)} == NO_MATTER | {*MERGED, *REFUSED, *BY_CONFIG}


@pytest.fixture(scope="module")
def bases(small_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder: Path = tmp_path_factory.mktemp("fields")
    small_model().save_pretrained(folder / "plain")
    qsurgeon.rewrite("w4a4-mxfp4", folder / "plain", folder / "master")
    qsurgeon.rewrite("w4a4-mxfp4-packed", folder / "plain", folder / "packed")
    return {"master": folder / "master", "packed": folder / "packed"}


@pytest.fixture(params=["master", "packed"])
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    return bases[request.param]


def adapter_of(base: Path, folder: Path, **fields: Any) -> None:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields})
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(qsurgeon.load(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("field", "value"), [(field, one) for field, values in MERGED.items() for one in values], ids=str
)
def test_a_field_is_merged_as_peft_merges_it(base: Path, tmp_path: Path, field: str, value: Any) -> None:
    if base.name == "packed" and value in ("olora", "pissa", "orthogonal"):
        pytest.skip("what begins with the values of a weight is not put on a packed one")
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter_of(base, adapter, **{field: value})
    qsurgeon.merge(adapter, out, base)
    merged = logits(qsurgeon.load(out))
    trained = logits(peft.PeftModel.from_pretrained(qsurgeon.load(base), adapter))
    assert not torch.equal(merged, logits(qsurgeon.load(base)))
    if base.name == "master":
        by_hand = peft.PeftModel.from_pretrained(qsurgeon.load(base), adapter).merge_and_unload()
        torch.testing.assert_close(merged, logits(by_hand), rtol=1e-5, atol=1e-6)
    # What rounding the sum changes is small beside what the adapter does.
    assert (merged - trained).abs().mean() < (trained - logits(qsurgeon.load(base))).abs().mean()


@pytest.mark.parametrize(
    ("field", "value"), [(field, one) for field, values in REFUSED.items() for one in values], ids=str
)
def test_a_field_that_cannot_be_merged_is_refused_by_name(base: Path, tmp_path: Path, field: str, value: Any) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    fields = {field: value, **({"target_modules": []} if field == "target_parameters" else {})}
    with pytest.raises((CheckpointError, SurgeryError)) as caught:
        _ = adapter_of(base, adapter, **fields), qsurgeon.merge(adapter, out, base)  # type: ignore[func-returns-value]
    assert Q in str(caught.value) or f"has {field}={value!r}, which cannot be merged" in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("field", BY_CONFIG)
def test_a_field_that_is_not_known_to_be_a_sum_is_refused(bases: dict[str, Path], tmp_path: Path, field: str) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter_of(bases["master"], adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: BY_CONFIG[field]}))
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.merge(adapter, out, bases["master"])
    assert str(caught.value) == f"{adapter}: has {field}={BY_CONFIG[field]!r}, which cannot be merged; expected None"
    assert not out.exists()


def test_a_bias_without_a_place_is_refused_before_any_work(base: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter_of(base, adapter, target_modules=["q_proj", "o_proj"], lora_bias=True)
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.merge(adapter, out, base)
    assert str(caught.value) == (
        f"model.layers.0.{O}: its adapter has a bias (lora_bias=True), and the layer has none that it could be added "
        "to; train without lora_bias, or on modules that have a bias"
    )
    assert not out.exists()
