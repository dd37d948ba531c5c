"""A sample of the input and output of a call, and whether the layer rounded as its rule says."""

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qsurgeon.layers import PackedLayer, QuantProduct, Weight
from qsurgeon.layers.added import Added
from qsurgeon.watch.sample import Sample, as_it_is, local, places, rows_in, rows_of, sample
from qsurgeon.watch.stack import Stack, alike, energy

OUTPUTS = 4  # of each token of a sample: enough to tell by, and little to compute


class Call:
    """A sample of what goes into a layer's call, weight and bias included, and of what comes out.

    trains: whether the call was one that computes gradients. due: whether its rule rounds in the phase of the call.
    """

    def __init__(
        self,
        layer: QuantProduct,
        declared: Weight,
        x: Tensor,
        output: Tensor,
        rows: int,
        known: Sample | None,
        *,
        trains: bool,
        due: bool,
        added: Added | None = None,
    ) -> None:
        self.trains, self.due = trains, due
        how, tokens, weight = layer.quantization, x.detach().reshape(-1, x.shape[-1]), rows_in(layer, declared)
        if added is not None:
            weight, known = declared.rows(added.to(local(getattr(layer, declared.name)))), None
        height = how.weight.block_shape[0] if how.weight else 1
        outputs = rows_of(len(weight), rows, height)[: -(-OUTPUTS // height) * height]
        input, format = how.input and how.input.as_input, how.weight and how.weight.as_weight
        self.x = sample(tokens, input, how.rotation, rows_of(len(tokens), rows, 1))
        self.is_packed = isinstance(layer, PackedLayer)
        if isinstance(layer, PackedLayer):
            self.w = as_it_is(layer.opened_rows(outputs), outputs)
        else:
            self.w = sample(weight, format, how.rotation, outputs, known)
        self.bias: Tensor | None = None
        if layer.bias is not None:
            self.bias = local(layer.bias).index_select(0, places(outputs, layer.bias.device)).float()
        self.y = output.detach().take(_crossings(self.x.at, outputs, output.shape[-1], output.device)).to(x.device)

    @property
    def kind(self) -> Hashable:
        """What is the same of calls that can be looked at together."""
        return self.is_packed, self.x.kind, self.w.kind, self.y.dtype


class Calls:
    """Calls of one kind, and the stacks of their operands."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._are_packed = calls, calls[0].is_packed
        self.x, self.w = Stack([one.x for one in calls]), Stack([one.w for one in calls])

    @property
    def are_as_ruled(self) -> Tensor:
        """Whether the layers rounded where their rules say so in the phase of the call, and did not else, (calls,).

        They rounded if the outputs are nearer to the product of the rounded operands than to the plain one. Where
        nothing is lost there is no telling, and True. NaN, which says nothing of rounding, is True too. A packed
        weight is rounded, and rotated, for good. A layer that rounds neither operand does not round.
        """
        due = torch.tensor([one.due for one in self._calls], device=self.x.rows.device)
        if not (self.x.is_rounded or self.w.is_rounded or self._are_packed):
            return ~due
        y = torch.stack([one.y for one in self._calls])
        whole = self.x.turned if self._are_packed else self.x.rows
        plain, rounded = whole.float() @ self.w.rows.float().mT, self.x.values @ self.w.values.mT
        none = plain.new_zeros(y.shape[-1])
        bias = torch.stack([none if one.bias is None else one.bias for one in self._calls])
        far, near = (energy(product + bias[:, None] - y) for product in (plain, rounded))
        return ~torch.where(due, near > far, far > near)


@lru_cache(256)
def _crossings(rows: tuple[int, ...], columns: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Return where the crossings of some rows and columns, (rows, columns), lie in a tensor of that width."""
    return places(rows, device)[:, None] * width + places(columns, device)


def by_kind(calls: Mapping[str, Call]) -> list[tuple[list[str], Calls]]:
    """Return the calls, those of a kind together, with the names of their layers."""
    return [(names, Calls(ones)) for names, ones in alike(calls, lambda call: call.kind)]
