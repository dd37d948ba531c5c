"""What a QuantLinear keeps for its backward pass, and what gradients it gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsurgeon.errors import GradientError
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.formats.kernels import operations
from qsurgeon.layers import Quantization, QuantLinear

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4")
ROTATED = MXFP4.with_fields("rotated", hadamard=32, seed=7)
DITHERED = MXFP4.with_fields("dithered", rounding="stochastic", seed=3)
STATIC = NVFP4.with_fields("static", tensor_scale="static", static_scale=0.01)
INPUTS = [one for one in CATALOG.values() if not one.is_two_dimensional] + [ROTATED, DITHERED, STATIC]


def make(how: Quantization, inputs: int = 64, outputs: int = 48, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, dtype=dtype)
    QuantLinear.wrap(linear, how)
    return linear


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(linear: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor | None]:
    """Return the output and the gradients of one step."""
    x = x.detach().requires_grad_()
    linear.zero_grad(set_to_none=True)
    y = linear(x)
    y.backward(grad)
    return {"output": y.detach(), "input": x.grad, "weight": linear.weight.grad, "bias": linear.bias.grad}


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> None:
    for key, value in one.items():
        wanted = other[key]
        assert (value is None) == (wanted is None), key
        assert value is None or wanted is None or torch.equal(value, wanted), key


def saved_bytes(act: Callable[[], Tensor], apart_from: nn.Module) -> int:
    """Return the bytes that autograd keeps while ``act`` runs, without the parameters, which are there anyhow."""
    known = {one.data_ptr() for one in apart_from.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        act()
    return sum(kept.values())


@pytest.mark.parametrize("gradient", ["ste", "clipped", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", INPUTS, ids=lambda one: one.name)
def test_packed_inputs_give_the_gradients_of_full_ones_to_the_bit(
    format: Format, dtype: torch.dtype, gradient: str
) -> None:
    how = Quantization(ROTATED if format is ROTATED else MXFP4, format, gradient)  # type: ignore[arg-type]
    x, grad = rand(2, 5, 64, dtype=dtype), rand(2, 5, 48, dtype=dtype, seed=2)
    packed, full = (
        make(how, dtype=dtype),
        make(Quantization(how.weight, how.input, how.behavior, saved_inputs="full"), dtype=dtype),
    )
    same(step(packed, x, grad), step(full, x, grad))


@pytest.mark.parametrize(
    ("name", "most"), [("mxfp4", 0.2657), ("nvfp4", 0.2833), ("int4_b32", 0.30), ("mxfp8_e4m3", 0.516)]
)
def test_what_is_kept_of_a_bfloat16_input_is_its_codes_and_scales(name: str, most: float) -> None:
    format = get_format(name)
    how = Quantization(MXFP4, format)
    x = rand(64, 1024, dtype=torch.bfloat16)
    plain = nn.Linear(1024, 32, dtype=torch.bfloat16)
    whole = saved_bytes(lambda: plain(x.requires_grad_()), plain)
    assert whole == x.numel() * 2
    linear = make(how, 1024, 32, torch.bfloat16)
    assert 0.25 * whole <= saved_bytes(lambda: linear(x), linear) <= most * whole
    linear = make(Quantization(how.weight, how.input, how.behavior, saved_inputs="full"), 1024, 32, torch.bfloat16)
    assert saved_bytes(lambda: linear(x), linear) == whole


def test_clipping_keeps_one_more_bit_a_value() -> None:
    x = rand(64, 1024, dtype=torch.bfloat16).requires_grad_()
    ste, clipped = (make(Quantization(MXFP4, MXFP4, how), 1024, 32, torch.bfloat16) for how in ("ste", "clipped"))
    assert saved_bytes(lambda: clipped(x), clipped) - saved_bytes(lambda: ste(x), ste) == x.numel() // 8


def test_a_frozen_weight_keeps_nothing_of_the_input() -> None:
    linear = make(Quantization(MXFP4, MXFP4))
    linear.weight.requires_grad_(False)
    x = rand(3, 64).requires_grad_()
    assert saved_bytes(lambda: linear(x), linear) == 0
    assert step(linear, x, rand(3, 48))["weight"] is None


@pytest.mark.parametrize("columns", [64, 61])  # 61: neither a block nor a byte of bits divides it
def test_clipped_gives_the_gradients_of_its_formula(columns: int) -> None:
    linear = make(Quantization(MXFP4, MXFP4, "clipped"), columns)
    x, grad = rand(5, columns), rand(5, 48, seed=2)
    weight = linear.weight.detach()
    outside, weight_outside = MXFP4.saturates(x), MXFP4.saturates(weight)
    assert outside.any()
    assert weight_outside.any()
    result = step(linear, x, grad)
    assert torch.equal(result["input"], (grad @ MXFP4.fake_quantize(weight)).masked_fill(outside, 0))  # type: ignore[arg-type]
    assert torch.equal(result["weight"], (grad.T @ MXFP4.fake_quantize(x)).masked_fill(weight_outside, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "input", "gone"),
    [
        pytest.param(MXFP4, MXFP4, {"input", "weight"}, id="w4a4"),
        pytest.param(MXFP4, None, {"weight"}, id="weight"),
        pytest.param(None, MXFP4, {"input"}, id="input"),
    ],
)
def test_none_blocks_the_gradient_of_what_is_rounded_and_of_nothing_else(
    weight: Format | None, input: Format | None, gone: set[str]
) -> None:
    result = step(make(Quantization(weight, input, "none")), rand(3, 64), rand(3, 48))
    assert {key for key, value in result.items() if value is None} == gone


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", [Quantization(MXFP4, MXFP4), Quantization(DITHERED, DITHERED)], ids=["near", "random"])
def test_checkpointing_changes_no_bit(how: Quantization, reentrant: bool) -> None:
    linear = make(how)
    x, grad = rand(3, 64), rand(3, 48)
    expected = step(linear, x, grad)
    inside = linear.forward
    vars(linear)["forward"] = lambda x: checkpoint(inside, x, use_reentrant=reentrant)
    same(step(linear, x, grad), expected)


def test_the_backward_pass_rounds_the_weight_that_the_forward_pass_saw() -> None:
    linear = make(Quantization(MXFP4, MXFP4))
    y = linear(rand(3, 64).requires_grad_())
    with torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    linear = make(Quantization(MXFP4, MXFP4))
    x = rand(3, 64).requires_grad_()
    with pytest.raises(GradientError) as caught:
        torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    assert str(caught.value) == (
        "the gradient of a QuantLinear cannot be differentiated again: rounding has no second derivative "
        "(backward was called with create_graph=True)"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # jacfwd's own
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.jacfwd])
def test_the_transforms_of_torch_func_are_refused(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    linear = make(Quantization(MXFP4, MXFP4))
    with pytest.raises(GradientError) as caught:
        transform(lambda x: linear(x).sum())(rand(3, 64))
    assert str(caught.value) == (
        "a QuantLinear cannot be transformed by torch.func (grad, vmap, jvp, jacrev): rounding has only the "
        "gradient of its backward pass; call backward() or torch.autograd.grad"
    )


def test_a_call_with_other_parameters_is_no_transform() -> None:
    linear = make(Quantization(MXFP4, MXFP4))
    x, zeros = rand(3, 64), {"weight": torch.zeros(48, 64), "bias": torch.ones(48)}
    assert torch.equal(torch.func.functional_call(linear, zeros, x), torch.ones(3, 48))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize(
    ("format", "gradient"),
    [(MXFP4, "ste"), (NVFP4, "clipped"), (ROTATED, "none"), (STATIC, "ste")],
    ids=["mxfp4", "nvfp4", "rotated", "static"],
)
def test_compiled_whole_it_gives_the_same_gradients(format: Format, gradient: str) -> None:
    how = Quantization(format, format, gradient)  # type: ignore[arg-type]
    x, grad = rand(2, 5, 64), rand(2, 5, 48, seed=2)
    linear = make(how)
    expected = step(linear, x, grad)
    torch.compiler.reset()  # each layer alone counts as a recompilation of the same code
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = x.detach().requires_grad_()
    linear.zero_grad(set_to_none=True)
    y = compiled(x)
    y.backward(grad)
    result = {"output": y.detach(), "input": x.grad, "weight": linear.weight.grad, "bias": linear.bias.grad}
    same(result, expected)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("seen", ["operators", "operations"])  # what a CPU and what a GPU shows to torch.compile
@pytest.mark.parametrize(
    ("format", "gradient", "count"),
    [
        pytest.param(MXFP4, "ste", 3, id="mxfp4"),
        pytest.param(NVFP4, "ste", 3, id="nvfp4"),
        pytest.param(MXFP4, "clipped", 3, id="clipped"),
        pytest.param(STATIC, "ste", 3, id="static"),
        pytest.param(ROTATED, "ste", 1, id="rotated"),  # each layer's signs are a constant of its own
    ],
)
def test_compiled_layers_keep_the_codes_of_their_input_once_and_no_rounded_weight(
    format: Format, gradient: str, count: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seen == "operations":
        monkeypatch.setattr(operations, "is_opaque", lambda rows: False)
    x = rand(64, 1024, dtype=torch.bfloat16).requires_grad_()
    how = Quantization(format, format, gradient)  # type: ignore[arg-type]
    layers = nn.ModuleList([make(how, 1024, 512, torch.bfloat16) for _ in range(count)])
    torch.compiler.reset()
    compiled = torch.compile(lambda x: sum(layer(x) for layer in layers), fullgraph=True, backend="aot_eager")
    most = 0.30 + (1 / 16 if gradient == "clipped" else 0)
    assert 0.25 <= saved_bytes(lambda: compiled(x), layers) / (x.numel() * 2) <= most


@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_codes_of_full_precision_inputs(format: Format, dtype: torch.dtype) -> None:
    linear = make(Quantization(format, format))
    x, grad = rand(3, 64), rand(3, 48, dtype=dtype, seed=2)
    with torch.autocast("cpu", dtype=dtype):
        result = step(linear, x, grad)
    qw, qx = (format.as_weight.fake_quantize(linear.weight.detach()), format.as_input.fake_quantize(x))
    assert result["output"] is not None
    assert result["output"].dtype == dtype
    assert torch.equal(result["input"], (grad @ qw.to(dtype)).float())  # type: ignore[arg-type]
    assert torch.equal(result["weight"], (grad.T @ qx.to(dtype)).float())  # type: ignore[arg-type]
