"""compressed-tensors, the checkpoints of llm-compressor: vLLM, SGLang, transformers and mlx-lm read them.

Layouts and keys are those of compressed-tensors 0.20; 0.17 (vLLM 0.33) and 0.18 (SGLang 0.5.23) take them, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsurgeon.exchange.encodings import Above, Renamed, reciprocal
from qsurgeon.exchange.source import Wrapped
from qsurgeon.exchange.target import Exported, Scheme, Target

METHOD = "compressed-tensors"
INPUT_DIVISOR, INPUT_SCALE, SHAPE = "input_global_scale", "input_scale", "weight_shape"
_U8, _F8 = "torch.uint8", "torch.float8_e4m3fn"
_MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": _U8}
_NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": _F8}


@dataclass(frozen=True)
class Weights:
    """A format of weights: what the config calls the layout, what it says of the weights, and their encoding."""

    format: str
    args: Mapping[str, Any]
    encoding: Renamed


def _float8(strategy: str, **more: Any) -> Weights:
    encoding = Renamed(("weight", torch.float8_e4m3fn), above=Above("weight_scale"))
    return Weights("float-quantized", {"num_bits": 8, "type": "float", "strategy": strategy, **more}, encoding)


def _integers(block: int) -> Weights:
    encoding = Renamed(("weight_packed", torch.int32), ("weight_scale", torch.bfloat16), flips=0x88)
    return Weights("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": block}, encoding)


WEIGHTS = {
    "mxfp4": Weights(
        "mxfp4-pack-quantized",
        {"num_bits": 4, **_MX},
        Renamed(("weight_packed", torch.uint8), ("weight_scale", torch.uint8)),
    ),
    "nvfp4": Weights(
        "nvfp4-pack-quantized",
        _NV,
        Renamed(
            ("weight_packed", torch.uint8),
            ("weight_scale", torch.float8_e4m3fn),
            Above("weight_global_scale", divides=True),
        ),
    ),
    "mxfp8": Weights(
        "mxfp8-quantized",
        {"num_bits": 8, **_MX},
        Renamed(("weight", torch.float8_e4m3fn), ("weight_scale", torch.uint8)),
    ),
    "mxfp6_e2m3": Weights(
        "mxfp6-pack-quantized",
        {"num_bits": 6, **_MX},
        Renamed(("weight_packed", torch.uint8), ("weight_scale", torch.uint8)),
    ),
    "fp8_e4m3": _float8("tensor"),
    "fp8_e4m3_row": _float8("channel"),
    "fp8_e4m3_128x128": Weights(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        Renamed(("weight", torch.float8_e4m3fn), ("weight_scale", torch.float32)),
    ),
    "int8": Weights(
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        Renamed(("weight", torch.int8), above=Above("weight_scale")),
    ),
    "int4_b32": _integers(32),
    "int4_b64": _integers(64),
    "int4_b128": _integers(128),
}
INPUTS: dict[str, dict[str, Any]] = {
    "mxfp4": {"num_bits": 4, **_MX, "dynamic": True},
    "mxfp8": {"num_bits": 8, **_MX, "dynamic": True},
    "nvfp4, a static scale": {**_NV, "dynamic": "local", "observer": "static_minmax"},
    "fp8, a scale per token": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8, a static scale": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    "fp8, a scale per 128": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "int8, a scale per token": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
}
_FLOAT8_INPUTS = ("", "fp8, a scale per token", "fp8, a static scale")


class CompressedTensors(Target):
    """The target of this module."""

    name = METHOD
    pairs: ClassVar[Mapping[str, Sequence[str]]] = {
        "mxfp4": ("", "mxfp4"),
        "nvfp4": ("", "nvfp4, a static scale"),
        "mxfp8": ("", "mxfp8"),
        "mxfp6_e2m3": ("", "mxfp8"),
        "fp8_e4m3": _FLOAT8_INPUTS,
        "fp8_e4m3_row": _FLOAT8_INPUTS,
        "fp8_e4m3_128x128": ("", "fp8, a scale per 128"),
        "int8": ("int8, a scale per token",),
        "int4_b32": ("",),
        "int4_b64": ("",),
        "int4_b128": ("",),
    }

    def scheme(self, one: Wrapped, *, weight_only: bool) -> Scheme:
        """Return what a wrapped weight becomes. Raises: ExchangeError as ``grids``."""
        weight, asked = self.grids(one, weight_only=weight_only)
        encoding = WEIGHTS[weight].encoding
        beside: dict[str, Tensor] = {}
        if encoding.flips:
            beside[SHAPE] = torch.tensor(one.module.row_shape, dtype=torch.int64)
        static = one.how.static_scales.get("input")
        if asked.endswith("static scale") and static is not None:
            number = torch.tensor([static], dtype=torch.float32)
            beside |= {INPUT_DIVISOR: number.reciprocal()} if asked.startswith("nvfp4") else {INPUT_SCALE: number}
        return Scheme(weight, asked, encoding, beside)

    def exact(self, one: Wrapped, scheme: Scheme, divisors: Mapping[str, float]) -> Scheme:
        """Return ``scheme`` with the ``divisors`` that an import read, by tensor, where the scales are still theirs."""
        encoding, beside = scheme.encoding, dict(scheme.beside)
        if isinstance(encoding, Renamed) and encoding.above is not None:
            divisor = divisors.get(f"{one.stem}.{encoding.above.name}")
            encoding = encoding if divisor is None else replace(encoding, exact=(reciprocal(divisor), divisor))
        divisor = divisors.get(f"{one.stem}.{INPUT_DIVISOR}")
        if (
            divisor is not None
            and one.how.static_scales.get("input") == reciprocal(divisor)
            and INPUT_DIVISOR in beside
        ):
            beside[INPUT_DIVISOR] = torch.tensor([divisor], dtype=torch.float32)
        return Scheme(scheme.weight, scheme.input, encoding, beside)

    def files(self, config: dict[str, Any], exported: Sequence[Exported], plain: Sequence[str]) -> dict[str, Any]:
        """Return config.json with the ``quantization_config``: a group for each scheme, and what is in none."""
        groups: dict[tuple[str, str], list[str]] = {}
        for one in exported:
            groups.setdefault((one.scheme.weight, one.scheme.input), []).append(one.source.stem)
        formats = {WEIGHTS[weight].format for weight, _ in groups}
        section = {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": _group(*scheme, ["Linear"] if len(groups) == 1 else names)
                for number, (scheme, names) in enumerate(groups.items())
            },
            "ignore": list(plain),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }
        return {"config.json": {**config, "quantization_config": section}}


def _group(weight: str, asked: str, targets: list[str]) -> dict[str, Any]:
    return {
        "format": WEIGHTS[weight].format,
        "targets": targets,
        "weights": {**WEIGHTS[weight].args, "symmetric": True, "dynamic": False},
        "input_activations": {**INPUTS[asked], "symmetric": True} if asked else None,
        "output_activations": None,
    }
