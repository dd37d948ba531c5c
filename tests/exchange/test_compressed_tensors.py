"""compressed-tensors itself reads what is exported, and finds the values that the model was trained with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from exchange_cases import tensors
from torch import Tensor

import qsurgeon
from qsurgeon.checkpoint.writing import stream
from qsurgeon.layers import QuantLinear, quant_layers

PAIRS = [
    ("mxfp4", "mxfp4"),
    ("mxfp4", None),
    ("even", "even"),
    ("random", None),
    ("nvfp4", None),
    ("nvfp4", "nvfp4-static"),
    ("mxfp8", "mxfp8"),
    ("mxfp8", None),
    ("mxfp6_e2m3", "mxfp8"),
    ("fp8_e4m3", "fp8_e4m3_row"),
    ("fp8_e4m3", "fp8-static"),
    ("fp8_e4m3_row", "fp8_e4m3_row"),
    ("fp8_e4m3_row", None),
    ("fp8_e4m3_128x128", "fp8-128"),
    ("int8", "int8"),
    ("int4_b32", None),
    ("int4_b64", None),
    ("int4_b128", None),
]
LAYER = "model.layers.1.mlp.down_proj"


def scheme_of(folder: Path) -> QuantizationScheme:
    """Return the one scheme of a folder, as compressed-tensors reads its config."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    return scheme


def values_read(folder: Path, layer: str) -> Tensor:
    """Return the weight of ``layer`` as compressed-tensors reads it."""
    scheme = scheme_of(folder)
    found = {
        name.removeprefix(f"{layer}."): one for name, one in tensors(folder).items() if name.startswith(f"{layer}.")
    }
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    read: Tensor = compressor.decompress(found, scheme)["weight"]
    return read


def values_trained(folder: Path, layer: str) -> Tensor:
    """Return the weight that ``layer`` computes with."""
    model = qsurgeon.load(folder)
    found = quant_layers(model)[layer]
    assert isinstance(found, QuantLinear)
    weight = found.quantization.weight
    assert weight is not None
    return weight.as_weight.fake_quantize(found.weight.detach().float())


@pytest.mark.parametrize(
    ("weight", "asked", "slab"),
    [*((*pair, stream.SLAB) for pair in PAIRS), *((one, None, 2048) for one in ("mxfp4", "nvfp4", "random"))],
)
def test_compressed_tensors_reads_the_values_that_were_trained(
    wrapped: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weight: str,
    asked: str | None,
    slab: int,
) -> None:
    folder = wrapped(weight, asked)
    monkeypatch.setattr(stream, "SLAB", slab)
    qsurgeon.export(folder, tmp_path / "out", "compressed-tensors")
    read, trained = values_read(tmp_path / "out", LAYER), values_trained(folder, LAYER)
    assert trained.abs().max() > 0
    if weight == "nvfp4":  # a divisor is a reciprocal, rounded; the library divides in another order
        torch.testing.assert_close(read.float(), trained, rtol=2**-7, atol=0)
    else:
        assert torch.equal(read.to(torch.bfloat16), trained.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("weight", "asked"), [("mxfp4", "mxfp4"), ("nvfp4", None), ("mxfp8", "mxfp8"), ("int4_b32", None)]
)
def test_packed_codes_are_exported_as_the_master_weights_are(
    wrapped: Callable[..., Path], tmp_path: Path, weight: str, asked: str | None
) -> None:
    for storage in ("master", "packed"):
        done = qsurgeon.export(wrapped(weight, asked, storage), tmp_path / storage, "compressed-tensors")
        assert (done.rounded, done.kept) == ((10, 0) if storage == "master" else (0, 10))
    one, other = tensors(tmp_path / "master"), tensors(tmp_path / "packed")
    assert one.keys() == other.keys()
    assert all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one if one[name].dim()
    )


