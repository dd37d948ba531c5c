"""Layers without inputs or without outputs, and inputs without rows: what nn.Linear does, forward and backward."""

import pytest
import torch
from torch import nn

from qsurgeon.formats import CATALOG, get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 48), (64, 0), (0, 0)])
@pytest.mark.parametrize("name", CATALOG)
def test_a_layer_without_inputs_or_outputs_is_that_of_nn_linear(name: str, inputs: int, outputs: int) -> None:
    weight = get_format(name)
    for input in (None, get_format("mxfp4") if weight.is_two_dimensional else weight):
        for gradient in ("ste", "clipped", "none"):
            for saved_inputs in ("packed", "full"):
                how = Quantization(weight, input, gradient, saved_inputs=saved_inputs)
                check(how, inputs, outputs)


def check(how: Quantization, inputs: int, outputs: int) -> None:
    for kind in (QuantLinear, PackedLinear):
        for shape in ((inputs,), (3, inputs), (2, 3, inputs), (2, 0, inputs)):
            plain, linear = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
            linear.load_state_dict(plain.state_dict())
            kind.wrap(linear, how)
            x = torch.randn(*shape, requires_grad=True)
            twin = x.detach().clone().requires_grad_()
            y, expected = linear(x), plain(twin)
            assert torch.equal(y, expected)
            y.sum().backward()
            expected.sum().backward()
            for one, other in ((x, twin), (linear.weight, plain.weight), (linear.bias, plain.bias)):
                # Nothing was rounded, and what is missing is zero: the two agree wherever there is a gradient.
                assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
            if how.behavior.gradient != "none":
                assert x.grad is not None
