"""The product of a rounded input with a rounded weight, and its gradient.

y = q(x) · q(W)ᵀ + b. Backward, rounding counts as the identity (Bengio et al., arXiv 1308.3432, section 4):
grad_x = g · q(W), grad_W = gᵀ · q(x). All that the second needs of x is q(x), which is kept as its packed codes and
scales; q(W) is rounded once more from the weight, which is there anyhow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsurgeon.errors import FormatError, GradientError, ShapeError
from qsurgeon.formats import Format, Quantized
from qsurgeon.formats.rotation import rotated
from qsurgeon.layers.codes import plain
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.rounding import Agreement, above_of, bits_of, coded, mask_of, rounded, saturated
from qsurgeon.storage.packed import from_stored, stored_shapes


def quantized_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Quantization, agree: Agreement | None = None
) -> Tensor:
    """Return q(x) · q(W)ᵀ + b, (..., outputs), for ``x`` (..., inputs) and ``weight`` (outputs, inputs).

    agree: where they are a process' parts of operands that several have together.

    Raises: GradientError under the transforms of torch.func, and in a backward pass that is itself to be
    differentiated; FormatError and ShapeError as the formats do.
    """
    _refuse_transforms(x, weight)
    numbers = _numbers(how)
    if not (torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, weight, bias))):
        values, turned = _values(x, how, numbers[0], agree), rotated(weight.detach(), how.rotation)
        above = above_of(turned, how.weight_grid, numbers[1], agree and agree.weight)
        return torch.nn.functional.linear(values, rounded(turned, how.weight_grid, above, weight.dtype), bias)
    wanted = _Wanted.of(x, weight, bias, how)
    result: Tensor = _Product.apply(x, weight, bias, how, wanted, *numbers, agree)  # type: ignore[no-untyped-call]
    return result


def _numbers(how: Quantization) -> tuple[Tensor | None, Tensor | None]:
    """Return the static scales of input and weight as torch.compile is to be told them; an eager product knows them."""
    return (how.input_number, how.weight_number) if torch.compiler.is_compiling() else (None, None)


def _values(x: Tensor, how: Quantization, number: Tensor | None, agree: Agreement | None) -> Tensor:
    """Return q(x)."""
    turned = rotated(x.detach(), how.rotation)
    return rounded(turned, how.input_grid, above_of(turned, how.input_grid, number, agree and agree.input), x.dtype)


def _refuse_transforms(*operands: Tensor) -> None:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if not torch.compiler.is_compiling() and any(map(wrapped, operands)):
        raise GradientError(
            "a QuantLinear cannot be transformed by torch.func (grad, vmap, jvp, jacrev): rounding has only the "
            "gradient of its backward pass; call backward() or torch.autograd.grad"
        )


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise GradientError(
            "the gradient of a QuantLinear cannot be differentiated again: rounding has no second derivative "
            "(backward was called with create_graph=True)"
        )


@dataclass(frozen=True)
class _Wanted:
    """Which gradients there are to be, and what they take."""

    input: bool
    weight: bool
    bias: bool
    packs: bool  # keeps q(x) as codes
    clips_input: bool
    clips_weight: bool

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, how: Quantization) -> "_Wanted":
        gradient = how.behavior.gradient
        for_input = x.requires_grad and (how.input is None or gradient != "none")
        for_weight = weight.requires_grad and (how.weight is None or gradient != "none")
        clips = gradient == "clipped"
        return cls(
            for_input,
            for_weight,
            bias is not None and bias.requires_grad,
            for_weight and how.input is not None and how.behavior.saved_inputs == "packed",
            for_input and clips and how.input is not None,
            for_weight and clips and how.weight is not None,
        )

    @property
    def reads_weight(self) -> bool:
        """Whether the backward pass rounds the weight again."""
        return self.input or self.clips_weight


def _weight(weight: Tensor, how: Quantization, above: Tensor | None) -> Tensor:
    """Return q(W) in the dtype of ``weight``, rotated where the formats rotate."""
    return rounded(rotated(weight.detach(), how.rotation), how.weight_grid, above, weight.dtype)


def _back(grad: Tensor, how: Quantization, outside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the gradient of an operand from that of what it was rounded to; zero where it saturated."""
    if outside is not None:
        grad = grad.masked_fill(outside, 0)
    return (grad if how.rotation is None else how.rotation.back(grad)).to(dtype)


