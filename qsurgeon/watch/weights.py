"""Samples of the weights of a model in training: the loss by rounding, and how many codes change."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qsurgeon.formats import Format, Quantized
from qsurgeon.formats.packing import unpack
from qsurgeon.layers import PackedLayer, QuantLayer, Weight
from qsurgeon.layers.kinds import kind_in
from qsurgeon.watch.sample import Sample, how_of, rows_in, rows_of, sample
from qsurgeon.watch.stack import Stack, alike

Named = tuple[Sequence[str], Tensor]  # names, and a number for each, (names,)


class Weights:
    """Samples of the weights that have a format, ``rows`` rows of each.

    known: the latest of those with a scale for the whole tensor, which is a pass over it to compute.
    """

    def __init__(self, layers: Mapping[str, QuantLayer], rows: int) -> None:
        self._rows = rows
        self._weights = {
            kind_in(layer).entry(path, weight.name): (layer, weight)
            for path, layer in layers.items()
            for weight in layer.weights
        }
        self._codes: dict[str, tuple[Format, torch.Size, Tensor]] = {}
        self.known: dict[str, Sample] = {}
        self.measure()

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the noise of each weight, and the share of the codes of each that changed since the last measure.

        Of the second are only those that are trainable, and were then, in the same format and shape.
        """
        samples = {name: self._sample(name) for name in self._formats}
        noise: list[Named] = []
        flips: list[Named] = []
        for names, ones in alike(samples, lambda one: one.kind):
            stack = Stack(ones)
            noise.append((names, stack.noise))
            flips.append(self._flipped(dict(zip(names, ones, strict=True)), stack.quantized))
        self.known = {name: one for name, one in samples.items() if one.state is not None}
        return fetched(noise), fetched(flips)

    def sizes(self) -> dict[str, int]:
        """Return how many values each weight has; of a sharded one, this process's shard."""
        return {name: rows_in(*self._weights[name]).numel() for name in self._formats}

    def declared(self, name: str) -> Weight:
        """Return what the kind of its layer says of a weight."""
        return self._weights[name][1]

    def is_trained(self, name: str) -> bool:
        """Return whether a weight is trainable."""
        layer, weight = self._weights[name]
        parameter: Tensor = getattr(layer, weight.name)
        return parameter.requires_grad

    def clear(self) -> None:
        """Forget all."""
        self._codes, self.known = {}, {}

    @property
    def _formats(self) -> dict[str, Format]:
        """The formats of the weights that have one, by name."""
        found = {}
        for name, (layer, weight) in self._weights.items():
            how = how_of(layer, weight)
            packed = isinstance(layer, PackedLayer)  # its codes are not trained, and what they lost is gone
            if how is not None and how.weight is not None and not packed and rows_in(layer, weight).numel():
                found[name] = how.weight.as_weight
        return found

    def _sample(self, name: str) -> Sample:
        layer, weight = self._weights[name]
        matrix, format = _matrix(rows_in(layer, weight)), self._formats[name]
        rows = rows_of(len(matrix), self._rows, format.block_shape[0])
        # An optimizer has written to what is trainable, and a fused one does not let autograd count that.
        known = None if self.is_trained(name) else self.known.get(name)
        return sample(matrix, format, format.rotation, rows, known)

    def _flipped(self, samples: Mapping[str, Sample], now: Quantized) -> Named:
        """Return what can be compared, and the share of its codes that changed; remember the new ones."""
        names, before, after = [], [], []
        for (name, one), data in zip(samples.items(), now.data, strict=True):
            if one.format is None or not self.is_trained(name):
                continue
            what = one.format, rows_in(*self._weights[name]).shape
            *was, codes = self._codes.get(name, (None, None, data))
            if tuple(was) == what:
                names.append(name)
                before.append(codes)
                after.append(data)
            self._codes[name] = *what, data.clone()  # not a view, which would keep all of the stack
        if not names:
            return [], now.data.new_zeros(0)
        changed = unpack(torch.stack(before) ^ torch.stack(after), now.format.element.bits, now.length).flatten(1)
        return names, changed.bool().sum(1) / changed.shape[-1]


def _matrix(stack: Tensor) -> Tensor:
    """Return matrices (…, outputs, inputs) as one, (rows, inputs)."""
    return stack.flatten(0, -2) if stack.dim() > 2 else stack


def fetched(of: Iterable[Named]) -> dict[str, float]:
    """Return the numbers by name, fetched from a device all at once."""
    found = [(names, numbers) for names, numbers in of if names]
    if not found:
        return {}
    device = found[0][1].device
    joined = torch.cat([numbers.to(device, torch.float32) for _, numbers in found]).tolist()
    return dict(zip((name for names, _ in found for name in names), joined, strict=True))
