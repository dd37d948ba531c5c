"""A training step of layers that clip gradients, compiled for real, clips the values that the eager one clips.

A product sums in the order that the compiler chose: values may differ in their last bits, zeros may not.

All formats stand in one model: what is compiled around their operators is alike, so that it is compiled once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear
from qsurgeon.layers.straight_through import straight_through

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4")
MORE = [
    MXFP4.with_fields("rceil", scale_rule="rceil"),
    NVFP4.with_fields("16x16", block=[16, 16]),
    NVFP4.with_fields("four-over-six", four_over_six=True),
    MXFP4.with_fields("stochastic", rounding="stochastic", seed=5),
]
COLUMNS, OUTPUTS = 100, 8  # no block of the catalogue divides them
ROTATED = MXFP4.with_fields("turned", hadamard=32, seed=3)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces


class Side(nn.Module):
    """Layers beside each other, each with an input of its own."""

    def __init__(self, formats: Sequence[Format], columns: int, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(columns, OUTPUTS, bias=False) for _ in formats)
        for layer, fmt in zip(self.layers, formats, strict=True):
            kind.wrap(layer, Quantization(fmt, None if fmt.is_two_dimensional else fmt, "clipped"))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def step(model: Side, run: Callable[[list[Tensor]], list[Tensor]], columns: int) -> list[list[Tensor | None]]:
    """Return outputs and gradients of one step, by layer."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(len(model.layers), 6, columns, generator=generator)
    inputs = [x.mul(1.5).exp().mul(x.sign()).requires_grad_() for x in normal]
    model.zero_grad()
    outputs = run(inputs)
    torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator) for y in outputs])
    return [
        [y.detach(), x.grad, *(one.grad for one in layer.parameters())]
        for y, x, layer in zip(outputs, inputs, model.layers, strict=True)
    ]


def assert_alike(formats: Sequence[Format], columns: int, kind: Any = QuantLinear) -> list[list[Tensor | None]]:
    torch._dynamo.reset()
    model = Side(formats, columns, kind)
    eager = step(model, model, columns)
    compiled = step(model, torch.compile(model, fullgraph=True), columns)
    for fmt, ours, theirs in zip(formats, compiled, eager, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None), fmt.name
            if one is not None and other is not None:
                assert torch.equal(one == 0, other == 0), fmt.name
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return eager


@pytest.mark.parametrize("kind", [QuantLinear, PackedLinear])
def test_a_compiled_step_is_the_eager_one_in_every_format_on_a_short_last_block(kind: Any) -> None:
    formats = [*CATALOG.values(), *MORE] if kind is QuantLinear else [*CATALOG.values()]
    found = assert_alike(formats, COLUMNS, kind)
    clips = {fmt.name: (grads[1] == 0).sum().item() for fmt, grads in zip(formats, found, strict=True)}  # type: ignore[union-attr]
    assert all(clips[name] for name in ("mxfp4", "nvfp4", "int4_b32", "int4_b64", "int4_b128"))


def test_a_compiled_step_is_the_eager_one_with_a_rotation() -> None:
    assert_alike([ROTATED], 96)


@pytest.mark.parametrize("fmt", [MXFP4, get_format("int4_b32"), NVFP4.as_input], ids=lambda fmt: fmt.name)
def test_a_compiled_straight_through_is_the_eager_one(fmt: Format) -> None:
    torch._dynamo.reset()
    values = torch.randn(7, 45).mul(1.5).exp()
    found = []

    def act(x: Tensor) -> Tensor:
        return straight_through(x * 1.0, fmt, "clipped") * 2

    for run in (act, torch.compile(act, fullgraph=True)):
        x = values.clone().requires_grad_()
        y = run(x)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    gradient = found[0][1]
    assert gradient is not None
    assert (gradient == 0).any()
