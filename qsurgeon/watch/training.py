"""Watch: do the quantizers act, do the codes of weights change, how much is lost; by samples, at little cost."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import inf, log10
from statistics import fmean

import torch
from torch import nn

from qsurgeon.errors import NothingWrappedError, SurgeryError, UsageError
from qsurgeon.layers import QuantProduct, current_phase, quant_layers
from qsurgeon.layers.compiling import is_compiled, uncompiled_name
from qsurgeon.layers.kinds import kind_in
from qsurgeon.layers.noise import noisy_norms
from qsurgeon.layers.sharded import is_sharded
from qsurgeon.observing import Seen, observed
from qsurgeon.watch.calls import Call, Calls, by_kind
from qsurgeon.watch.sample import how_of
from qsurgeon.watch.weights import Weights, fetched

Numbers = dict[str, float]
PREFIX = "qsurgeon"
EVERY, ROWS = 10, 16


def leaf(name: str) -> str:
    """Return the last component of a module's name, its layer group; peft's ``base_layer`` is that of what it is in."""
    return name.removesuffix(".base_layer").rpartition(".")[2]


class Watch:
    """Numbers about the wrapped layers of a model in training, a flat dict each ``every`` steps.

    ``qsurgeon/called``, ``qsurgeon/active``: the share of the layers that were called since the step before, and that
    computed with rounded operands, which is checked: of each layer's first call (the first that computes gradients, if
    there is one: a teacher or a rollout may come before) a few outputs are computed again, and must be nearer to the
    product of the rounded operands than to that of the unrounded ones. 1.0 is all of them; a quantizer that is off
    makes it fall. Only layers that are one product are looked at so: of one with several weights, the weights are.
    ``qsurgeon/in_phase``, where a rule has ``phases``: the share of the layers whose rule rounds in the phase of that
    call, which is one in their phase, if there was one. The others are active if they did not round: an evaluation
    under ``phases: rollout`` has 1.0 active and 0.0 in phase, and was in full precision.
    ``qsurgeon/flip_rate[/GROUP]``: the share of the weights whose code is another than at the last measured step (at
    the first: than when watching began); scales are no codes. A frozen weight counts as one that does not change;
    where nothing is trainable there is no such number.
    ``qsurgeon/weight_sqnr_db/GROUP``, ``qsurgeon/input_sqnr_db/GROUP``: signal over quantization noise, as
    ``formats.quality.sqnr``. Noise over signal is averaged over a group's layers, so that each counts the same;
    infinity where nothing was lost. Of a packed weight there is neither a flip rate nor an SQNR: it does not change,
    and what it was rounded from is gone.

    ``qsurgeon/noise_sigma/GROUP``: the standard deviation of the noise that a recipe gives norms, in the step that was
    named last (``qsurgeon.noise``, or the Trainer), averaged over a group's norms; absent before the first.

    They are of a sample: of each weight ``rows`` whole rows (or as few bands of rows as hold that many, for blocks that
    span rows), and ``rows`` tokens of the input of each layer's first call, drawn once and always the same. With a
    scale per tensor the scale is that of the whole tensor, not the sample's, which costs a pass over it each time that
    autograd has counted a write to the tensor, or the sample changed. Stochastic rounding draws the numbers that the
    layer draws. Of a sharded weight (FSDP2) each process samples its shard, and takes that for the tensor.

    Watching every step of 1024 tokens through 84 layers took 1.4 % (MXFP4) and 1.7 % (NVFP4) of a CPU's time, of 256
    tokens 3 and 4 to 7 % (docs/benchmarks.md): larger batches make it less, and a larger ``every``.

    Hooks are attached for the step that is measured. Nothing is kept from one to the next but the sample's packed
    codes, and the rows themselves of weights with a scale per tensor. A compiled model runs that step eagerly, with all
    compiled functions of the process, since it would not call hooks: then ``every`` should not be 1. ``model`` is known
    to be compiled if it is what torch.compile returned, or a part of it was compiled in place; say ``compiled`` for a
    model of which only the outside knows.

    ``groups``: from a layer's name to that of its group.

    Raises: NothingWrappedError for a model without a QuantLinear; SurgeryError if a weight is on the meta device;
    UsageError for ``every`` or ``rows`` under 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = EVERY,
        rows: int = ROWS,
        groups: Callable[[str], str] = leaf,
        compiled: bool | None = None,
    ) -> None:
        check_counts(every, rows)
        layers = quant_layers(model)
        if not layers:
            raise NothingWrappedError(
                f"{type(model).__name__} has no QuantLinear to watch: it computes in full precision. "
                "Wrap it first (qsurgeon.apply, or qsurgeon.load)"
            )
        for name, layer in layers.items():
            if any(getattr(layer, weight.name).is_meta for weight in layer.weights):
                raise SurgeryError(f"the weight of {name} is on the meta device (offloaded, or not loaded yet)")
        self._layers = {name: layer for name, layer in layers.items() if isinstance(layer, QuantProduct)}
        self._every, self._rows = every, rows
        entries = (kind_in(layer).entry(name, one.name) for name, layer in layers.items() for one in layer.weights)
        self._groups = {name: groups(uncompiled_name(name)) for name in entries}
        self._compiled = is_compiled(model) if compiled is None else compiled
        self._steps = 0
        self._open: _Window | None = None
        self._closed = False
        self._weights = Weights(layers, rows)
        self._norms = noisy_norms(model)
        self._groups |= {name: groups(uncompiled_name(name)) for name in self._norms}
        self._arm()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all hooks; there are no numbers any more. A second call does nothing."""
        self._closed = True
        self._disarm()
        self._weights.clear()

    def step(self) -> Numbers:
        """Return the numbers; {} on a step that is not measured. Call it after ``optimizer.step()``.

        Raises: UsageError after ``close``.
        """
        self._check_open()
        self._steps += 1
        try:
            return {} if self._open is None else self._measured(self._open.calls)
        finally:
            self._arm()

    @contextmanager
    def evaluation(self) -> Iterator[Numbers]:
        """Watch an evaluation: ``qsurgeon/called`` and ``qsurgeon/active`` are in the dict it yields, at the end.

        What runs inside does not count for the step that it lies in.

        Raises: UsageError after ``close``.
        """
        self._check_open()
        numbers: Numbers = {}
        outside, self._open = self._open, None
        if outside is not None:
            outside.close()
        window = self._window()
        try:
            yield numbers
            numbers.update(self._seen(window.calls)[0])
        finally:
            window.close()
            if outside is not None and self._open is None and not self._closed:
                self._open = self._window(outside.calls)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Watch is closed; make another")

    def _arm(self) -> None:
        """Have hooks if the next step is one that is measured, those that are there if there are some."""
        if (self._steps + 1) % self._every:
            self._disarm()
        elif self._open is None:
            self._open = self._window()
        else:
            self._open.calls = {}

    def _window(self, calls: dict[str, Call] | None = None) -> "_Window":
        return _Window(self._layers, self._rows, self._weights, self._compiled, calls)

    def _disarm(self) -> None:
        window, self._open = self._open, None
        if window is not None:
            window.close()

    @torch.no_grad()
    def _seen(self, calls: Mapping[str, Call]) -> tuple[Numbers, list[tuple[list[str], Calls]]]:
        """Return what evaluations log too, and the calls, by kind."""
        found = by_kind(calls)
        active = fetched((names, ones.are_as_ruled) for names, ones in found)
        if not self._layers:
            return {}, found
        numbers = {
            f"{PREFIX}/called": len(calls) / len(self._layers),
            f"{PREFIX}/active": sum(active.values()) / len(self._layers),
        }
        hows = (how_of(layer, self._weights.declared(name)) for name, layer in self._layers.items())
        if any(how is not None and how.behavior.phases != "both" for how in hows):
            numbers[f"{PREFIX}/in_phase"] = sum(call.due for call in calls.values()) / len(self._layers)
        return numbers, found

    @torch.no_grad()
    def _measured(self, calls: Mapping[str, Call]) -> Numbers:
        numbers, found = self._seen(calls)
        weights, flips = self._weights.measure()
        inputs = fetched((names, ones.x.noise) for names, ones in found if ones.x.is_rounded)
        numbers |= self._flip_rates(flips)
        for role, noise in (("weight", weights), ("input", inputs)):
            for group, ratios in self._by_group(noise).items():
                numbers[f"{PREFIX}/{role}_sqnr_db/{group}"] = _decibel(fmean(ratios))
        sigmas = {name: norm.noise.last for name, norm in self._norms.items()}
        known = {name: sigma for name, sigma in sigmas.items() if sigma is not None}
        return numbers | {f"{PREFIX}/noise_sigma/{group}": fmean(ones) for group, ones in self._by_group(known).items()}

    def _flip_rates(self, rates: Mapping[str, float]) -> Numbers:
        """Return the rates of all and of each group, every weight counting the same; that of a frozen one is 0."""
        if not rates:
            return {}
        sizes = {
            name: size
            for name, size in self._weights.sizes().items()
            if name in rates or not self._weights.is_trained(name)
        }
        flipped = {name: size * rates.get(name, 0.0) for name, size in sizes.items()}
        numbers = {f"{PREFIX}/flip_rate": sum(flipped.values()) / sum(sizes.values())}
        in_group = self._by_group(sizes)
        for group, ones in self._by_group(flipped).items():
            numbers[f"{PREFIX}/flip_rate/{group}"] = sum(ones) / sum(in_group[group])
        return numbers

    def _by_group(self, of: Mapping[str, float]) -> dict[str, list[float]]:
        groups: dict[str, list[float]] = {}
        for name, number in of.items():
            groups.setdefault(self._groups[name], []).append(number)
        return groups


class _Window:
    """Hooks on the layers, for a time; ``calls`` has each one's first call, or a later one that says more of it."""

    def __init__(
        self,
        layers: Mapping[str, QuantProduct],
        rows: int,
        weights: Weights,
        compiled: bool,
        calls: dict[str, Call] | None = None,
    ) -> None:
        self.calls = {} if calls is None else calls
        self._rows, self._weights = rows, weights
        self._stack = ExitStack()
        if compiled:
            # Compiled code does not look for hooks that came later.
            stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
            self._stack.enter_context(stance)
        self._stack.enter_context(observed(layers, self._see))

    def close(self) -> None:
        """Remove the hooks."""
        self._stack.close()

    def _see(self, seen: Seen[QuantProduct]) -> None:
        """Sample a call. Gradient checkpointing recomputes in a later one."""
        name, layer = seen.name, seen.layer
        how = how_of(layer, self._weights.declared(name))
        if how is None:
            return
        due = how.behavior.phases in ("both", current_phase())
        if not seen.output.numel() or not self._wants(name, due=due, trains=seen.trains):
            return
        declared = self._weights.declared(name)
        if is_sharded(getattr(layer, declared.name)):  # FSDP has put it together by now
            raise SurgeryError(
                f"the weight of {name} is split by tensor parallelism, and Watch cannot tell from a part whether a "
                "layer rounds; close it"
            )
        known = self._weights.known.get(name)
        self.calls[name] = Call(
            layer,
            declared,
            seen.input,
            seen.output,
            self._rows,
            known,
            trains=seen.trains,
            due=due,
            added=seen.added,
        )

    def _wants(self, name: str, *, due: bool, trains: bool) -> bool:
        """Return whether a call of the layer is to be looked at: the first in a phase of its rule, with gradients."""
        known = self.calls.get(name)
        return known is None or (due, trains) > (known.due, known.trains)


def check_counts(every: int, rows: int) -> None:
    """Do nothing if both are at least 1. Raises: UsageError."""
    for name, count in (("every", every), ("rows", rows)):
        if count < 1:
            raise UsageError(f"{name} is {count}; expected at least 1")


def _decibel(noise: float) -> float:
    return -10 * log10(noise) if noise else inf
