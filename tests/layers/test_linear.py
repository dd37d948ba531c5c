"""QuantLinear: an nn.Linear in every respect but what it multiplies."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qsurgeon.errors import FormatError, SurgeryError
from qsurgeon.formats import CATALOG, get_format
from qsurgeon.layers import Quantization, QuantLinear, quant_layers

MXFP4, NVFP4, MXFP8 = (get_format(name) for name in ("mxfp4", "nvfp4", "mxfp8"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(gradient: Tensor | None, expected: Tensor) -> bool:
    return gradient is not None and torch.equal(gradient, expected)


def wrapped(linear: nn.Linear, how: Quantization) -> nn.Linear:
    QuantLinear.wrap(linear, how)
    return linear


def make(
    inputs: int = 64, outputs: int = 48, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("how", [Quantization(MXFP4, MXFP4), Quantization(NVFP4, NVFP4), Quantization(MXFP4, MXFP8),
                                 Quantization(MXFP4, None), Quantization(None, NVFP4)],
                         ids=["w4a4-mxfp4", "w4a4-nvfp4", "w4a8", "w4a16", "a4-only"])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_and_gradients_are_those_of_the_explicit_formula(how: Quantization, dtype: torch.dtype) -> None:
    linear = make(dtype=dtype)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    x, grad = rand(5, 64, dtype=dtype), rand(5, 48, dtype=dtype)
    qw = how.weight.as_weight.fake_quantize(weight) if how.weight else weight
    qx = how.input.as_input.fake_quantize(x) if how.input else x
    x.requires_grad_()
    y = wrapped(linear, how)(x)
    y.backward(grad)
    assert torch.equal(y, nn.functional.linear(qx, qw, bias))
    assert same(x.grad, grad @ qw)
    assert same(linear.weight.grad, grad.T @ qx)
    assert same(linear.bias.grad, grad.sum(0))


def test_wrapping_keeps_the_module_the_parameters_and_their_names() -> None:
    linear = make()
    before = {name: id(tensor) for name, tensor in linear.named_parameters()}
    QuantLinear.wrap(linear, Quantization(MXFP4, MXFP4))
    assert isinstance(linear, QuantLinear)
    assert {name: id(tensor) for name, tensor in linear.named_parameters()} == before
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert list(linear.buffers()) == []


def test_the_layer_says_what_it_computes_with() -> None:
    linear = make(bias=False)
    QuantLinear.wrap(linear, Quantization(NVFP4, None))
    assert repr(linear) == (
        "QuantLinear(in_features=64, out_features=48, bias=False, weight=nvfp4, input=-, gradient=ste)"
    )


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (1, 2, 3, 4, 64), (0, 64), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("name", CATALOG)
def test_any_rank_and_an_empty_batch_pass_forward_and_backward(shape: tuple[int, ...], name: str) -> None:
    weight = get_format(name)
    linear = wrapped(make(), Quantization(weight, get_format("mxfp4") if weight.is_two_dimensional else weight))
    x = rand(*shape).requires_grad_()
    y = linear(x)
    assert y.shape == (*shape[:-1], 48)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_a_non_contiguous_input_gives_what_its_copy_gives() -> None:
    linear = wrapped(make(), Quantization(NVFP4, NVFP4))
    x = rand(64, 7).T.requires_grad_()
    y = linear(x)
    y.sum().backward()
    # The values that are multiplied are the same; the product may add them in another order.
    assert torch.equal(NVFP4.as_input.fake_quantize(x.detach()), NVFP4.as_input.fake_quantize(x.detach().contiguous()))
    assert torch.allclose(y, linear(x.detach().contiguous()), rtol=1e-5, atol=1e-5)
    assert x.grad is not None


def test_a_row_that_no_block_divides_is_padded_and_never_runs_into_the_next() -> None:
    linear = wrapped(make(inputs=40), Quantization(MXFP4, MXFP4))
    x = rand(3, 40)
    expected = torch.stack([linear(row) for row in x])
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize(("weight", "bias"), [(False, True), (True, False), (False, False)])
def test_gradients_stop_at_what_is_frozen(weight: bool, bias: bool) -> None:
    linear = wrapped(make(), Quantization(MXFP4, MXFP4))
    linear.weight.requires_grad_(weight)
    linear.bias.requires_grad_(bias)
    x = rand(3, 64).requires_grad_()
    linear(x).sum().backward()
    assert (linear.weight.grad is not None, linear.bias.grad is not None) == (weight, bias)
    assert same(x.grad, torch.ones(3, 48) @ MXFP4.fake_quantize(linear.weight.detach()))


def test_a_weight_used_twice_gets_the_sum_of_its_gradients() -> None:
    linear = wrapped(make(64, 64, bias=False), Quantization(MXFP4, MXFP4))
    x = rand(3, 64)
    middle = linear(x)
    linear(middle).sum().backward()
    qw, qx, qm = (MXFP4.fake_quantize(one.detach()) for one in (linear.weight, x, middle))
    ones = torch.ones(3, 64)
    expected = ones.T @ qm + (ones @ qw).T @ qx
    assert linear.weight.grad is not None
    assert torch.allclose(linear.weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_product_is_in_bfloat16_and_the_gradients_in_the_weights_dtype() -> None:
    linear = wrapped(make(), Quantization(MXFP4, MXFP4))
    x = rand(3, 64).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    y.sum().backward()
    qw, qx = (MXFP4.fake_quantize(one.detach()).bfloat16() for one in (linear.weight, x))
    assert torch.equal(y, nn.functional.linear(qx, qw, linear.bias.bfloat16()))
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


def test_a_token_under_nvfp4_does_not_depend_on_the_rest_of_its_batch() -> None:
    linear = wrapped(make(), Quantization(NVFP4, NVFP4))
    x = rand(4, 64)
    loud = torch.cat([x, 1000 * rand(1, 64)])
    assert torch.equal(linear(loud)[:4], linear(x))


def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    linear = wrapped(make(), Quantization(MXFP4, MXFP4))
    twin = copy.deepcopy(linear)
    x = rand(3, 64)
    assert torch.equal(twin(x), linear(x))
    assert twin.weight.data_ptr() != linear.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
def test_the_layer_compiles_without_a_break_and_gives_the_same() -> None:
    mine = NVFP4.with_fields("mine", block=32)  # fresh: nothing about it was computed before
    linear = wrapped(make(), Quantization(MXFP4, mine))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x, y = rand(3, 64).requires_grad_(), rand(3, 64).requires_grad_()
    result = compiled(y)
    expected = linear(x)
    expected.sum().backward()
    result.sum().backward()
    assert torch.equal(result, expected)
    assert y.grad is not None
    assert same(x.grad, y.grad)


def test_a_subclass_is_not_wrapped() -> None:
    attention = nn.MultiheadAttention(32, 4)
    with pytest.raises(SurgeryError) as caught:
        QuantLinear.wrap(attention.out_proj, Quantization(MXFP4, MXFP4))
    assert str(caught.value) == "it is a NonDynamicallyQuantizableLinear, not nn.Linear itself"


def test_a_layer_whose_forward_was_replaced_is_not_wrapped() -> None:
    linear = make()
    vars(linear)["forward"] = lambda x: x
    with pytest.raises(SurgeryError) as caught:
        QuantLinear.wrap(linear, Quantization(MXFP4, MXFP4))
    assert str(caught.value) == "its forward was replaced on the instance, so that wrapping would have no effect"


def test_quant_layers_names_them_in_the_models_order() -> None:
    model = nn.Sequential(make(), nn.ReLU(), make(48, 48), make(48, 48))
    QuantLinear.wrap(model[2], Quantization(MXFP4, MXFP4))
    QuantLinear.wrap(model[0], Quantization(MXFP4, MXFP4))
    assert list(quant_layers(model)) == ["0", "2"]


ROTATED = MXFP4.with_fields("rotated", hadamard=32, seed=7)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(Quantization(ROTATED, ROTATED), id="both"),
        pytest.param(Quantization(ROTATED, None), id="weight"),
        pytest.param(Quantization(None, ROTATED), id="input"),
    ],
)
def test_a_rotation_turns_both_operands_and_its_gradients_back(how: Quantization) -> None:
    linear, plain = make(), make()
    plain.load_state_dict(linear.state_dict())
    QuantLinear.wrap(linear, how)
    x = rand(5, 64).requires_grad_()
    y = linear(x)
    g = rand(48, 5).T
    y.backward(g)

    rotation, grid = ROTATED.rotation, ROTATED.without_rotation
    assert rotation is not None
    xr, wr = rotation(x.detach()), rotation(linear.weight.detach())
    xq = xr if how.input is None else grid.fake_quantize(xr)
    wq = wr if how.weight is None else grid.fake_quantize(wr)
    assert torch.equal(y, torch.nn.functional.linear(xq, wq, linear.bias))
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert torch.allclose(x.grad, rotation.back(g @ wq), atol=1e-5)
    assert linear.weight.grad is not None
    assert torch.allclose(linear.weight.grad, rotation.back(g.T @ xq), atol=1e-5)
    # Near the product without any rounding, so nothing was turned one way only.
    assert (y - plain(x)).norm() / plain(x).norm() < 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rotated_layer_keeps_the_dtype(dtype: torch.dtype) -> None:
    linear = wrapped(make().to(dtype), Quantization(ROTATED, ROTATED))
    x = rand(5, 64).to(dtype).requires_grad_()
    y = linear(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert x.grad.dtype == linear.weight.grad.dtype == dtype


def test_two_formats_that_cannot_be_a_products_are_refused() -> None:
    with pytest.raises(FormatError, match="both operands are rotated alike"):
        Quantization(ROTATED, MXFP4)
