"""What is added to a weight before it is rounded: the ΔW of adapters that are to compute as if they were merged.

An adapter apart computes q(W)·q(x) + ΔW·x, merged it computes q(W + ΔW)·q(x). An engine that is sent merged weights
computes the second, whatever the trainer did.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qsurgeon.errors import GradientError
from qsurgeon.layers.phases.keeping import Besides
from qsurgeon.torch_private import writes


@dataclass(frozen=True)
class Added:
    """What is added to one layer's weight in one call.

    deltas: returns each ΔW in the weight's own layout, differentiable, in the order in which they are added. sources:
    the parameters that they are computed from. scales: the numbers that they are multiplied with.
    """

    deltas: Callable[[], Sequence[Tensor]]
    sources: tuple[Tensor, ...]
    scales: tuple[float, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether a gradient is wanted of what is added."""
        return any(one.requires_grad for one in self.sources)

    @property
    def besides(self) -> Besides:
        """What the sum depends on beside the weight."""
        return Besides(self.sources, self.scales)

    def to(self, weight: Tensor) -> Tensor:
        """Return W + ΔW in the dtype of ``weight``, rounded to it after each ΔW, as merging one by one does."""
        total = weight
        for delta in self.deltas():
            total = (total + delta).to(weight.dtype)
        return total

    @property
    def transposed(self) -> "Added":
        """The same for the transposed weight."""
        return Added(lambda: [one.mT for one in self.deltas()], self.sources, self.scales)

    @contextmanager
    def summed(self, weight: Tensor) -> Iterator[Tensor]:
        """Give W + ΔW for a product inside the block. Autograd does not keep it: the backward pass adds once more.

        Raises: GradientError in the backward pass if what it reads was written to since.
        """
        total = self.to(weight)
        if torch.compiler.is_compiling():  # there, the compiler decides what is computed again
            yield total
            return
        place, shape, sum_of = total.data_ptr(), total.shape, [_Unchanged(one) for one in (weight, *self.sources)]

        def pack(tensor: Tensor) -> _Unchanged | None:
            return None if tensor.data_ptr() == place and tensor.shape == shape else _Unchanged(tensor)

        def unpack(kept: _Unchanged | None) -> Tensor:
            if kept is not None:
                return kept.tensor()
            for one in sum_of:
                one.tensor()
            with torch.no_grad():
                return self.to(weight)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield total


class _Unchanged:
    """A tensor, and how often it had been written to: hooks on what autograd saves replace its own check of that."""

    __slots__ = ("_count", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._count = tensor, _count(tensor)

    def tensor(self) -> Tensor:
        """Return the tensor. Raises: GradientError if it was written to since."""
        if _count(self._tensor) != self._count:
            raise GradientError(
                f"a tensor of shape {list(self._tensor.shape)} that the backward pass of a layer with adapters: merged "
                "needs was changed in place since the forward pass: its input, its weight or its adapter"
            )
        return self._tensor


def _count(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else writes(tensor)
