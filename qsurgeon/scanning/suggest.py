"""From a scan to a recipe: which modules to spare, or which format each gets under a budget of bits.

The cost of rounding a module is what the model's answer moves by when this module alone is rounded. What it moves back
when all others are rounded and this one is not was measured too, and predicts less: the noise of all others is in it.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsurgeon.errors import UsageError
from qsurgeon.recipe import Recipe
from qsurgeon.scanning.choices import RECIPE
from qsurgeon.scanning.result import ALONE, Row, Scan
from qsurgeon.surgery import Step, build_plan
from qsurgeon.surgery.fold import folded

NEEDS_DATA = "a suggestion needs to know what each layer does to the model's answer: pass --data FILE or --text FILE"


@dataclass(frozen=True)
class Suggestion:
    """A recipe, and what it is expected to do. what: in words. spared: modules that stay in full precision.

    bits: per value of the weights that the scanned recipe wraps. cost: the sum of the modules' costs, before it is the
    scanned recipe's.
    """

    recipe: Recipe
    what: str
    spared: tuple[str, ...]
    bits: float
    cost: float
    before: float

    @property
    def text(self) -> str:
        """The recipe as a file, which begins with what it is."""
        return f"# {self.what}, as a scan suggests it.\n{self.recipe.text}"


def cost(found: Scan, row: Row) -> float:
    """Return what rounding a module costs, in the mean distance of the whole model. Raises: UsageError without data."""
    if found.data is None:
        raise UsageError(NEEDS_DATA)
    return row.effects[ALONE].mean_distance


def suggest_exclude(found: Scan, count: int) -> Suggestion:
    """Return the scanned recipe without the ``count`` modules that cost most.

    Raises: UsageError without data, and if the recipe wraps no more than ``count``.
    """
    rows = found.of(RECIPE)
    costs = {row.module: cost(found, row) for row in rows}
    if not 0 < count < len(rows):
        raise UsageError(
            f"--suggest-exclude {count}: the recipe wraps {len(rows)} modules; expected 1 to {len(rows) - 1}"
        )
    spared = {row.module for row in sorted(rows, key=lambda one: -costs[one.module])[:count]}
    chosen: dict[str, Row | None] = {row.module: None if row.module in spared else row for row in rows}
    return _suggestion(found, chosen, f"{count} of {len(rows)} modules in full precision")


def suggest_bits(found: Scan, bits: float) -> Suggestion:
    """Return a recipe with the least cost whose weights have ``bits`` bits per value on average, or fewer.

    Each module gets the recipe's formats, or one of those that the scan tried in their place, or stays in full
    precision. It begins with the fewest bits, and spends the rest where a bit gains most.

    Raises: UsageError without data, for a budget that is less than the fewest bits of all, and for one into which every
    module fits in full precision.
    """
    options = {row.module: _options(found, row) for row in found.of(RECIPE)}
    values = {row.module: row.values for row in found.of(RECIPE)}
    budget = bits * sum(values.values())
    at = dict.fromkeys(options, 0)
    spent = sum(options[module][0].bits * values[module] for module in options)
    if spent > budget * (1 + 1e-9):
        least = spent / sum(values.values())
        raise UsageError(f"--suggest {bits:g}: the fewest bits of what was scanned are {least:.4g} per weight")
    steps = [(_gain(options[module], 0, values[module]), module) for module in options if len(options[module]) > 1]
    heapq.heapify(steps)
    while steps:
        _, module = heapq.heappop(steps)
        place = at[module]
        more = (options[module][place + 1].bits - options[module][place].bits) * values[module]
        if spent + more > budget * (1 + 1e-9):
            continue  # a smaller module may still fit
        spent, at[module] = spent + more, place + 1
        if place + 2 < len(options[module]):
            heapq.heappush(steps, (_gain(options[module], place + 1, values[module]), module))
    chosen = {module: options[module][place].row for module, place in at.items()}
    if not any(chosen.values()):
        most = spent / sum(values.values())
        raise UsageError(f"--suggest {bits:g}: every module fits in full precision; expected less than {most:.4g}")
    return _suggestion(found, chosen, f"{bits:g} bits per weight")


@dataclass(frozen=True)
class _Option:
    """What a module may get. row: None for full precision."""

    bits: float
    cost: float
    row: Row | None


def _options(found: Scan, row: Row) -> list[_Option]:
    """Return what a module may get, from the fewest bits on: only what no mixture of the others is better than."""
    tried = [one for one in found.rows if one.module == row.module]
    module = row.step.module
    stored = 8 * module.weight_bytes / row.values
    every = [_Option(one.bits, max(cost(found, one), 0.0), one) for one in tried] + [_Option(stored, 0.0, None)]
    hull: list[_Option] = []
    for one in sorted(every, key=lambda option: (option.bits, option.cost)):
        if hull and one.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], one) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(one)
    return hull


def _slope(one: _Option, other: _Option) -> float:
    return (other.cost - one.cost) / (other.bits - one.bits) if other.bits > one.bits else 0.0


def _gain(options: Sequence[_Option], place: int, values: int) -> float:
    """Return the change of cost for each bit that the next option takes; the least is the best."""
    return _slope(options[place], options[place + 1]) / values


def _suggestion(found: Scan, chosen: Mapping[str, Row | None], what: str) -> Suggestion:
    """Return the recipe that gives each module what is chosen for it, checked by planning it."""
    recipe = _recipe(found, chosen)
    modules = [step.module for step in found.plan.steps]
    planned = {step.module.name: _formats(step) for step in build_plan(recipe, modules).steps}
    wanted = {
        module: None if row is None else (row.how.weight_name, row.how.input_name) for module, row in chosen.items()
    }
    wrong = [module for module, formats in wanted.items() if planned[module] != formats]
    assert not wrong, wrong
    rows = found.of(RECIPE)
    values = sum(row.values for row in rows)
    spent = sum(
        (8 * row.step.module.weight_bytes / row.values if one is None else one.bits) * row.values
        for row in rows
        for one in [chosen[row.module]]
    )
    costs = [cost(found, row) for row in chosen.values() if row is not None]
    spared = tuple(module for module, row in chosen.items() if row is None)
    return Suggestion(recipe, what, spared, spent / values, sum(costs), sum(cost(found, row) for row in rows))


def _formats(step: Step) -> tuple[Any, Any] | None:
    how = step.quantization
    return None if how is None else (how.weight_name, how.input_name)


def _recipe(found: Scan, chosen: Mapping[str, Row | None]) -> Recipe:
    """Return the scanned recipe with a rule for each of its rules and each choice, which names its modules."""
    raw = found.plan.recipe.model_dump(mode="json", exclude_unset=True)
    names = [found.plan.recipe.rule_name(place) for place in range(len(found.plan.recipe.rules))]
    rules = []
    for name, rule in zip(names, raw["rules"], strict=True):
        taken: dict[str, list[Row]] = {}
        for row in chosen.values():
            if row is not None and row.how.rule == name:
                taken.setdefault(row.name, []).append(row)
        for choice, rows in taken.items():
            own = {key: value for key, value in rule.items() if key != "exclude"}
            own["target"] = [pattern for pattern, _ in folded(rows, lambda one: one.module, lambda _: None)]
            own["types"] = [*dict.fromkeys(row.step.module.type for row in rows)]
            if choice != RECIPE:
                own |= {"name": f"{name}, {choice}", **{role: choice for role in ("weight", "input") if rule.get(role)}}
            rules.append(own)
    return Recipe(**{**raw, "rules": rules})
