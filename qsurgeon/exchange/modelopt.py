"""ModelOpt's checkpoints: vLLM, SGLang and TensorRT-LLM read them, and llama.cpp's converter does.

Layouts and keys are those of ModelOpt 0.47. Several schemes in one model are ``MIXED_PRECISION``, which names each
module's; the algorithms are those that vLLM 0.33 has a kernel for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsurgeon.errors import ExchangeError
from qsurgeon.exchange.encodings import Above, Renamed
from qsurgeon.exchange.fused import disagreeing
from qsurgeon.exchange.source import Wrapped
from qsurgeon.exchange.target import Exported, Scheme, Target

METHOD = "modelopt"
CONFIG = "hf_quant_config.json"
INPUT_SCALE = "input_scale"
MIXED = "MIXED_PRECISION"
_PRODUCER = {"name": METHOD, "version": "0.47.0"}  # readers tell the layout by this name


@dataclass(frozen=True)
class Algorithm:
    """What ModelOpt calls a pair of grids.

    name: in ``quant_algo``. weight, input: the grids. group: of the values that share a scale, where the config
    says it. args: what the config says of each operand besides.
    """

    name: str
    weight: str
    input: str
    group: int | None
    args: Mapping[str, Any]


_FP4 = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
ALGORITHMS = (
    Algorithm("NVFP4", "nvfp4", "nvfp4, a static scale", 16, _FP4),
    Algorithm("W4A16_NVFP4", "nvfp4", "", 16, _FP4),
    Algorithm("MXFP8", "mxfp8", "mxfp8", 32, {"num_bits": 8, "type": "float", "dynamic": False, "group_size": 32}),
    Algorithm("FP8", "fp8_e4m3", "fp8, a static scale", None, {"num_bits": 8, "type": "float", "dynamic": False}),
)
_BY_GRIDS = {(one.weight, one.input): one for one in ALGORITHMS}
ENCODINGS = {
    "nvfp4": Renamed(("weight", torch.uint8), ("weight_scale", torch.float8_e4m3fn), Above("weight_scale_2", shape=())),
    "mxfp8": Renamed(("weight", torch.float8_e4m3fn), ("weight_scale", torch.uint8)),
    "fp8_e4m3": Renamed(("weight", torch.float8_e4m3fn), above=Above("weight_scale", shape=())),
}


class ModelOpt(Target):
    """The target of this module."""

    name = METHOD
    pairs: ClassVar[Mapping[str, Sequence[str]]] = {
        weight: tuple(one.input for one in ALGORITHMS if one.weight == weight) for weight in ENCODINGS
    }

    def scheme(self, one: Wrapped, *, weight_only: bool) -> Scheme:
        """Return what a wrapped weight becomes. Raises: ExchangeError as ``grids``."""
        weight, asked = self.grids(one, weight_only=weight_only)
        beside: dict[str, Tensor] = {}
        static = one.how.static_scales.get("input")
        if asked.endswith("static scale") and static is not None:
            beside[INPUT_SCALE] = torch.tensor(static, dtype=torch.float32)
        return Scheme(weight, asked, ENCODINGS[weight], beside)

    def files(self, config: dict[str, Any], exported: Sequence[Exported], plain: Sequence[str]) -> dict[str, Any]:
        """Return config.json with the ``quantization_config``, and hf_quant_config.json, which older readers ask for.

        Raises: ExchangeError for modules that readers join, and that have different schemes.
        """
        chosen = {one.source.stem: _BY_GRIDS[one.scheme.weight, one.scheme.input] for one in exported}
        if apart := disagreeing({name: one.name for name, one in chosen.items()}):
            raise ExchangeError(
                f"{' and '.join(apart[0])} have different schemes, and readers of {METHOD} join them: give them one"
            )
        algorithms = {one.name: one for one in chosen.values()}
        (only,) = algorithms.values() if len(algorithms) == 1 else (None,)
        said: dict[str, Any] = {"quant_algo": MIXED if only is None else only.name, "kv_cache_quant_algo": None}
        if only is None:
            said["quantized_layers"] = {name: _layer(one) for name, one in chosen.items()}
        elif only.group is not None:
            said["group_size"] = only.group
        section = {
            "quant_method": METHOD,
            "producer": _PRODUCER,
            **said,
            "config_groups": {
                f"group_{number}": _group(one, chosen, whole=only is not None)
                for number, one in enumerate(algorithms.values())
            },
            "ignore": list(plain),
        }
        older = {"producer": _PRODUCER, "quantization": {**said, "exclude_modules": list(plain)}}
        return {"config.json": {**config, "quantization_config": section}, CONFIG: older}


def _layer(one: Algorithm) -> dict[str, Any]:
    group = {} if one.group is None else {"group_size": one.group}
    return {"quant_algo": one.name, **group}


def _group(one: Algorithm, chosen: Mapping[str, Algorithm], *, whole: bool) -> dict[str, Any]:
    names = ["Linear"] if whole else [name for name, algorithm in chosen.items() if algorithm is one]
    return {
        "weights": dict(one.args),
        "input_activations": dict(one.args) if one.input else None,
        "targets": names,
    }
