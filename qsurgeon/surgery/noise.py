"""What the noise section of a recipe comes to for one model: the multiplier of each norm that gets some."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qsurgeon.errors import Mistake, PlanError
from qsurgeon.layers.noise import Noise, NoisyNorm, refused
from qsurgeon.recipe import Recipe
from qsurgeon.recipe.noise import NoiseSection
from qsurgeon.recipe.select import OUTPUT_HEAD, Namespace, parse_pattern
from qsurgeon.surgery.feeds import feeds
from qsurgeon.surgery.inventory import Module
from qsurgeon.surgery.plan import Plan, build_plan
from qsurgeon.surgery.reads import modules_of

ELSEWHERE = "no noise: its output goes straight into no wrapped layer"
UNNAMED = "no noise: no pattern names it"
NO_FACTOR = "no noise: its multiplier is 0"


def plan_for(recipe: Recipe, model: nn.Module) -> Plan:
    """Return what ``recipe`` does to ``model``, live or on the meta device: to its layers, and to its norms.

    Raises: PlanError with every mistake.
    """
    plan = build_plan(recipe, modules_of(model))
    return plan if recipe.noise is None else _Planner(plan, recipe.noise, model).run()


@dataclass
class _Planner:
    plan: Plan
    section: NoiseSection
    model: nn.Module
    mistakes: list[Mistake] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = {step.module.name: step.module for step in self.plan.steps}
        roles = {OUTPUT_HEAD: [name for name, one in self.modules.items() if one.output_head]}
        self.namespace = Namespace(list(self.modules), roles)
        self.known: dict[tuple[Any, ...], str | None] = {}

    def run(self) -> Plan:
        norms = {one.name: one for one in self._norms()}
        excluded = {
            name: pattern for pattern in reversed(self.section.exclude) for name in self._named(pattern, "exclude")
        }
        fed = self._fed(norms.values())
        if self.section.target:
            chosen = {name for pattern in self.section.target for name in self._targeted(pattern, norms)}
        else:
            chosen = fed
            if not fed and not self.mistakes:
                self._report(
                    "no norm was found whose output goes straight into a wrapped layer; name norms in 'target', of "
                    f"which there are: {_listed(norms)}"
                )
        taken = [name for name in norms if name in chosen and name not in excluded]
        multipliers = self._multipliers(taken)
        if not self.mistakes and not any(multipliers.values()):
            self._report(f"no norm gets noise: each is excluded, or its multiplier is 0; there are {_listed(norms)}")
        if self.mistakes:
            raise PlanError(self.mistakes)
        found = {name: factor for name, factor in multipliers.items() if factor}
        still = {name: self._why_still(name, chosen, excluded) for name in norms if name not in found}
        return replace(
            self.plan,
            noise=Noise(**self.section.strength.model_dump(), modules=found),
            steps=tuple(
                replace(step, noise=found.get(step.module.name), still=still.get(step.module.name, ""))
                for step in self.plan.steps
            ),
        )

    def _why_still(self, name: str, chosen: Collection[str], excluded: Mapping[str, str]) -> str:
        if name in excluded:
            return f"no noise: excluded by '{excluded[name]}'"
        if name in chosen:
            return NO_FACTOR
        return UNNAMED if self.section.target else ELSEWHERE

    def _report(self, message: str, *path: str | int) -> None:
        where, excerpt = self.plan.recipe.where("noise", *path)
        self.mistakes.append(Mistake(where, message, excerpt))

    def _why_not(self, module: Module) -> str | None:
        """Return why a module can have no noise. What it is tried with depends on its class and size."""
        found = self.model.get_submodule(module.path)
        if isinstance(found, NoisyNorm):
            return None
        if module.path.endswith(".original_module"):
            return "peft trains a copy of it: apply the recipe before modules_to_save"
        if "forward" in vars(found):
            return refused(found)
        key = (type(found), *((name, one.shape, one.dtype) for name, one in found.named_parameters()))
        if key not in self.known:
            self.known[key] = refused(found)
        return self.known[key]

    def _norms(self) -> Iterable[Module]:
        """Yield the modules that are norms."""
        for one in self.modules.values():
            if not one.adapter and one.wraps is None and len(one.shape) == 1 and self._why_not(one) is None:
                yield one

    def _named(self, pattern: str, key: str) -> set[str]:
        """Return what a pattern names; note it if that is nothing, or if no norm is among it."""
        place = getattr(self.section, key).index(pattern)
        parsed = parse_pattern(pattern)
        match = self.namespace.match(parsed)
        if not parsed.optional:
            if not match.names:
                self._report(f"'{pattern}' names no module; {self.namespace.hint(parsed)}", key, place)
            elif match.unused:
                self._report(f"'{pattern}': nothing is named by {', '.join(match.unused)}", key, place)
        return set(match.names)

    def _targeted(self, pattern: str, norms: Collection[str]) -> set[str]:
        """Return what a pattern of ``target`` names; note it if no norm is among it."""
        names = self._named(pattern, "target")
        if names and names.isdisjoint(norms) and not parse_pattern(pattern).optional:
            called = [one for name, one in self.modules.items() if name in names and one.wraps is None and one.shape]
            why = next((f"{one.name}: {self._why_not(one)}" for one in called if len(one.shape) == 1), "")
            kinds = ", ".join(sorted({self.modules[name].kind for name in names}))
            place = self.section.target.index(pattern)
            self._report(f"'{pattern}' names no norm, only {kinds}{f' ({why})' if why else ''}", "target", place)
        return names

    def _fed(self, norms: Iterable[Module]) -> set[str]:
        """Return the norms whose output goes into a wrapped layer."""
        by_path = {one.path: one.name for one in norms}
        layers = {step.module.path: step.module.row_shape[-1] for step in self.plan.wrapped}
        return {by_path[path] for path in feeds(self.model, by_path, layers)}

    def _multipliers(self, taken: Sequence[str]) -> dict[str, float]:
        """Return the multiplier of each norm in ``taken``; note patterns that name none of them."""
        key = "errors" if self.section.errors else "multipliers"
        factors = dict.fromkeys(taken, self.section.otherwise)
        for pattern, factor in reversed(self.section.by_pattern.items()):
            match = self.namespace.match(parse_pattern(pattern))
            if not match.names and not parse_pattern(pattern).optional:
                hint = self.namespace.hint(parse_pattern(pattern))
                self._report(f"'{pattern}' names no module; {hint}", key, pattern)
            if factor < 0:
                self._report(
                    f"the error of '{pattern}' is more than twice the mean of all, and its multiplier would be "
                    f"{factor:.3g}: 'mode: {self.section.mode}' has no meaning for it",
                    key,
                    pattern,
                )
            factors |= {name: factor for name in taken if name in match.names}
        return factors


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    if not found:
        return "none that are norms"
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
