"""What a scan found: for each module and each choice of formats, the sums of its weight, its input and its output."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qsurgeon.formats.quality import decibels
from qsurgeon.layers import Quantization
from qsurgeon.scanning.choices import RECIPE, Choice
from qsurgeon.scanning.measures import Sums, finite, reference
from qsurgeon.surgery import Plan, Step

OPERANDS = ("weight", "input", "both")  # what is rounded, where the error of an output is measured
ALONE, WITHOUT = "alone", "without"  # only this module is rounded; all that the recipe wraps but this module


@dataclass(frozen=True)
class Output:
    """Sums over a module's outputs: Σy², and Σ(ŷ − y)² where its weight, its input or both are rounded."""

    signal: float = 0.0
    weight: float = 0.0
    input: float = 0.0
    both: float = 0.0

    def __add__(self, other: "Output") -> "Output":
        return Output(*(one + two for one, two in zip(self.raw(), other.raw(), strict=True)))

    def raw(self) -> list[float]:
        """Return the sums themselves."""
        return [self.signal, self.weight, self.input, self.both]

    def sqnr(self, operand: str) -> float:
        """Return the SQNR of the output where ``operand`` is rounded, in dB."""
        return decibels(self.signal, getattr(self, operand))

    def to_dict(self) -> dict[str, Any]:
        """Return what the sums come to, as JSON-ready values."""
        relative = {one: (getattr(self, one) / self.signal) ** 0.5 if self.signal else None for one in OPERANDS}
        return {one: {"sqnr_db": finite(self.sqnr(one)), "relative_l2": relative[one]} for one in OPERANDS}


@dataclass(frozen=True)
class Effect:
    """What rounding does to the model's output: sums over ``places``, tokens or embeddings.

    distance: Σ KL(p‖q) of the full-precision distribution p of the next token and the rounded one q, in nats; of a
    model without such, Σ of the squared error of its last hidden state relative to that. loss: Σ of −log q of what
    comes next in the text, over ``targets`` places.
    """

    distance: float = 0.0
    loss: float = 0.0
    places: int = 0
    targets: int = 0

    def __add__(self, other: "Effect") -> "Effect":
        pairs = zip(self.raw(), other.raw(), strict=True)
        distance, loss, places, targets = (one + two for one, two in pairs)
        return Effect(distance, loss, int(places), int(targets))

    def raw(self) -> list[float]:
        """Return the sums themselves."""
        return [self.distance, self.loss, self.places, self.targets]

    @property
    def mean_distance(self) -> float:
        """The mean distance from the model in full precision."""
        return self.distance / self.places if self.places else 0.0

    @property
    def mean_loss(self) -> float | None:
        """The mean loss; None where nothing is to be predicted."""
        return self.loss / self.targets if self.targets else None


@dataclass(frozen=True)
class Row:
    """One module under one choice of formats."""

    step: Step
    name: str
    choice: Choice
    weight: Sums | None = None
    input: Sums | None = None
    output: Output | None = None
    effects: Mapping[str, Effect] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The module's name in the plain model."""
        return self.step.module.name

    @property
    def how(self) -> Quantization:
        """How the module computes under the choice."""
        own = self.step.quantization
        assert own is not None
        return self.choice.of(own)

    @property
    def values(self) -> int:
        """How many values its weight has, a tied one too."""
        count = 1
        for size in self.step.module.shape:
            count *= size
        return count

    @property
    def bits(self) -> float:
        """Bits per value of its weight, as the choice stores it; those of full precision where it stays as it is."""
        stored = 8 * self.step.module.weight_bytes / self.values if self.values else 0.0
        return self.choice.bits if self.choice.bits is not None else stored

    def references(self) -> dict[str, Sums]:
        """Return what the formats do to standard normal values, by operand."""
        grids = {"weight": self.how.weight_grid, "input": self.how.input_grid}
        return {operand: reference(grid) for operand, grid in grids.items() if grid is not None}


@dataclass(frozen=True)
class Data:
    """What the model was run on. distance: how an effect is measured, ``kl`` or ``relative_l2``."""

    source: str
    samples: int
    tokens: int
    distance: str


@dataclass(frozen=True)
class Scan:
    """All that a scan found.

    rows: of each module that the recipe wraps, one for each choice. plain: the effect of nothing, whose loss is that of
    the model in full precision. every: by choice, the effect of rounding all modules.
    """

    plan: Plan
    source: str
    rows: tuple[Row, ...]
    data: Data | None = None
    plain: Effect | None = None
    every: Mapping[str, Effect] = field(default_factory=dict)
    srdd: Mapping[str, Any] | None = None

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The names of what was tried, the recipe's own formats first."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    def of(self, choice: str = RECIPE) -> tuple[Row, ...]:
        """Return the rows of a choice, in the model's order."""
        return tuple(row for row in self.rows if row.name == choice)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        return {
            "version": 1,
            "source": self.source,
            "recipe": self.plan.recipe.text,
            "data": None if self.data is None else dict(vars(self.data)),
            "loss": None if self.plain is None else self.plain.mean_loss,
            "all_rounded": {name: self._effect(effect) for name, effect in self.every.items()},
            "gaussian": _references(self.rows),
            "modules": [self._row(row) for row in self.rows],
            "srdd": self.srdd,
        }

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _effect(self, effect: Effect) -> dict[str, Any]:
        distance = "distance" if self.data is None else self.data.distance
        loss, plain = effect.mean_loss, None if self.plain is None else self.plain.mean_loss
        more = None if loss is None or plain is None else loss - plain
        return {distance: effect.mean_distance, "loss": loss, "loss_increase": more}

    def _row(self, row: Row) -> dict[str, Any]:
        module, choice = row.step.module, row.choice
        found: dict[str, Any] = {
            "module": row.module,
            "kind": module.kind,
            "type": module.type,
            "shape": list(module.shape),
            "parameters": row.values,
            "rule": row.how.rule,
            "choice": row.name,
            "weight_format": None if choice.weight is None else choice.weight.name,
            "input_format": None if choice.input is None else choice.input.name,
            "bits": row.bits,
        }
        parts = {"weight": row.weight, "input": row.input, "output": row.output}
        found |= {name: None if part is None else part.to_dict() for name, part in parts.items()}
        return found | {"effect": {kind: self._effect(effect) for kind, effect in row.effects.items()}}


def _references(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return the references by operand and format."""
    found: dict[str, dict[str, Any]] = {"weight": {}, "input": {}}
    for row in rows:
        names = {"weight": row.how.weight_name, "input": row.how.input_name}
        for operand, sums in row.references().items():
            if names[operand] not in found[operand]:
                found[operand][names[operand]] = sums.to_dict()
    return found
