"""Recipes for formats that other tools have, and the tensors of folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qsurgeon.recipe import Recipe

# Of each grid that other tools have, a weight and an input that go together there.
FORMATS: dict[str, Any] = {
    "nvfp4-static": {"like": "nvfp4", "tensor_scale": "static", "static_scale": 0.003},
    "fp8-static": {"like": "fp8_e4m3", "tensor_scale": "static", "static_scale": 0.01},
    "fp8-128": {"like": "fp8_e4m3_128x128", "block": 128},
    "even": {"like": "mxfp4", "scale_rule": "even"},
    "rotated": {"like": "mxfp4", "hadamard": 32, "seed": 1},
    "random": {"like": "mxfp4", "rounding": "stochastic", "seed": 3},
}


def made_recipe(weight: str | None, asked: str | None = None, storage: str = "master", **fields: Any) -> Recipe:
    """Return a recipe for all Linear modules but those of the first layer's attention and the head."""
    rule = {"name": "most", "target": ["layers"], "exclude": ["layers.0.self_attn"], **fields}
    rule |= {role: one for role, one in (("weight", weight), ("input", asked)) if one is not None}
    return Recipe.model_validate({"version": 1, "storage": storage, "formats": FORMATS, "rules": [rule]})


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, by name."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two folders have the same tensors, to the byte."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )
