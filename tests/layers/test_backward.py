"""``backward: high_precision``: the output of rounded operands, and the gradients of the operands before rounding."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qsurgeon
from qsurgeon.errors import PlanError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear
from qsurgeon.layers.kinds import KINDS
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.words import Behavior

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4")
ROTATED = MXFP4.with_fields("rotated", hadamard=32)
FORMATS = {"mxfp4": (MXFP4, MXFP4), "nvfp4": (NVFP4, NVFP4), "weight": (MXFP4, None), "input": (None, MXFP4)}
FORMATS["rotated"] = (ROTATED, ROTATED)
EXACT = Behavior(backward="high_precision")


def gradients(layer: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output of a layer, and the gradients of its input, weight and bias."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()  # type: ignore[return-value]


def pair(formats: str, dtype: torch.dtype, behavior: Behavior = EXACT) -> tuple[Any, Any]:
    """Return a Linear, and a wrapped one with the same weights."""
    plain = nn.Linear(64, 32)
    wrapped = nn.Linear(64, 32)
    wrapped.load_state_dict(plain.state_dict())
    QuantLinear.wrap(wrapped, Quantization(*FORMATS[formats], behavior))
    return plain.to(dtype), wrapped.to(dtype)


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["rows", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("formats", FORMATS)
def test_gradients_are_those_of_a_linear_to_the_bit(formats: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plain, wrapped = pair(formats, dtype)
    x, grad = torch.randn(*shape, 64).to(dtype), torch.randn(*shape, 32).to(dtype)
    (_, *expected), (y, *found) = gradients(plain, x, grad), gradients(wrapped, x, grad)
    for name, one, other in zip(("input", "weight", "bias"), expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0 if name != "bias" else 1e-2, msg=name)
    rounded = pair(formats, dtype, Behavior())[1]
    rounded.load_state_dict(wrapped.state_dict())
    y_rounded, *other_gradients = gradients(rounded, x, grad)
    assert torch.equal(y, y_rounded)
    assert not torch.equal(y, plain(x))
    differs = [not torch.equal(one, other) for one, other in zip(found, other_gradients, strict=True)]
    assert differs == [formats != "input", formats != "weight", False]


def test_a_conv1d_has_the_gradients_of_a_conv1d() -> None:
    plain, wrapped = Conv1D(32, 64), Conv1D(32, 64)
    wrapped.load_state_dict(plain.state_dict())
    KINDS["Conv1D"].wrap(wrapped, {"weight": Quantization(MXFP4, MXFP4, EXACT)})
    x, grad = torch.randn(5, 64), torch.randn(5, 32)
    (_, *expected), (_, *found) = gradients(plain, x, grad), gradients(wrapped, x, grad)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 17 * 8),  # codes of 32 values with a scale: 17 bytes
        ({"saved_inputs": "full"}, 64 * 4 * 4),
        ({"backward": "high_precision"}, 64 * 4 * 4),
        ({"backward": "high_precision", "saved_inputs": "packed"}, 64 * 4 * 4),
    ],
    ids=["packed", "full", "exact", "exact-packed"],
)
def test_what_is_kept_of_an_input(fields: dict[str, Any], kept: int) -> None:
    """Of 4 rows of 64 numbers in float32: 8 blocks of 32."""
    _, wrapped = pair("mxfp4", torch.float32, Behavior(**fields))
    sizes = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape != wrapped.weight.shape:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wrapped(torch.randn(4, 64, requires_grad=True))
    assert sum(sizes) == kept


def test_only_what_learns_has_a_gradient() -> None:
    plain, wrapped = pair("mxfp4", torch.float32)
    for layer in (plain, wrapped):
        layer.weight.requires_grad_(False)
    x, grad = torch.randn(4, 64), torch.randn(4, 32)
    found = []
    for layer in (plain, wrapped):
        mine = x.clone().requires_grad_()
        layer(mine).backward(grad)
        assert layer.weight.grad is None
        found.append(mine.grad)
    assert torch.equal(found[0], found[1])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_compiled_it_is_the_same() -> None:
    _, wrapped = pair("mxfp4", torch.float32)
    compiled: Any = torch.compile(wrapped, backend="aot_eager")
    x, grad = torch.randn(4, 64), torch.randn(4, 32)
    expected = gradients(wrapped, x, grad)
    wrapped.zero_grad()
    mine = x.clone().requires_grad_()
    y = compiled(mine)
    y.backward(grad)
    for one, other in zip(expected, (y, mine.grad, wrapped.weight.grad, wrapped.bias.grad), strict=True):
        torch.testing.assert_close(other, one)
    torch._dynamo.reset()


@pytest.mark.parametrize("gradient", ["clipped", "none"])
def test_another_gradient_of_the_rounding_is_refused(gradient: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Rule(target=("layers",), weight="mxfp4", gradient=gradient, backward="high_precision")
    assert str(caught.value.errors()[0]["ctx"]["error"]) == (
        "'backward: high_precision' has the gradient of a product without rounding, and 'gradient: "
        f"{gradient}' is of one with it; say 'gradient: ste', or leave 'backward' out"
    )


def test_packed_weights_refuse_it(tiny_qwen2: Any) -> None:
    rule = Rule(name="all", target=("layers",), weight="mxfp4", backward="high_precision")
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(Recipe(version=1, storage="packed", rules=(rule,)), tiny_qwen2)
    assert str(caught.value) == (
        "rules[0].backward: rule 'all': a packed weight has no values in high precision that a backward pass could "
        "multiply with; say 'storage: master', or leave the weight out of the rule"
    )


def test_a_checkpoint_keeps_it(tiny_qwen2: Any, tmp_path: Any) -> None:
    rule = Rule(name="all", target=("layers",), weight="mxfp4", input="mxfp4", backward="high_precision")
    qsurgeon.apply(Recipe(version=1, rules=(rule,)), tiny_qwen2)
    tiny_qwen2.save_pretrained(tmp_path)
    loaded = qsurgeon.load(tmp_path)
    assert loaded.model.layers[0].mlp.up_proj.quantization.behavior == EXACT
    why = {row.why for row in qsurgeon.inspect(loaded).rows if row.is_wrapped}
    assert why == {"rule 'all', backward with high_precision operands"}
