"""A GPU computes what a CPU does: rounding to the bit, layers as near as products are. Skipped where there is none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qsurgeon
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4")
MORE = [
    NVFP4.with_fields("16x16", block=[16, 16]),
    NVFP4.as_input.with_fields("row", tensor_scale="row"),
    get_format("mxfp8").with_fields("dither", rounding="stochastic"),
    MXFP4.with_fields("turned", hadamard=32),
    NVFP4.with_fields("four over six", four_over_six=True),
]
SHAPES = [(64, 128), (3, 40, 96), (1, 32), (7, 50)]
CASES = [
    (fmt, shape)
    for fmt in (*CATALOG.values(), *MORE)
    for shape in SHAPES
    if fmt.hadamard is None or shape[-1] % fmt.hadamard == 0
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def wide(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * 3)
    return x.to(dtype)


@DTYPES
@pytest.mark.parametrize(("fmt", "shape"), CASES, ids=lambda one: str(getattr(one, "name", one)))
def test_it_rounds_to_the_bits_of_a_cpu(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = wide(shape, dtype)
    here, there = fmt.quantize(x), fmt.quantize(x.to(GPU))
    if fmt.hadamard is None:  # a rotation is a product, whose order of sums is the device's
        assert torch.equal(there.data.cpu(), here.data)
        assert here.scale is None or torch.equal(there.scale.cpu(), here.scale)  # type: ignore[union-attr]
        assert torch.equal(there.dequantize().cpu(), here.dequantize())
        assert torch.equal(fmt.fake_quantize(x.to(GPU)).cpu(), fmt.fake_quantize(x))
    assert torch.equal(there.dequantize(), fmt.fake_quantize(x.to(GPU)).to(dtype)) or fmt.hadamard is not None


def layer_of(how: Quantization, kind: Any = QuantLinear) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(128, 96)
    kind.wrap(linear, how)
    return linear


def step(linear: nn.Linear, x: Tensor, run: Any = None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = (linear if run is None else run)(x)
    y.square().sum().backward()
    grads = [x.grad, *(one.grad for one in linear.parameters() if one.requires_grad)]
    linear.zero_grad()
    return [y.detach().cpu(), *(one.cpu() for one in grads if one is not None)]


@pytest.mark.parametrize("gradient", ["ste", "clipped", "none"])
@pytest.mark.parametrize("saved_inputs", ["packed", "full"])
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, get_format("mxfp8")], ids=lambda one: one.name)
def test_a_layer_trains_as_on_a_cpu(fmt: Format, saved_inputs: Any, gradient: Any) -> None:
    how = Quantization(fmt, fmt, gradient=gradient, saved_inputs=saved_inputs)
    x = torch.randn(4, 20, 128)
    here, there = step(layer_of(how), x), step(layer_of(how).to(GPU), x.to(GPU))
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda one: one.name)
def test_a_packed_layer_computes_what_its_master_does(fmt: Format) -> None:
    x = torch.randn(4, 20, 128, device=GPU)
    how = Quantization(fmt, fmt)
    master, packed = (step(layer_of(how, kind).to(GPU), x) for kind in (QuantLinear, PackedLinear))
    assert torch.equal(packed[0], master[0])
    assert torch.equal(packed[1], master[1])


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda one: one.name)
def test_a_compiled_layer_computes_what_an_eager_one_does(fmt: Format) -> None:
    x, linear = torch.randn(4, 20, 128, device=GPU), layer_of(Quantization(fmt, fmt)).to(GPU)
    for one, other in zip(step(linear, x, torch.compile(linear, fullgraph=True)), step(linear, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_the_threads_of_a_backward_pass_recompute_in_the_phase_of_the_first_time(reentrant: bool, inside: bool) -> None:
    linear = layer_of(Quantization(MXFP4, MXFP4, phases="training")).to(GPU)
    x = torch.randn(20, 128, device=GPU, requires_grad=True)
    with qsurgeon.phase("rollout"):
        y = checkpoint(linear, x, use_reentrant=reentrant)
        if inside:
            y.sum().backward()
    if not inside:
        y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_watching_sees_what_a_gpu_computes() -> None:
    linear = layer_of(Quantization(NVFP4, NVFP4)).to(GPU)
    with qsurgeon.Watch(nn.ModuleDict({"one": linear}), every=1) as watch:
        linear(torch.randn(20, 128, device=GPU)).sum().backward()
        with torch.no_grad():
            linear.weight += 0.05
        numbers = watch.step()
        assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 1.0)
        assert 0 < numbers["qsurgeon/flip_rate"] < 1
        with qsurgeon.disabled(linear):
            linear(torch.randn(20, 128, device=GPU))
        assert watch.step()["qsurgeon/active"] == 0.0


def test_the_codes_of_a_step_take_no_more_memory_than_they_are() -> None:
    linear = layer_of(Quantization(MXFP4, MXFP4)).to(GPU, torch.bfloat16)
    x = torch.randn(8192, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    step(linear, x)
    before = torch.cuda.memory_allocated()
    y = linear(x)
    held = torch.cuda.memory_allocated() - before - y.nbytes
    assert held <= 0.30 * x.nbytes
