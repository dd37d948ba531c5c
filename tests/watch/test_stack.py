"""That samples of many layers, rounded together, give each layer the numbers that it has alone."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsurgeon
from qsurgeon.formats import CATALOG, Format, get_format, kernels
from qsurgeon.formats.quality import sqnr
from qsurgeon.layers import Quantization, QuantLayer, QuantLinear, quant_layers
from qsurgeon.watch.sample import rows_of

ROWS = 8
NVFP4 = get_format("nvfp4")
MORE = [
    get_format("mxfp4").with_fields("turned", hadamard=32, seed=7),
    NVFP4.with_fields("turned-nvfp4", hadamard=32, seed=7),
    NVFP4.with_fields("square", block=[16, 16]),
    get_format("mxfp8").with_fields("dither", rounding="stochastic"),
    NVFP4.with_fields("dither-nvfp4", rounding="stochastic", seed=3),
    NVFP4.with_fields("static", tensor_scale="static", static_scale=0.01),
    get_format("int8").with_fields("static-int8", tensor_scale="static", static_scale=0.02),
]
SHAPES = {"a": (64, 40), "b": (64, 40), "wide": (128, 40), "few": (64, 5), "plain": (64, 40)}


def model_of(format: Format, dtype: torch.dtype) -> nn.ModuleDict:
    """Return layers of several shapes, of which some can be rounded together and one has no bias."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(*shape, bias=name != "plain", dtype=dtype) for name, shape in SHAPES.items()}
    for place, layer in enumerate(layers.values(), start=1):
        with torch.no_grad():
            layer.weight.mul_(place)
        own = format
        if format.static_scale is not None:  # a number for each, as calibration gives them
            own = format.with_fields(format.name, static_scale=format.static_scale * place)
        QuantLinear.wrap(layer, Quantization(own, None if own.is_two_dimensional else own))
    return nn.ModuleDict(layers)


def codes(layers: Mapping[str, QuantLayer]) -> dict[str, Tensor]:
    formats = {name: layer.quantization.weight for name, layer in layers.items()}
    return {name: one.as_weight.quantize(layers[name].weight).codes for name, one in formats.items() if one is not None}


def lost(format: Format, x: Tensor, rows: list[int]) -> float:
    """Return the SQNR of some rows, where they are rotated if the format rotates."""
    x = x if format.rotation is None else format.rotation(x)
    return sqnr(x[rows], format.without_rotation.fake_quantize(x)[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [*CATALOG.values(), *MORE], ids=lambda one: one.name)
def test_every_layers_numbers_are_those_of_its_own_rows(format: Format, dtype: torch.dtype) -> None:
    model = model_of(format, dtype)
    layers = quant_layers(model)
    inputs = {name: torch.randn(2, 10, shape[0]).to(dtype) * 3 for name, shape in SHAPES.items()}
    with torch.no_grad(), qsurgeon.Watch(model, every=1, rows=ROWS, groups=lambda name: name) as watch:
        before = codes(layers)
        for name, layer in layers.items():
            layer.weight += torch.randn(layer.weight.shape, dtype=dtype) * 0.05
            layer(inputs[name])
        after, numbers = codes(layers), watch.step()
        assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 1.0)
        for name, layer in layers.items():
            assert layer.quantization.weight is not None
            grid, weight = layer.quantization.weight.as_weight, layer.weight.detach()
            rows = list(rows_of(len(weight), ROWS, grid.block_shape[0]))
            flipped = float((before[name][rows] != after[name][rows]).float().mean())
            assert numbers[f"qsurgeon/flip_rate/{name}"] == pytest.approx(flipped)
            assert numbers[f"qsurgeon/weight_sqnr_db/{name}"] == pytest.approx(lost(grid, weight, rows), abs=1e-3)
            if layer.quantization.input is not None:
                of_input = lost(layer.quantization.input.as_input, inputs[name].flatten(0, 1), list(rows_of(20, 8, 1)))
                assert numbers[f"qsurgeon/input_sqnr_db/{name}"] == pytest.approx(of_input, abs=1e-3)


def test_more_layers_of_a_kind_take_no_more_calls_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(count: int) -> int:
        layers = [nn.Linear(64, 40) for _ in range(count)]
        for layer in layers:
            QuantLinear.wrap(layer, Quantization(NVFP4, NVFP4))
        with torch.no_grad(), qsurgeon.Watch(nn.ModuleList(layers), every=1) as watch:
            for layer in layers:
                layer(torch.randn(20, 64))
            seen.clear()
            watch.step()
        return len(seen)

    seen: list[Any] = []
    for name in ("quantize", "dequantize"):
        act: Callable[..., Any] = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, act=act: (seen.append(given), act(*given))[1])  # type: ignore[func-returns-value]
    assert 0 < calls(1) == calls(12)