class _Product(torch.autograd.Function):
    """What is saved: the weight itself, q(x), and where x saturated; nothing of what no gradient needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: Quantization,
        wanted: "_Wanted",
        input_number: Tensor | None,
        weight_number: Tensor | None,
        agree: Agreement | None,
    ) -> Tensor:
        ctx.how, ctx.wanted, ctx.inputs = how, wanted, weight.shape[-1]
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        saved: list[Tensor] = []
        turned, grid = rotated(x.detach(), how.rotation), how.input_grid
        above = above_of(turned, grid, input_number, agree and agree.input)
        if wanted.packs and grid is not None:
            codes = coded(turned, grid, above)
            saved = [one for one in (codes.data, codes.scale, codes.tensor_scale) if one is not None]
            values = codes.dequantize().to(x.dtype)
        else:
            values = rounded(turned, grid, above, x.dtype)
            if wanted.weight:
                # Where nothing was rounded it is the input itself, which autograd must know as such.
                saved = [x if how.input is None and how.rotation is None else values]
        if wanted.clips_input and grid is not None:
            saved.append(bits_of(saturated(turned, grid, above)))
        turned = rotated(weight.detach(), how.rotation)
        above = above_of(turned, how.weight_grid, weight_number, agree and agree.weight)
        ctx.is_under = above is not None
        if wanted.reads_weight:
            saved += [weight] if above is None else [above, weight]
        ctx.save_for_backward(*saved)
        values_of_weight = rounded(turned, how.weight_grid, above, weight.dtype)
        return _of_its_own(torch.nn.functional.linear(values, values_of_weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        _refuse_second_derivative()
        how, wanted, saved = ctx.how, ctx.wanted, list(ctx.saved_tensors)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        weight = _once_more(saved.pop()) if wanted.reads_weight else None
        above = _once_more(saved.pop()) if wanted.reads_weight and ctx.is_under else None
        bits = saved.pop() if wanted.clips_input else None
        flat = _matrix(grad)
        grad_x = grad_weight = grad_bias = None
        if wanted.input and weight is not None:
            product = (flat @ _weight(weight, how, above)[0].to(grad.dtype)).reshape(*grad.shape[:-1], ctx.inputs)
            outside = None if bits is None else mask_of(bits, ctx.inputs)
            grad_x = _back(product, how, outside, x_dtype)
        if wanted.weight:
            grid = how.input_grid
            values = _opened(saved, grid, ctx.inputs, x_dtype) if wanted.packs and grid is not None else saved[0]
            product = flat.T @ _matrix(values.to(grad.dtype))
            outside, grid = None, how.weight_grid
            if wanted.clips_weight and grid is not None and weight is not None:
                outside = saturated(rotated(weight.detach(), how.rotation), grid, above)[0]
            grad_weight = _back(product, how, outside, weight_dtype)
        if wanted.bias:
            grad_bias = flat.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _of_its_own(output: Tensor) -> Tensor:
    """Return ``output``, the view of another tensor where it is one, as a tensor of its own in the same memory.

    linear computes some products as a matrix, and returns a view of that. Autograd refuses to change the view that a
    Function returns in place, which it allows of what nn.Linear returns.
    """
    if not torch.compiler.is_compiling() and not output._is_view():
        return output
    own: Tensor = torch.ops.aten._unsafe_view(output, output.shape)  # as in torch 2.13
    return own


def _matrix(rows: Tensor) -> Tensor:
    """Return ``rows`` (..., k) as (rows, k); k may be 0, which leaves reshape(-1, k) no answer."""
    return rows.flatten(0, -2) if rows.dim() > 1 else rows[None]


def _once_more(operand: Tensor) -> Tensor:
    """Return ``operand`` in one dimension more, for what the backward pass computes again.

    torch.compile sees both passes in one graph, and computes once what they have in common: in the shape of the
    forward pass, q(W) and all of q(x) would be that, and be kept in place of the weight and of the codes.
    """
    return operand[None] if operand.dim() else operand


def _opened(saved: list[Tensor], format: Format, length: int, dtype: torch.dtype) -> Tensor:
    """Return q(x) from the codes and scales that ``saved`` holds, in the order of Quantized's fields."""
    data, *scales = map(_once_more, saved)
    scale = scales.pop(0) if format.scale is not None else None
    above = scales.pop(0) if format.tensor_scale != "none" else None
    return Quantized(data, scale, above, format, dtype, length).dequantize()


# ---- with a packed weight


