"""What other tools quantized becomes a model that is trained with LoRA, or in full; what is not known is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from exchange_cases import tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import qsurgeon
from qsurgeon.errors import ExchangeError
from qsurgeon.exchange import ImportOptions
from qsurgeon.layers import packed_layers, quant_layers

IDS = torch.arange(1, 9)[None]
LAYER = "model.layers.1.mlp.down_proj"


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def compressed(source: Path, folder: Path, preset: str) -> dict[str, Tensor]:
    """Let compressed-tensors itself quantize the MLPs of a model; return the values that it reads again."""
    scheme = preset_name_to_scheme(preset, ["re:.*mlp.*"])
    assert scheme.weights is not None
    found, values = load_file(source / "model.safetensors"), {}
    for stem in [name.removesuffix(".weight") for name in found if ".mlp." in name]:
        weight = found.pop(f"{stem}.weight").float()
        made = _compressed(weight, scheme)
        values[stem] = made.pop("values")
        found |= {f"{stem}.{key}": one.contiguous() for key, one in made.items()}
    shutil.copytree(source, folder)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    section = {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    write_config(folder, {**config_of(source), "quantization_config": section})
    return values


def _compressed(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    assert scheme.weights is not None
    size = int(scheme.weights.group_size or weight.shape[1])
    tops = weight.unflatten(1, (-1, size)).abs().amax(2)
    state: dict[str, Tensor] = {"weight": weight}
    if size == 16:
        divisor = 448 * 6 / weight.abs().max().reshape(1)
        state |= {"weight_global_scale": divisor, "weight_scale": (tops / 6 * divisor).to(torch.float8_e4m3fn).float()}
        name = "nvfp4-pack-quantized"
    else:
        state["weight_scale"] = 2.0 ** (tops.log2().floor() - 2)
        name = "mxfp4-pack-quantized"
    scheme.format = name
    compressor = BaseCompressor.get_value_from_registry(name)
    made: dict[str, Tensor] = dict(compressor.compress(state, scheme))
    if name.startswith("mxfp4"):
        made["weight_scale"] = (127 + state["weight_scale"].log2()).to(torch.uint8)
    return {**made, "values": compressor.decompress(dict(made), scheme)["weight"]}


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16", "MXFP4"])
def test_what_compressed_tensors_wrote_has_its_values(wide_folder: Path, tmp_path: Path, preset: str) -> None:
    values = compressed(wide_folder, tmp_path / "theirs", preset)
    done = qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert (done.method, done.storage, len(done.modules)) == ("compressed-tensors", "packed", 6)
    layers = packed_layers(qsurgeon.load(tmp_path / "ours"))
    assert layers.keys() == values.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.opened(torch.float32), values[name].float(), rtol=2**-7, atol=0)
        assert (layer.quantization.input is None) == preset.endswith("A16")


def test_what_was_imported_trains_with_lora(wide_folder: Path, tmp_path: Path) -> None:
    compressed(wide_folder, tmp_path / "theirs", "NVFP4A16")
    qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    before = tensors(tmp_path / "ours")
    model = peft.get_peft_model(
        qsurgeon.load(tmp_path / "ours", dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=["down_proj", "q_proj"]),
    )
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(str(tmp_path / "adapter"))
    assert len(quant_layers(qsurgeon.load(tmp_path / "adapter"))) == 6
    layer = packed_layers(model.get_base_model())[f"{LAYER}.base_layer"]
    assert torch.equal(layer.stored["weight"], before[f"{LAYER}.weight"])


def test_values_become_master_weights_that_round_to_themselves(wide_folder: Path, tmp_path: Path) -> None:
    for preset in ("NVFP4A16", "MXFP4A16"):
        compressed(wide_folder, tmp_path / preset, preset)
        options = ImportOptions(dequantize=True)
        done = qsurgeon.import_checkpoint(tmp_path / preset, tmp_path / f"{preset}-master", options=options)
        assert (done.storage, done.changed) == ("master", 0)
        model = qsurgeon.load(tmp_path / f"{preset}-master", dtype=torch.float32)
        qsurgeon.import_checkpoint(tmp_path / preset, tmp_path / f"{preset}-packed")
        packed = qsurgeon.load(tmp_path / f"{preset}-packed", dtype=torch.float32)
        assert torch.equal(model(input_ids=IDS).logits, packed(input_ids=IDS).logits)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert quant_layers(model)[LAYER].weight.grad is not None


def test_values_that_would_round_otherwise_are_counted(wide_folder: Path, tmp_path: Path) -> None:
    compressed(wide_folder, tmp_path / "theirs", "NVFP4A16")
    file = tmp_path / "theirs/model.safetensors"
    found = load_file(file)
    codes = found[f"{LAYER}.weight_packed"]
    codes[0, :8] = 0x43  # 2 and 1.5: found anew, the scale is a third
    save_file(found, file, {"format": "pt"})
    done = qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours", options=ImportOptions(dequantize=True))
    assert done.changed == 16


def deepseek(source: Path, folder: Path) -> dict[str, Tensor]:
    """Store the MLPs of a model as DeepSeek's are; return their values."""
    found, values = load_file(source / "model.safetensors"), {}
    for name in [name for name in found if ".mlp." in name]:
        weight = found[name].float()
        factor = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3)) / 448
        spread = factor.repeat_interleave(128, 0).repeat_interleave(128, 1)
        found[name] = (weight / spread).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = factor
        values[name.removesuffix(".weight")] = found[name].float() * spread
    shutil.copytree(source, folder)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    write_config(folder, {**config_of(source), "quantization_config": section})
    return values


