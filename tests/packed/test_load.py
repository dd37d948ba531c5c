"""Packed weights that transformers loads: a packed folder, or a plain one that is packed on the way."""

import functools
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import CheckpointError, SurgeryError
from qsurgeon.hf.quantizer import QSurgeonConfig
from qsurgeon.layers import PackedLayer, pack, packed_layers
from qsurgeon.recipe import Recipe

TOKENS = torch.arange(1, 13).reshape(2, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q = "model.layers.0.self_attn.q_proj"
# What a GPU's memory would not hold; on this CPU the first layer is on the disk.
SPLIT = {
    "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip

Maker = Callable[..., Any]
MakeRecipe = Callable[..., Recipe]
Logits = Callable[[Any], Tensor]
Different = Callable[[nn.Module, nn.Module], list[str]]


def test_it_reloads_to_the_bit(
    folder: Path, small_model: Maker, recipe: MakeRecipe, logits: Logits, different: Different
) -> None:
    expected = qsurgeon.apply(recipe(), small_model())
    for model in (qsurgeon.load(folder), hf.AutoModelForCausalLM.from_pretrained(folder)):
        assert len(packed_layers(model)) == 11
        assert different(model, expected) == []
        assert torch.equal(logits(model), logits(expected))
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        assert frozen == {f"{name}.{key}" for name, layer in packed_layers(model).items() for key in layer.stored}


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", SPLIT], ids=["none", "cpu", "auto", "disk"])
@pytest.mark.parametrize("dtype", ["auto", None, *DTYPES], ids=str)
def test_it_loads_anywhere_and_in_any_dtype(
    plain_folder: Path, folder: Path, recipe: MakeRecipe, logits: Logits, tmp_path: Path, device_map: Any, dtype: Any
) -> None:
    asked = torch.float32 if dtype in ("auto", None) else dtype
    # The codes are of the float32 weight, whatever the rest is loaded as.
    expected = hf.AutoModelForCausalLM.from_pretrained(plain_folder, dtype=asked)
    codes = load_file(folder / "model.safetensors")
    for name, layer in packed_layers(qsurgeon.apply(recipe(), expected)).items():
        for key, one in layer.stored.items():
            one.copy_(codes[f"{name}.{key}"])
    options = {"offload_folder": tmp_path} if isinstance(device_map, dict) else {}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=dtype, **options)
    assert {layer.compute_dtype for layer in packed_layers(model).values()} == {asked}
    assert torch.equal(logits(model), logits(expected))


def test_it_can_be_offloaded_to_a_cpu(folder: Path, logits: Logits) -> None:
    model = qsurgeon.load(folder)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_submodule(Q).weight.is_meta
    assert torch.equal(logits(model), expected)


def test_its_base_model_loads_without_the_head(folder: Path) -> None:
    base = hf.AutoModel.from_pretrained(folder)
    assert len(packed_layers(base)) == 11
    whole = qsurgeon.load(folder)
    assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_a_base_model_s_folder_loads_under_a_new_head(small_model: Maker, recipe: MakeRecipe, tmp_path: Path) -> None:
    base = qsurgeon.apply(recipe(), small_model().model)
    base.save_pretrained(tmp_path)
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert len(packed_layers(model)) == 11
    assert type(model.score) is nn.Linear
    assert model.score.weight.dtype == torch.float32
    assert torch.equal(model.model(TOKENS).last_hidden_state, base(TOKENS).last_hidden_state)


def change(folder: Path, name: str, make: Callable[[Tensor], Tensor | None]) -> None:
    """Put what ``make`` returns in place of a tensor, or nothing."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    made = make(tensors.pop(name))
    save_file(tensors if made is None else {**tensors, name: made}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("device_map", [None, SPLIT], ids=["none", "disk"])
@pytest.mark.parametrize("key", ["weight", "weight_scale", "weight_tensor_scale", "bias"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "the checkpoint has no tensor {}"),
        (lambda one: one[..., :-1].contiguous(), "{} has shape {}; the packed layer takes {}"),
        (
            lambda one: one.to(torch.uint8 if one.is_floating_point() else torch.float32),
            "{} is {}; the packed layer takes {}",
        ),
        (lambda one: one.to(torch.int8) if one.dtype == torch.uint8 else one.to(torch.int32), "{} is {}; the packed"),
    ],
    ids=["missing", "misshapen", "another dtype", "signed"],
)
def test_a_tensor_that_is_missing_or_of_another_kind_is_named(
    copy: Path, tmp_path: Path, key: str, make: Any, message: str, device_map: Any
) -> None:
    name = f"{Q}.{key}"
    change(copy, name, make)
    options = {"offload_folder": tmp_path / "offload"} if device_map else {}
    for load in (qsurgeon.load, hf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            load(copy, device_map=device_map, **options)
        assert str(caught.value).startswith(message.split("{}", maxsplit=1)[0] + name)
        assert all(part in str(caught.value) for part in message.split("{}"))


def test_a_record_that_a_packed_weight_cannot_follow_is_refused(copy: Path) -> None:
    file = copy / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["rules"][0]["phases"] = "rollout"
    file.write_text(json.dumps(config))
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.load(copy)
    assert str(caught.value) == (
        f"{copy}: {Q} cannot be wrapped: a packed weight is rounded in every phase, not in rollout only"
    )


def test_without_qsurgeon_a_packed_folder_does_not_load(folder: Path) -> None:
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()


# --- packed on the way


def config_of(model: Any) -> QSurgeonConfig:
    config: QSurgeonConfig = model.config.quantization_config
    return config


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plain_checkpoint_is_packed_while_it_loads(
    plain_folder: Path, recipe: MakeRecipe, logits: Logits, different: Different, tmp_path: Path, dtype: torch.dtype
) -> None:
    load = functools.partial(hf.AutoModelForCausalLM.from_pretrained, plain_folder, dtype=dtype)
    expected = qsurgeon.apply(recipe(), load())
    model = load(quantization_config=config_of(expected))
    assert different(model, expected) == []
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path)
    assert different(qsurgeon.load(tmp_path, dtype=dtype), expected) == []


def test_what_stays_on_a_disk_is_not_packed_on_the_way(plain_folder: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf.AutoModelForCausalLM.from_pretrained(
            plain_folder,
            device_map=SPLIT,
            offload_folder=tmp_path,
            quantization_config=config_of(qsurgeon.load(folder)),
        )
    assert str(caught.value) == (
        "a weight that is offloaded to disk is not packed on the way: write a packed checkpoint first (qsurgeon "
        "apply), and load that"
    )


@pytest.mark.parametrize("make", [lambda _: None, lambda one: one[..., :-1].contiguous()], ids=["missing", "misshapen"])
def test_a_plain_checkpoint_that_does_not_fit_is_not_packed(
    plain_folder: Path, folder: Path, tmp_path: Path, make: Any
) -> None:
    copy = Path(shutil.copytree(plain_folder, tmp_path / "copy"))
    change(copy, f"{Q}.weight", make)
    with pytest.raises((CheckpointError, RuntimeError), match=r"q_proj|conver"):
        hf.AutoModelForCausalLM.from_pretrained(copy, quantization_config=config_of(qsurgeon.load(folder)))


def test_packing_on_the_way_holds_one_weight_at_a_time(
    plain_folder: Path, folder: Path, different: Different, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def counted(layer: PackedLayer, weight: Tensor) -> dict[str, Tensor]:
        alive.append(sum(one() is not None for one in read))
        read.append(weakref.ref(weight))
        return pack(weight, layer.quantization)

    monkeypatch.setattr(PackedLayer, "packed", counted)
    config = config_of(qsurgeon.load(folder))
    model = hf.AutoModelForCausalLM.from_pretrained(plain_folder, device_map="auto", quantization_config=config)
    assert different(model, qsurgeon.load(folder)) == []
    assert len(alive) == 11
    assert max(alive) == 0
