"""Run a model on data, and measure each layer's input, each layer's output, and the whole model's answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from qsurgeon.checkpoint import Events
from qsurgeon.formats.rotation import rotated
from qsurgeon.layers import Quantization
from qsurgeon.layers.kinds import kind_of
from qsurgeon.observing import Seen, observed, undisturbed
from qsurgeon.scanning.data import Batch, Examples
from qsurgeon.scanning.effects import Hows, compared, rounding, said
from qsurgeon.scanning.measures import Sums, measure
from qsurgeon.scanning.result import ALONE, OPERANDS, WITHOUT, Effect, Output, Row
from qsurgeon.scanning.unfinished import Unfinished


@dataclass
class Probed:
    """Sums of what was found so far. rows, effects: by a module's name and the choice's, and for effects by what."""

    plain: Effect = field(default_factory=Effect)
    every: dict[str, Effect] = field(default_factory=dict)
    inputs: dict[str, Sums] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    effects: dict[tuple[str, str], Effect] = field(default_factory=dict)
    distance: str = ""

    def add_layers(self, found: dict[str, Any]) -> None:
        """Add what a batch did to each layer."""
        for key, (sums, output) in found.items():
            if sums is not None:
                self.inputs[key] = self.inputs.get(key, Sums()) + Sums.of_raw(sums)
            self.outputs[key] = self.outputs.get(key, Output()) + Output(*output)


@dataclass
class Probe:
    """A model, the rows that are measured on it, and what is done already.

    step: how much work events hear of for a pass of the model.
    """

    model: nn.Module
    rows: Sequence[Row]
    unfinished: Unfinished
    events: Events
    step: int

    def __post_init__(self) -> None:
        self.by_path: dict[str, list[Row]] = {}
        for row in self.rows:
            self.by_path.setdefault(row.step.module.path, []).append(row)
        self.by_choice: dict[str, list[Row]] = {}
        for row in self.rows:
            self.by_choice.setdefault(row.name, []).append(row)
        self.shifts = not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        self.probed = Probed()

    @staticmethod
    def passes(rows: Sequence[Row], examples: Examples) -> int:
        """Return how often a model will be called, the layers' own calls not counted."""
        return len(examples.batches) * (1 + len({row.name for row in rows}) + 2 * len(rows))

    def run(self, examples: Examples) -> list[Row]:
        """Return the rows with all that is found on ``examples``; ``probed`` has the sums of the whole model."""
        for number, batch in enumerate(examples.batches):
            with undisturbed(self.model):
                self._batch(f"batch {number}", batch)
        return [self._filled(row) for row in self.rows]

    def _filled(self, row: Row) -> Row:
        key, found = _key(row), self.probed
        effects = {what: found.effects[key, what] for what in (ALONE, WITHOUT)}
        return replace(row, input=found.inputs.get(key), output=found.outputs.get(key), effects=effects)

    def _batch(self, unit: str, batch: Batch) -> None:
        """Add what a batch shows; what an earlier process found is taken from it."""
        plain: list[tuple[Tensor, str]] = []  # what the model says in full precision, once somebody asks

        def layers() -> Any:
            found: dict[str, Any] = {}
            modules = {path: self.model.get_submodule(path) for path in self.by_path}
            with observed(modules, lambda call: _see(call, self.by_path[call.name], found)):
                plain.append(said(self.model, batch))
            logits, how = plain[0]
            same = compared(logits, logits, how, batch, shifts=self.shifts)
            return {"layers": found, "plain": same.raw(), "distance": how}

        def effect(hows: Hows) -> Callable[[], Any]:
            def probe() -> Any:
                if not plain:
                    plain.append(said(self.model, batch))
                with rounding(self.model, hows):
                    rounded, how = said(self.model, batch)
                return compared(plain[0][0], rounded, how, batch, shifts=self.shifts).raw()

            return probe

        found, probed = self._done(unit, layers), self.probed
        probed.add_layers(found["layers"])
        probed.plain += _effect(found["plain"])
        probed.distance = found["distance"]
        for name, rows in self.by_choice.items():
            of_all = self._done(f"{unit} all {name}", effect(_hows(rows)))
            probed.every[name] = probed.every.get(name, Effect()) + _effect(of_all)
            for row in rows:
                others = [one for one in rows if one is not row]
                for what, chosen in ((ALONE, [row]), (WITHOUT, others)):
                    one = self._done(f"{unit} {what} {row.module} {name}", effect(_hows(chosen)))
                    key = _key(row), what
                    probed.effects[key] = probed.effects.get(key, Effect()) + _effect(one)

    def _done(self, unit: str, probe: Callable[[], Any]) -> Any:
        """Return what a unit of work finds, or has found before."""
        found = self.unfinished.found(unit)
        if found is None:
            found = probe()
            self.unfinished.add(unit, found)
        self.events.advance(self.step)
        return found


def _key(row: Row) -> str:
    return f"{row.module} {row.name}"


def _effect(raw: Sequence[float]) -> Effect:
    distance, loss, places, targets = raw
    return Effect(distance, loss, int(places), int(targets))


def _hows(rows: Sequence[Row]) -> dict[str, dict[str, Quantization]]:
    """Return how the modules of ``rows`` compute, by path and weight."""
    found: dict[str, dict[str, Quantization]] = {}
    for row in rows:
        found.setdefault(row.step.module.path, {})[row.step.module.weight] = row.how
    return found


def _see(call: Seen[nn.Module], rows: Sequence[Row], found: dict[str, Any]) -> None:
    """Add to ``found`` what a call of a layer shows of each row of the layer."""
    for row in rows:
        sums, output = _input(call, row), _output(call, row)
        before = found.get(_key(row))
        if before is not None:  # a layer that is called several times
            sums = None if sums is None else Sums.of_raw(before[0]) + sums
            output = Output(*before[1]) + output
        found[_key(row)] = [None if sums is None else sums.raw(), output.raw()]


def _input(call: Seen[nn.Module], row: Row) -> Sums | None:
    """Return what rounding does to the input of a layer; None where it is not rounded, or not seen."""
    grid = row.how.input_grid
    if grid is None or not row.step.module.declared.takes_input:
        return None
    return measure(rotated(call.input, row.how.rotation), grid)


def _output(call: Seen[nn.Module], row: Row) -> Output:
    """Return what rounding does to the output of a layer, by calling it again as it is once it is wrapped."""
    module, kind, weight = call.layer, kind_of(call.layer), row.step.module.weight
    assert kind is not None
    own = row.step.quantization
    assert own is not None
    plain = call.output.float()
    noises = []
    for operand in OPERANDS:
        how = row.choice.of(own, weight=operand != "input", input=operand != "weight")
        if how.weight is None and how.input is None:
            noises.append(0.0)
            continue
        with rounding(module, {"": {weight: how}}):
            noises.append((module.forward(*call.args, **call.kwargs).float() - plain).double().square().sum().item())
    bias = getattr(module, "bias", None)
    signal = plain - bias if isinstance(bias, Tensor) else plain
    return Output(signal.double().square().sum().item(), *noises)
