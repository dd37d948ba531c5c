"""The gradient that passes a rounding: exact, clipped, or blocked."""

import pytest
import torch

from qsurgeon.errors import GradientError
from qsurgeon.formats import CATALOG, get_format
from qsurgeon.layers import straight_through


@pytest.mark.parametrize("name", CATALOG)
def test_forward_is_fake_quantization_and_backward_the_identity(name: str) -> None:
    x = torch.linspace(-8, 8, 128).reshape(2, 64).requires_grad_()
    grad = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    y = straight_through(x, get_format(name))
    y.backward(grad)
    assert torch.equal(y, get_format(name).fake_quantize(x.detach()))
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_clipped_blocks_the_gradient_where_the_value_saturated_and_only_there() -> None:
    # Under the floor rule a block whose largest value is 7 has scale 1, and 6 is the most it can hold.
    x = torch.tensor([[7.0, -6.5, 6.0, 1.0, 0.0]], requires_grad=True)
    straight_through(x, get_format("mxfp4"), "clipped").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]]


def test_none_blocks_the_gradient() -> None:
    x = torch.ones(2, 32, requires_grad=True)
    assert not straight_through(x, get_format("mxfp4"), "none").requires_grad


def test_a_quantizer_alone_refuses_to_be_part_of_a_graph() -> None:
    x = torch.ones(2, 32, requires_grad=True)
    with pytest.raises(GradientError) as caught:
        get_format("mxfp4").fake_quantize(x)
    assert str(caught.value) == (
        "fake quantization has no gradient of its own: use QuantLinear (or layers.straight_through), "
        "or call it under torch.no_grad()"
    )
    with torch.no_grad():
        assert torch.equal(get_format("mxfp4").fake_quantize(x), x)
