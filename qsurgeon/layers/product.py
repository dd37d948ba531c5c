"""The product of a rounded input with a rounded weight, and its gradient.

y = q(x) · q(W)ᵀ + b. Backward, rounding counts as the identity (Bengio et al., arXiv 1308.3432, section 4):
grad_x = g · q(W), grad_W = gᵀ · q(x). All that the second needs of x is q(x), which is kept as its packed codes and
scales; q(W) is rounded once more from the weight, which is there anyhow, or dequantized from its codes.

Under ``backward: high_precision`` they are g · W and gᵀ · x, as if nothing had been rounded; x is kept as it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from qsurgeon.errors import GradientError, ShapeError
from qsurgeon.formats import Quantized
from qsurgeon.formats.rotation import rotated
from qsurgeon.layers.added import Added
from qsurgeon.layers.dequantized import backward_product, forward_product
from qsurgeon.layers.phases.state import current
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.rounding import (
    ALONE,
    Agreement,
    above_of,
    bits_of,
    coded,
    dequantized,
    mask_of,
    rounded,
    saturated,
)
from qsurgeon.torch_private import is_transformed, is_view, unsafe_view


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: Quantization,
    agree: Agreement | None = None,
    name: str = "",
    added: Added | None = None,
) -> Tensor:
    """Return q(x) · q(W)ᵀ + b, (..., outputs), for ``x`` (..., inputs) and ``weight`` (outputs, inputs).

    agree: where they are a process' parts of operands that several have together. name: of the layer, for errors.
    added: what is added to the weight before it is rounded, q(x) · q(W + ΔW)ᵀ + b.

    Raises: GradientError under the transforms of torch.func, and in a backward pass that is itself to be
    differentiated; FormatError and ShapeError as the formats do.
    """
    if added is not None:
        return _merged_linear(x, weight, bias, how, name, added)
    _refuse_transforms(x, weight)
    numbers, agree = _numbers(how), agree or ALONE
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or _is_trained(bias)):
        task = _Task(how, _Wanted.of(x, weight, bias, how), weight.dtype, False, agree)
        result: Tensor = _Product.apply(x, bias, task, *numbers, weight)  # type: ignore[no-untyped-call]
        return result
    values = rounded_input(x, how, numbers[0], agree)
    keeping = None if torch.compiler.is_compiling() or agree is not ALONE else current().keeping
    if keeping is None:
        return linear(values, rounded_weight(weight, how, numbers[1], agree), bias)
    return linear(values, keeping.rounded(weight, how, rounded_weight, name), bias)


def _merged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Quantization, name: str, added: Added
) -> Tensor:
    """Return q(x) · q(W + ΔW)ᵀ + b."""
    keeping = None if torch.compiler.is_compiling() else current().keeping
    is_trained = added.is_trained or x.requires_grad or weight.requires_grad or _is_trained(bias)
    if keeping is None or (torch.is_grad_enabled() and is_trained):
        with added.summed(weight) as total:
            return quantized_linear(x, total, bias, how, name=name)

    def round_sum(weight: Tensor, how: Quantization) -> Tensor:
        return rounded_weight(added.to(weight.detach()), how)

    _refuse_transforms(x, weight)
    values = rounded_input(x, how, None, ALONE)
    return linear(values, keeping.rounded(weight, how, round_sum, name, added.besides), bias)


def packed_linear(
    x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, how: Quantization, agree: Agreement | None = None
) -> Tensor:
    """Return q(x) · q(W)ᵀ + b, (..., outputs), for a weight stored as in storage/packed.py.

    W is dequantized in the dtype that the product is computed in: autocast's inside of it, the input's outside. It
    lives for the product alone: backward keeps the codes, and dequantizes them again. Where no gradient is wanted of
    a few rows the product may read the codes, see formats/kernels/few_rows.py.

    Raises: as ``quantized_linear``; ShapeError also for an input that is not floating point: what a model casts to
    the dtype of a packed weight is lost.
    """
    if not x.is_floating_point():
        raise ShapeError(
            f"a packed layer was called with {x.dtype}; expected floating point. Its codes are torch.uint8; cast an "
            "input to the layer's compute_dtype"
        )
    _refuse_transforms(x, *stored)
    dtype, numbers, agree = _product_dtype(x), _numbers(how), agree or ALONE
    if torch.is_grad_enabled() and (x.requires_grad or _is_trained(bias)):
        task = _Task(how, _Wanted.of(x, stored[0], bias, how), dtype, True, agree)
        result: Tensor = _Product.apply(x, bias, task, numbers[0], None, *stored)  # type: ignore[no-untyped-call]
        return result
    values = rounded_input(x, how, numbers[0], agree).to(dtype)
    return forward_product(values, stored, bias, how, reads_codes=True)


def _is_trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _numbers(how: Quantization) -> tuple[Tensor | None, Tensor | None]:
    """Return the static scales of input and weight as torch.compile is to be told them; an eager product knows them."""
    return (how.input_number, how.weight_number) if torch.compiler.is_compiling() else (None, None)


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _refuse_transforms(*operands: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    for one in operands:
        if is_transformed(one):
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


def rounded_input(x: Tensor, how: Quantization, number: Tensor | None, agree: Agreement = ALONE) -> Tensor:
    """Return q(x), rotated where the formats rotate."""
    turned, grid = rotated(x.detach(), how.rotation), how.input_grid
    return rounded(turned, grid, above_of(turned, grid, number, agree.input), x.dtype)


def rounded_weight(weight: Tensor, how: Quantization, number: Tensor | None = None, agree: Agreement = ALONE) -> Tensor:
    """Return q(W) in the dtype of ``weight``, rotated where the formats rotate."""
    turned, grid = rotated(weight.detach(), how.rotation), how.weight_grid
    return rounded(turned, grid, above_of(turned, grid, number, agree.weight), weight.dtype)


# ---- the gradient


class _Wanted(NamedTuple):
    """Which gradients there are to be, and what they take."""

    input: bool
    weight: bool
    bias: bool
    packs: bool  # keeps q(x) as codes
    clips_input: bool
    clips_weight: bool
    exact: bool  # of the product as it is without rounding

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, how: Quantization) -> "_Wanted":
        behavior = how.behavior
        gradient = behavior.gradient
        for_input = x.requires_grad and (how.input is None or gradient != "none")
        for_weight = weight.requires_grad and (how.weight is None or gradient != "none")
        clips, is_exact = gradient == "clipped", behavior.backward == "high_precision"
        return cls(
            for_input,
            for_weight,
            _is_trained(bias),
            for_weight and how.input is not None and behavior.saved_inputs == "packed" and not is_exact,
            for_input and clips and how.input is not None,
            for_weight and clips and how.weight is not None,
            is_exact,
        )

    @property
    def reads_weight(self) -> bool:
        """Whether the backward pass needs the weight."""
        return self.input or self.clips_weight


class _Task(NamedTuple):
    """What a product computes. dtype: of its weight's values."""

    how: Quantization
    wanted: _Wanted
    dtype: torch.dtype
    is_packed: bool
    agree: Agreement


