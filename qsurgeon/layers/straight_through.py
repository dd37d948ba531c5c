"""The straight-through gradient: round forward; backward, pass the gradient as if nothing had been rounded.

Rounding is flat almost everywhere, so its true gradient is zero and nothing upstream of it would learn
(Bengio et al., arXiv 1308.3432, section 4).
"""

from typing import Any

import torch
from torch import Tensor

from qsurgeon.formats import Format
from qsurgeon.words import Gradient


class _StraightThrough(torch.autograd.Function):
    """Fake quantize; backward is the identity, or zero where the value saturated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Format, clipped: bool) -> Tensor:
        if clipped:
            ctx.save_for_backward(format.saturates(x))
        return format.fake_quantize(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None]:
        (grad,) = grads
        if ctx.saved_tensors:
            grad = grad.masked_fill(ctx.saved_tensors[0], 0)
        return grad, None, None


def straight_through(x: Tensor, format: Format, gradient: Gradient = "ste") -> Tensor:
    """Return ``format.fake_quantize(x)`` with a gradient of our choice.

    ``ste``: d/dx is 1 everywhere. ``clipped``: 1, but 0 where the value saturated. ``none``: blocked, which
    reproduces runs whose quantizer sat under ``no_grad``.
    """
    if gradient == "none" or not (torch.is_grad_enabled() and x.requires_grad):
        return format.fake_quantize(x.detach())
    result: Tensor = _StraightThrough.apply(x, format, gradient == "clipped")  # type: ignore[no-untyped-call]
    return result