def test_an_nvfp4_weight_has_the_scales_of_its_formula(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    folder = wrapped("nvfp4", "nvfp4-static")
    qsurgeon.export(folder, tmp_path / "out", "compressed-tensors")
    found, before = tensors(tmp_path / "out"), tensors(folder)[f"{LAYER}.weight"].float()
    divisor = found[f"{LAYER}.weight_global_scale"]
    assert divisor.item() == pytest.approx(448 * 6 / before.abs().max().item(), rel=1e-6)
    assert found[f"{LAYER}.input_global_scale"].item() == pytest.approx(1 / 0.003, rel=1e-6)


# The parameters that vLLM 0.33 makes for a layer of N outputs and K inputs, and fills from a file.
N, K = 128, 256
TABLE: dict[tuple[str, str | None], dict[str, tuple[torch.dtype, list[int]]]] = {
    ("mxfp4", "mxfp4"): {
        "weight_packed": (torch.uint8, [N, K // 2]),
        "weight_scale": (torch.uint8, [N, K // 32]),
    },
    ("nvfp4", "nvfp4-static"): {
        "weight_packed": (torch.uint8, [N, K // 2]),
        "weight_scale": (torch.float8_e4m3fn, [N, K // 16]),
        "weight_global_scale": (torch.float32, [1]),
        "input_global_scale": (torch.float32, [1]),
    },
    ("nvfp4", None): {
        "weight_packed": (torch.uint8, [N, K // 2]),
        "weight_scale": (torch.float8_e4m3fn, [N, K // 16]),
        "weight_global_scale": (torch.float32, [1]),
    },
    ("mxfp8", "mxfp8"): {
        "weight": (torch.float8_e4m3fn, [N, K]),
        "weight_scale": (torch.uint8, [N, K // 32]),
    },
    ("fp8_e4m3_row", "fp8_e4m3_row"): {
        "weight": (torch.float8_e4m3fn, [N, K]),
        "weight_scale": (torch.float32, [N, 1]),
    },
    ("int8", "int8"): {
        "weight": (torch.int8, [N, K]),
        "weight_scale": (torch.float32, [N, 1]),
    },
    ("int4_b128", None): {
        "weight_packed": (torch.int32, [N, K // 8]),
        "weight_scale": (torch.bfloat16, [N, K // 128]),
        "weight_shape": (torch.int64, [2]),
    },
}


@pytest.mark.parametrize(("weight", "asked"), TABLE)
def test_the_parameters_are_those_that_vllm_allocates(
    wrapped: Callable[..., Path], tmp_path: Path, weight: str, asked: str | None
) -> None:
    qsurgeon.export(wrapped(weight, asked), tmp_path / "out", "compressed-tensors")
    found = {
        name.removeprefix(f"{LAYER}."): (one.dtype, list(one.shape))
        for name, one in tensors(tmp_path / "out").items()
        if name.startswith(f"{LAYER}.")
    }
    assert found == TABLE[weight, asked]


def test_what_is_not_wrapped_is_ignored_by_name_and_copied(
    wrapped: Callable[..., Path], wide_folder: Path, tmp_path: Path
) -> None:
    qsurgeon.export(wrapped("mxfp4", "mxfp4"), tmp_path / "out", "compressed-tensors")
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    attention = [f"model.layers.0.self_attn.{one}_proj" for one in "qkvo"]
    assert sorted(section["ignore"]) == ["lm_head", *attention[1:2], attention[3], attention[0], attention[2]]
    before, after = tensors(wide_folder), tensors(tmp_path / "out")
    copied = before.keys() & after.keys()
    assert {f"{one}.weight" for one in section["ignore"]} <= copied
    assert all(torch.equal(before[name], after[name]) for name in copied)


def test_several_schemes_are_groups_with_names(wide_folder: Path, tmp_path: Path) -> None:
    recipe = {
        "version": 1,
        "rules": [
            {"target": ["mlp"], "weight": "mxfp4", "input": "mxfp4"},
            {"target": ["self_attn"], "weight": "mxfp8", "input": "mxfp8"},
        ],
    }
    qsurgeon.rewrite(qsurgeon.Recipe.model_validate(recipe), wide_folder, tmp_path / "in")
    qsurgeon.export(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    section: dict[str, Any] = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert section["format"] == "mixed-precision"
    formats = {one["format"]: len(one["targets"]) for one in section["config_groups"].values()}
    assert formats == {"mxfp4-pack-quantized": 6, "mxfp8-quantized": 8}
    QuantizationConfig.model_validate(section)