def test_fp8_in_blocks_is_imported_as_deepseek_publishes_it(wide_folder: Path, tmp_path: Path) -> None:
    values = deepseek(wide_folder, tmp_path / "theirs")
    done = qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert {(how.weight_name, how.input_name) for how in done.modules.values()} == {
        ("fp8_e4m3_128x128", "fp8_e4m3_128")
    }
    layers = packed_layers(qsurgeon.load(tmp_path / "ours"))
    assert all(torch.equal(layers[name].opened(torch.float32), one) for name, one in values.items())


# --- ModelOpt


def test_modelopt_says_what_it_is_in_two_files(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    qsurgeon.export(wrapped("nvfp4", "nvfp4-static"), tmp_path / "out", "modelopt")
    section = config_of(tmp_path / "out")["quantization_config"]
    older = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert (section["quant_method"], section["quant_algo"]) == ("modelopt", "NVFP4")
    assert (older["quant_algo"], older["group_size"], older["kv_cache_quant_algo"]) == ("NVFP4", 16, None)
    assert older["exclude_modules"] == section["ignore"]
    found = tensors(tmp_path / "out")
    assert {
        name.removeprefix(f"{LAYER}."): (one.dtype, list(one.shape))
        for name, one in found.items()
        if name.startswith(f"{LAYER}.")
    } == {
        "weight": (torch.uint8, [128, 128]),
        "weight_scale": (torch.float8_e4m3fn, [128, 16]),
        "weight_scale_2": (torch.float32, []),
        "input_scale": (torch.float32, []),
    }
    assert found[f"{LAYER}.input_scale"].item() == pytest.approx(0.003)


def test_several_algorithms_are_mixed_precision_by_module(wide_folder: Path, tmp_path: Path) -> None:
    rules = [{"target": ["mlp"], "weight": "nvfp4"}, {"target": ["self_attn"], "weight": "mxfp8", "input": "mxfp8"}]
    recipe = qsurgeon.Recipe.model_validate({"version": 1, "storage": "packed", "rules": rules})
    qsurgeon.rewrite(recipe, wide_folder, tmp_path / "in")
    qsurgeon.export(tmp_path / "in", tmp_path / "out", "modelopt")
    section = config_of(tmp_path / "out")["quantization_config"]
    assert section["quant_algo"] == "MIXED_PRECISION"
    assert section["quantized_layers"][LAYER] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert section["quantized_layers"]["model.layers.1.self_attn.q_proj"] == {"quant_algo": "MXFP8", "group_size": 32}
    (tmp_path / "out/qsurgeon-export.json").unlink()
    config = config_of(tmp_path / "out")
    del config["quantization_config"]  # as older ones have it
    write_config(tmp_path / "out", config)
    done = qsurgeon.import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert {how.weight_name for how in done.modules.values()} == {"nvfp4", "mxfp8"}
    assert all(torch.equal(one, tensors(tmp_path / "in")[name]) for name, one in tensors(tmp_path / "back").items())


def test_modelopt_has_one_scheme_for_modules_that_are_joined(wide_folder: Path, tmp_path: Path) -> None:
    rules = [{"target": ["up_proj"], "weight": "nvfp4"}, {"target": ["gate_proj"], "weight": "mxfp8", "input": "mxfp8"}]
    qsurgeon.rewrite(qsurgeon.Recipe.model_validate({"version": 1, "rules": rules}), wide_folder, tmp_path / "in")
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.export(tmp_path / "in", tmp_path / "out", "modelopt")
    assert str(caught.value) == (
        "model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj have different schemes, and readers of modelopt "
        "join them: give them one"
    )


# --- what is refused


def change(folder: Path, key: str, value: Any) -> None:
    """Change one word of the weights' scheme."""
    config = config_of(folder)
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"][key] = value
    write_config(folder, config)


STEM = "model.layers.0.mlp.down_proj"
BAD: list[tuple[Callable[[Path], None], str]] = [
    (
        lambda folder: change(folder, "symmetric", False),
        f"{STEM}: its weights have zero points; only symmetric ones can be imported",
    ),
    (
        lambda folder: change(folder, "actorder", "group"),
        f"{STEM}: its columns are in the order of activations (group)",
    ),
    (
        lambda folder: change(folder, "num_bits", 3),
        f"{STEM}: its weights are {{'num_bits': 3, 'type': 'float', 'strategy': 'group', 'group_size': 32}}; known "
        "are: mxfp4, nvfp4, mxfp8, mxfp6_e2m3, fp8_e4m3, fp8_e4m3_row, fp8_e4m3_128x128, int8, int4_b32, int4_b64, "
        "int4_b128",
    ),
    (
        lambda folder: write_config(
            folder, {**config_of(folder), "quantization_config": {"quant_method": "compressed-tensors"}}
        ),
        f"{STEM} is quantized, and 0 groups of its config take it; expected one",
    ),
    (
        lambda folder: write_config(folder, {**config_of(folder), "quantization_config": {"quant_method": "gptq"}}),
        "FOLDER: is quantized by gptq; imported are: compressed-tensors, modelopt, fp8",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_what_is_not_known_is_refused_before_anything_is_written(
    wide_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    compressed(wide_folder, tmp_path / "theirs", "MXFP4A16")
    spoil(tmp_path / "theirs")
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert str(caught.value) == message.replace("FOLDER", str(tmp_path / "theirs"))
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / "ours.partial").exists()


def test_tensors_that_do_not_fit_their_scheme_are_refused(wide_folder: Path, tmp_path: Path) -> None:
    compressed(wide_folder, tmp_path / "theirs", "MXFP4A16")
    file = tmp_path / "theirs/model.safetensors"
    found = load_file(file)
    found[f"{STEM}.weight_scale"] = found[f"{STEM}.weight_scale"][:, :-1].contiguous()
    save_file(found, file, {"format": "pt"})
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert str(caught.value) == f"{file}: {STEM}.weight_scale is U8 [128, 7]; expected U8 [128, 8]"
    found[f"{STEM}.weight_g_idx"] = torch.zeros(1)
    found[f"{STEM}.weight_scale"] = torch.zeros(128, 8, dtype=torch.uint8)
    save_file(found, file, {"format": "pt"})
    with pytest.raises(ExchangeError) as caught:
        qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert str(caught.value) == f"{file}: has {STEM}.weight_g_idx, and nothing is known of it"


def test_a_folder_that_needs_no_import_says_what_it_needs(
    wrapped: Callable[..., Path], plain_folder: Path, tmp_path: Path
) -> None:
    ours = wrapped("mxfp4", None)
    for folder, message in (
        (plain_folder, f"is not quantized; a recipe is applied by: qsurgeon apply RECIPE --model {plain_folder}"),
        (ours, f"was written by qsurgeon; it is opened by: qsurgeon.load({str(ours)!r})"),
    ):
        with pytest.raises(ExchangeError) as caught:
            qsurgeon.import_checkpoint(folder, tmp_path / "out")
        assert str(caught.value) == f"{folder}: {message}"


# --- opened directly


def test_a_folder_of_another_tool_is_opened_directly(
    wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QSURGEON_CACHE", str(tmp_path / "cache"))
    compressed(wide_folder, tmp_path / "theirs", "MXFP4A16")
    before = sorted((tmp_path / "theirs").iterdir())
    model = qsurgeon.load(tmp_path / "theirs")
    (place,) = (tmp_path / "cache/imported").iterdir()
    said = "is quantized by compressed-tensors; it was imported with the codes that it has, and is kept in"
    assert f"qsurgeon: {tmp_path / 'theirs'} {said} {place}\n" in capfd.readouterr().err
    qsurgeon.import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(model(input_ids=IDS).logits, qsurgeon.load(tmp_path / "ours")(input_ids=IDS).logits)
    assert len(packed_layers(model)) == 6
    assert sorted((tmp_path / "theirs").iterdir()) == before
    capfd.readouterr()
    qsurgeon.load(tmp_path / "theirs")
    assert "imported" not in capfd.readouterr().err


def test_a_folder_that_changed_is_imported_again(
    wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSURGEON_CACHE", str(tmp_path / "cache"))
    compressed(wide_folder, tmp_path / "theirs", "MXFP4A16")
    one = qsurgeon.load(tmp_path / "theirs")(input_ids=IDS).logits
    file = tmp_path / "theirs/model.safetensors"
    found = load_file(file)
    found[f"{LAYER}.weight_scale"] += 1
    save_file(found, file, {"format": "pt"})
    assert not torch.equal(qsurgeon.load(tmp_path / "theirs")(input_ids=IDS).logits, one)
    assert len(list((tmp_path / "cache/imported").iterdir())) == 2