def packed_linear(
    x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, how: Quantization, agree: Agreement | None = None
) -> Tensor:
    """Return q(x) · q(W)ᵀ + b, (..., outputs), for a weight stored as in storage/packed.py.

    W is opened in the dtype that the product is computed in: autocast's inside of it, the input's outside. It lives
    for the product alone: backward keeps the codes, and opens them again.

    Raises: as ``quantized_linear``; ShapeError also for an input that is not floating point: what was cast to the dtype
    of codes is lost.
    """
    if not x.is_floating_point():
        raise ShapeError(
            f"a packed layer was called with {x.dtype}; expected floating point. Its codes are torch.uint8; cast "
            "an input to the layer's compute_dtype"
        )
    _refuse_transforms(x, *stored)
    dtype, (number, _) = _product_dtype(x), _numbers(how)
    if not (torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, bias))):
        return _times_opened(_values(x, how, number, agree).to(dtype), stored, bias, how)
    wanted = _Wanted.of(x, stored[0], bias, how)
    result: Tensor = _PackedProduct.apply(x, bias, how, wanted, dtype, number, agree, *stored)  # type: ignore[no-untyped-call]
    return result


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _PackedProduct(torch.autograd.Function):
    """What is saved: the weight's codes and scales, and where x saturated. The weight has no gradient, so q(x) not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        how: Quantization,
        wanted: _Wanted,
        dtype: torch.dtype,
        number: Tensor | None,
        agree: Agreement | None,
        *stored: Tensor,
    ) -> Tensor:
        ctx.how, ctx.wanted, ctx.inputs, ctx.stored = how, wanted, x.shape[-1], len(stored)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        turned, grid = rotated(x.detach(), how.rotation), how.input_grid
        above = above_of(turned, grid, number, agree and agree.input)
        saved = [*stored] if wanted.input else []
        if wanted.clips_input and grid is not None:
            saved.append(bits_of(saturated(turned, grid, above)))
        ctx.save_for_backward(*saved)
        return _of_its_own(_times_opened(rounded(turned, grid, above, x.dtype).to(dtype), stored, bias, how))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        _refuse_second_derivative()
        how, wanted, saved = ctx.how, ctx.wanted, list(ctx.saved_tensors)
        x_dtype, bias_dtype = ctx.dtypes
        bits = saved.pop() if wanted.clips_input else None
        flat = _matrix(grad)
        grad_x = None
        if wanted.input:
            product = _opened_times(flat, saved, how, ctx.inputs).reshape(*grad.shape[:-1], ctx.inputs)
            outside = None if bits is None else mask_of(bits, ctx.inputs)
            grad_x = _back(product, how, outside, x_dtype)
        grad_bias = flat.sum(0).to(bias_dtype) if wanted.bias else None
        return grad_x, grad_bias, None, None, None, None, None, *[None] * ctx.stored


def _times_opened(values: Tensor, stored: Sequence[Tensor], bias: Tensor | None, how: Quantization) -> Tensor:
    """Return values · Wᵀ + b in the dtype of ``values``."""
    grid = packed_format(how)
    bias = bias if bias is None else bias.to(values.dtype)
    if torch.compiler.is_compiling():
        result: Tensor = _forward_op(values, bias, list(stored), grid.name, grid.without_number.key)
        return result
    return torch.nn.functional.linear(values, _open(stored, grid, values.shape[-1], values.dtype), bias)


def _opened_times(grad: Tensor, stored: Sequence[Tensor], how: Quantization, inputs: int) -> Tensor:
    """Return grad · W, (rows, inputs), in the dtype of ``grad``."""
    grid = packed_format(how)
    if torch.compiler.is_compiling():
        result: Tensor = _backward_op(grad, list(stored), grid.name, grid.without_number.key, inputs)
        return result
    return grad @ _open(stored, grid, inputs, grad.dtype)


def packed_format(how: Quantization) -> Format:
    """Return the format of a packed weight's codes. Raises: FormatError if the weight has no format."""
    grid = how.weight_grid
    if grid is None:
        raise FormatError("a weight without a format cannot be packed")
    return grid


def _open(stored: Sequence[Tensor], grid: Format, inputs: int, dtype: torch.dtype) -> Tensor:
    names = stored_shapes(grid, 0, 0)
    return from_stored(dict(zip(names, map(plain, stored), strict=True)), grid, inputs, dtype).dequantize()


# Opaque to torch.compile, which would otherwise open a weight once for forward and backward, and keep it in between.


@torch.library.custom_op("qsurgeon::times_opened", mutates_args=())
def _forward_op(values: Tensor, bias: Tensor | None, stored: list[Tensor], name: str, key: str) -> Tensor:
    weight = _open(stored, Format.from_key(name, key), values.shape[-1], values.dtype)
    return torch.nn.functional.linear(values, weight, bias)


@_forward_op.register_fake
def _(values: Tensor, bias: Tensor | None, stored: list[Tensor], name: str, key: str) -> Tensor:
    return values.new_empty(*values.shape[:-1], stored[0].shape[0])


@torch.library.custom_op("qsurgeon::opened_times", mutates_args=())
def _backward_op(grad: Tensor, stored: list[Tensor], name: str, key: str, inputs: int) -> Tensor:
    return grad @ _open(stored, Format.from_key(name, key), inputs, grad.dtype)


@_backward_op.register_fake
def _(grad: Tensor, stored: list[Tensor], name: str, key: str, inputs: int) -> Tensor:
    return grad.new_empty(grad.shape[0], inputs)