class _Saved(NamedTuple):
    """What the forward pass leaves to the backward pass; None where no gradient needs it."""

    values: Tensor | None = None  # q(x), or x itself where nothing is rounded
    data: Tensor | None = None  # q(x) as packed codes, with their scales
    scale: Tensor | None = None
    tensor_scale: Tensor | None = None
    outside: Tensor | None = None  # where x saturated, as bits
    above: Tensor | None = None  # the tensor scale of the weight, where it came from outside
    weight: tuple[Tensor, ...] = ()  # the weight itself, or its codes and scales

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> "_Saved":
        """Return what was saved as ``tensors``."""
        values, data, scale, tensor_scale, outside, above, *weight = tensors
        return cls(values, data, scale, tensor_scale, outside, above, tuple(weight))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of it as autograd keeps it."""
        return (*self[:-1], *self.weight)


class _Product(torch.autograd.Function):
    """q(x) · q(W)ᵀ + b, for a weight that is one tensor, or the codes and scales that a packed one is stored as."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        task: _Task,
        input_number: Tensor | None,
        weight_number: Tensor | None,
        *weight: Tensor,
    ) -> Tensor:
        how, wanted, _, is_packed, agree = task
        ctx.task, ctx.inputs, ctx.count = task, x.shape[-1], len(weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        values, saved = _forward_input(x, task, input_number)
        if is_packed:
            output = forward_product(values.to(task.dtype), weight, bias, how)
        else:
            turned, grid = rotated(weight[0].detach(), how.rotation), how.weight_grid
            above = above_of(turned, grid, weight_number, agree.weight)
            saved = saved._replace(above=above) if wanted.reads_weight and above is not None else saved
            output = linear(values, rounded(turned, grid, above, task.dtype), bias)
        saved = saved._replace(weight=weight) if wanted.reads_weight else saved
        ctx.save_for_backward(*saved.tensors)
        return _of_its_own(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        _refuse_second_derivative()
        task, saved, (x_dtype, bias_dtype) = ctx.task, _Saved.of(ctx.saved_tensors), ctx.dtypes
        wanted, flat = task.wanted, _matrix(grad)
        grad_bias = flat.sum(0).to(bias_dtype) if wanted.bias else None
        if wanted.exact:
            grad_x, grad_weight = _exact_gradients(grad, flat, task, saved, x_dtype)
            return grad_x, grad_bias, None, None, None, grad_weight, *[None] * (ctx.count - 1)
        grad_x = grad_weight = None
        weight = _once_more(saved.weight[0]) if wanted.reads_weight and not task.is_packed else None
        if wanted.input:
            product = _times_weight(flat, weight, task, saved, ctx.inputs)
            outside = None if saved.outside is None else mask_of(saved.outside, ctx.inputs)
            grad_x = _back(product.reshape(*grad.shape[:-1], ctx.inputs), task.how, outside, x_dtype)
        if wanted.weight:
            outside = _saturated_weight(weight, task, saved) if wanted.clips_weight and weight is not None else None
            product = flat.T @ _matrix(_input_values(task, saved, ctx.inputs, x_dtype).to(grad.dtype))
            grad_weight = _back(product, task.how, outside, task.dtype)
        return grad_x, grad_bias, None, None, None, grad_weight, *[None] * (ctx.count - 1)


def _exact_gradients(
    grad: Tensor, flat: Tensor, task: _Task, saved: _Saved, x_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of input and weight as nn.Linear has them: of the operands before rounding."""
    grad_x = grad_weight = None
    if task.wanted.input:
        product = flat @ saved.weight[0].to(grad.dtype)
        grad_x = product.reshape(*grad.shape[:-1], product.shape[-1]).to(x_dtype)
    if task.wanted.weight and saved.values is not None:
        grad_weight = (flat.T @ _matrix(saved.values).to(grad.dtype)).to(task.dtype)
    return grad_x, grad_weight


def _forward_input(x: Tensor, task: _Task, number: Tensor | None) -> tuple[Tensor, _Saved]:
    """Return q(x), and what is saved of it."""
    how, wanted, grid = task.how, task.wanted, task.how.input_grid
    turned = rotated(x.detach(), how.rotation)
    above = above_of(turned, grid, number, task.agree.input)
    if grid is None:
        values = turned.to(x.dtype)
        # Where nothing was rounded it is the input itself, which autograd must know as such.
        is_itself = how.rotation is None or wanted.exact
        return values, _Saved(values=x if is_itself else values) if wanted.weight else _Saved()
    if wanted.exact:
        return rounded(turned, grid, above, x.dtype), _Saved(values=x) if wanted.weight else _Saved()
    outside = bits_of(saturated(turned, grid, above)) if wanted.clips_input else None
    if wanted.packs:
        values, codes = coded(turned, grid, above, x.dtype)
        return values, _Saved(None, codes.data, codes.scale, codes.tensor_scale, outside)
    values = rounded(turned, grid, above, x.dtype)
    return values, _Saved(values=values if wanted.weight else None, outside=outside)


def _times_weight(grad: Tensor, weight: Tensor | None, task: _Task, saved: _Saved, inputs: int) -> Tensor:
    """Return grad · q(W), (rows, inputs)."""
    if weight is None:
        return backward_product(grad, saved.weight, task.how, inputs)
    above, how = _once_more(saved.above), task.how
    values = rounded(rotated(weight.detach(), how.rotation), how.weight_grid, above, task.dtype)
    return grad @ _matrix(values).to(grad.dtype)


def _saturated_weight(weight: Tensor, task: _Task, saved: _Saved) -> Tensor | None:
    """Return where the weight saturated."""
    grid, above = task.how.weight_grid, _once_more(saved.above)
    if grid is None:
        return None
    return _matrix(saturated(rotated(weight.detach(), task.how.rotation), grid, above))


def _input_values(task: _Task, saved: _Saved, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return q(x), (..., inputs)."""
    grid = task.how.input_grid
    if saved.values is not None or grid is None:
        return cast(Tensor, saved.values)
    data, scale, above = map(_once_more, (saved.data, saved.scale, saved.tensor_scale))
    return dequantized(Quantized(data, scale, above, grid, dtype, inputs))


def _back(grad: Tensor, how: Quantization, outside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the gradient of an operand from that of what it was rounded to; zero where it saturated."""
    if outside is not None:
        grad = grad.masked_fill(outside, 0)
    return (grad if how.rotation is None else how.rotation.back(grad)).to(dtype)


def _of_its_own(output: Tensor) -> Tensor:
    """Return ``output``, the view of another tensor where it is one, as a tensor of its own in the same memory.

    linear computes some products as a matrix, and returns a view of that. Autograd refuses to change the view that a
    Function returns in place, which it allows of what nn.Linear returns.
    """
    if not torch.compiler.is_compiling() and not is_view(output):
        return output
    return unsafe_view(output, output.shape)


def _matrix(rows: Tensor) -> Tensor:
    """Return ``rows`` (..., k) as (rows, k); k may be 0, which leaves reshape(-1, k) no answer."""
    if rows.dim() == 2:
        return rows
    return rows.flatten(0, -2) if rows.dim() > 1 else rows[None]


def _once_more(operand: Tensor | None) -> Any:
    """Return ``operand`` in one dimension more under torch.compile, for what the backward pass computes again.

    It sees both passes in one graph, and computes once what they have in common: in the shape of the forward pass,
    q(W) and all of q(x) would be that, and be kept in place of the weight and of the codes.
    """
    if operand is None or not torch.compiler.is_compiling():
        return operand
    return operand[None] if operand.dim() else operand
