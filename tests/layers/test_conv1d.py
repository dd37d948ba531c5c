"""Conv1D, whose weight is (inputs, outputs): it computes what a Linear with the transposed weight does, to the bit."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qsurgeon
from qsurgeon.errors import SurgeryError
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, disabled
from qsurgeon.layers.kinds.conv1d import CONV1D, PackedConv1D, QuantConv1D

MX, NV = get_format("mxfp4"), get_format("nvfp4")
OWN = {
    "tiles": MX.with_fields("tiles", block=[16, 16]),
    "rotated": NV.with_fields("rotated", hadamard=16, seed=3),
    "random": MX.with_fields("random", rounding="stochastic", seed=5),
    "static": NV.with_fields("static", tensor_scale="static", static_scale=0.01),
}
FORMATS = {**CATALOG, **OWN}
INPUTS, OUTPUTS = 80, 48  # neither is a whole number of all blocks
STORAGES: dict[str, tuple[Any, Any]] = {"master": (QuantConv1D, QuantLinear), "packed": (PackedConv1D, PackedLinear)}


def pair(how: Quantization, storage: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a wrapped Conv1D, and a wrapped Linear with the transposed weight."""
    torch.manual_seed(0)
    conv, linear = Conv1D(OUTPUTS, INPUTS).to(dtype), nn.Linear(INPUTS, OUTPUTS, dtype=dtype)
    with torch.no_grad():
        conv.weight.mul_(20)
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.mT)
        linear.bias.copy_(conv.bias)
    for kind, layer in zip(STORAGES[storage], (conv, linear), strict=True):
        kind.wrap(layer, how, "it")
    return conv, linear


def run(layer: Any) -> list[Tensor | None]:
    """Return an output and all gradients, that of a weight as (outputs, inputs)."""
    generator = torch.Generator().manual_seed(1)
    weight = layer.weight
    x = torch.randn(3, 5, INPUTS, generator=generator).to(layer.bias.dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    grad = weight.grad
    return [y, x.grad, layer.bias.grad, grad.mT if isinstance(layer, Conv1D) and grad is not None else grad]


def assert_alike(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)


def hows(format: Format) -> list[Quantization]:
    # A format of square blocks is none for an input; one that rotates is for both operands or none.
    both = [] if format.is_two_dimensional else [Quantization(format, format), Quantization(None, format)]
    return [
        *both,
        Quantization(format, None),
        Quantization(format, None, "clipped"),
        Quantization(format, None, "none"),
    ]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients_are_those_of_a_linear_with_the_transposed_weight(name: str, storage: str) -> None:
    for how in hows(FORMATS[name]):
        if storage == "master" or how.weight is not None:
            conv, linear = pair(how, storage)
            assert_alike(run(conv), run(linear))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_it_does_in_every_dtype(storage: str, dtype: torch.dtype) -> None:
    conv, linear = pair(Quantization(MX, MX), storage, dtype)
    assert_alike(run(conv), run(linear))


@pytest.mark.parametrize("name", FORMATS)
def test_the_packed_tensors_are_those_of_the_transposed_weight(name: str) -> None:
    conv, linear = pair(Quantization(FORMATS[name], None), "packed")
    found, expected = conv.state_dict(), linear.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_module_its_parameters_and_their_shapes_stay() -> None:
    conv, _ = pair(Quantization(MX, MX), "master")
    assert isinstance(conv, Conv1D)
    assert {key: tuple(one.shape) for key, one in conv.named_parameters()} == {"weight": (80, 48), "bias": (48,)}
    assert repr(conv) == "QuantConv1D(nf=48, nx=80, weight=mxfp4, input=mxfp4, gradient=ste)"


def test_a_packed_one_says_so_and_is_still_a_conv1d() -> None:
    conv, _ = pair(Quantization(MX, None), "packed")
    assert isinstance(conv, Conv1D)
    assert repr(conv) == "PackedConv1D(nf=48, nx=80, weight=mxfp4, input=-, gradient=ste, storage=packed)"


def test_what_is_called_x_can_be_said() -> None:
    for storage in STORAGES:
        conv, _ = pair(Quantization(MX, MX), storage)
        x = torch.randn(2, INPUTS)
        assert torch.equal(conv(x=x), conv(x))


def test_in_another_phase_and_disabled_it_is_the_conv1d_that_it_was() -> None:
    plain = Conv1D(OUTPUTS, INPUTS)
    x = torch.randn(2, 3, INPUTS)
    conv = copy.deepcopy(plain)
    QuantConv1D.wrap(conv, Quantization(MX, MX, phases="training"))
    with qsurgeon.phase("rollout"):
        assert torch.equal(conv(x), plain(x))
    with disabled(conv):
        assert torch.equal(conv(x), plain(x))
    assert not torch.equal(conv(x), plain(x))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_a_copy_computes_the_same(storage: str, copied: Any) -> None:
    conv, _ = pair(Quantization(NV, NV), storage)
    x = torch.randn(2, INPUTS)
    assert torch.equal(copied(conv)(x), conv(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
@pytest.mark.parametrize("storage", STORAGES)
def test_it_is_compiled_without_a_break(storage: str) -> None:
    conv, _ = pair(Quantization(MX, MX), storage)
    x = torch.randn(2, INPUTS)
    compiled: Any = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), conv(x))


def test_a_subclass_is_not_wrapped() -> None:
    class Own(Conv1D):
        pass

    own: Any = Own
    with pytest.raises(SurgeryError) as caught:
        QuantConv1D.wrap(own(4, 4), Quantization(MX, None))
    assert str(caught.value).endswith("Own, not Conv1D itself")


def test_its_input_is_found_by_its_name() -> None:
    x = torch.ones(1)
    assert CONV1D.input((), {"x": x}) is x
