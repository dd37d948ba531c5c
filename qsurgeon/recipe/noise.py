"""The section ``noise:`` of a recipe: which norms get noise while a model is trained, and how much of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qsurgeon.layers.noise import Strength
from qsurgeon.recipe.section import PatternText, Section

Mode = Literal["global", "targeted", "variable", "inverse", "ceiling", "tiers"]
_BY_ERROR: tuple[Mode, ...] = (
    "variable",
    "inverse",
    "ceiling",
)  # of an error for each layer there is nothing else to say
# Of which fields each mode needs one of the sets.
_SETS: dict[Mode, tuple[frozenset[str], ...]] = {
    "global": (frozenset(),),
    "targeted": (frozenset({"multipliers"}), frozenset({"worst", "errors"})),
    **dict.fromkeys(_BY_ERROR, (frozenset({"errors"}),)),
    "tiers": (frozenset({"multipliers"}), frozenset({"tiers", "errors"})),
}
_OF_MODES = ("multipliers", "errors", "worst", "tiers")


class Tier(Section):
    """What layers get whose error is at least so large."""

    least: float = Field(ge=0, description="The smallest error of the tier.")
    multiplier: float = Field(ge=0, description="What sigma is multiplied by there.")


class NoiseSection(Strength, Section):
    """Add noise to the weights of norms in the forward pass: AQN, or RIN with a multiplier for each layer."""

    target: tuple[PatternText, ...] = Field(
        (), description="Patterns of norms; without any, the norms whose output goes into a wrapped layer."
    )
    exclude: tuple[PatternText, ...] = Field((), description="Patterns of norms to leave.")
    mode: Mode = Field(
        "global", description="How the multiplier of sigma is found, which is 1 for all norms if it is global."
    )
    multipliers: dict[PatternText, float] = Field(
        {}, description="Pattern: multiplier of sigma; a norm takes the first pattern that names it."
    )
    errors: dict[PatternText, float] = Field(
        {}, description="Pattern: error of a layer by quantization, one entry for each layer."
    )
    worst: Annotated[int, Field(ge=1, description="How many entries of errors, the largest, get noise.")] | None = None
    tiers: tuple[Tier, ...] = Field((), description="Multipliers by error, the largest first; 1 below all.")

    @field_validator("multipliers", "errors")
    @classmethod
    def _are_numbers(cls, found: dict[str, float], info: Any) -> dict[str, float]:
        for pattern, value in found.items():
            if not math.isfinite(value) or value < 0 or (value == 0 and info.field_name == "errors"):
                least = "above 0" if info.field_name == "errors" else "from 0 on"
                raise ValueError(f"'{pattern}' in '{info.field_name}' must be a finite number {least}, got {value:g}")
        return found

    @model_validator(mode="after")
    def _says_what_its_mode_needs(self) -> "NoiseSection":
        said = {name for name in _OF_MODES if getattr(self, name)}
        if said not in _SETS[self.mode]:
            wanted = " or ".join(" and ".join(f"'{name}'" for name in sorted(one)) for one in _SETS[self.mode])
            got = " and ".join(f"'{name}'" for name in _OF_MODES if name in said) or "nothing"
            raise ValueError(f"'mode: {self.mode}' takes {wanted or 'no multipliers and no errors'}, got {got}")
        if self.worst is not None and self.worst >= len(self.errors):
            raise ValueError(
                f"'worst: {self.worst}' of {len(self.errors)} errors is all of them; 'mode: global' says so"
            )
        leasts = [tier.least for tier in self.tiers]
        if leasts != sorted(set(leasts), reverse=True):
            raise ValueError("the tiers must stand with the largest 'least' first, and no two alike")
        return self

    @property
    def strength(self) -> Strength:
        """How strong the noise is, by the step of training."""
        return Strength(**{name: getattr(self, name) for name in Strength.model_fields})

    @property
    def by_pattern(self) -> dict[str, float]:
        """The multiplier that each pattern of ``multipliers`` or ``errors`` gives; negative ones are for the caller."""
        if not self.errors:
            return dict(self.multipliers)
        return dict(zip(self.errors, self._found(list(self.errors.values())), strict=True))

    @property
    def otherwise(self) -> float:
        """The multiplier of a norm that none of those patterns names."""
        return 0.0 if self.mode == "targeted" else 1.0

    def _found(self, errors: Sequence[float]) -> list[float]:
        mean = sum(errors) / len(errors)
        inverse = [2 - one / mean for one in errors]
        worst = sorted(errors, reverse=True)[self.worst - 1] if self.worst else math.inf
        ways: Mapping[Mode, Callable[[], list[float]]] = {
            "targeted": lambda: [float(one >= worst) for one in errors],
            "variable": lambda: [one / mean for one in errors],
            "inverse": lambda: inverse,
            "ceiling": lambda: [one / max(inverse) for one in inverse],
            "tiers": lambda: [next((t.multiplier for t in self.tiers if one >= t.least), 1.0) for one in errors],
        }
        return ways[self.mode]()
