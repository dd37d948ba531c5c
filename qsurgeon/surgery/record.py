"""What a plan leaves in a checkpoint's config.json: explicit module names and the formats in full.

Globs are never run again: a model is rebuilt from this record alone.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qsurgeon.errors import CheckpointError, FormatError, nearest
from qsurgeon.formats import CATALOG, Format, Gradient, Phases, SavedInputs, Storage
from qsurgeon.layers import Quantization
from qsurgeon.surgery.plan import Excluded, Plan

QUANT_METHOD = "qsurgeon"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatRecord(_Part):
    """Every field of a format: what a name means must not depend on the catalogue of the day."""

    element: str
    block: int | tuple[int, int] | str
    scale: str
    scale_rule: str
    tensor_scale: str
    static_scale: float | str
    rounding: str
    hadamard: int | str
    four_over_six: bool
    seed: int


class RuleRecord(_Part):
    """A rule as it was resolved: the modules it took, and those its patterns excluded."""

    name: str
    weight: str | None
    input: str | None
    gradient: Gradient
    phases: Phases = "both"
    modules: tuple[str, ...]
    excluded: dict[str, tuple[str, ...]]


class Record(_Part):
    """All that is needed to rebuild a model's wrapping, and to say why a Linear was left."""

    version: Literal[1]
    qsurgeon_version: str
    storage: Storage
    formats: dict[str, FormatRecord]
    saved_inputs: SavedInputs = "packed"
    rules: tuple[RuleRecord, ...]
    # Where the model came from: `owner/name@commit` on the hub, or a folder's name; and the recipe's text in full. The
    # model card is made of this record alone, also by whoever loads the model and pushes it on.
    source: str = ""
    recipe: str = ""
    # What calibration found, by module and operand; it wins over the format's own number.
    static_scales: dict[str, dict[Literal["weight", "input"], float]]

    def quantizations(self) -> dict[str, Quantization]:
        """Return how each wrapped module computes, by its name. Raises: CheckpointError for a broken format."""
        any_format = next(iter(CATALOG.values()))
        try:
            formats = {name: any_format.with_fields(name, **vars(one)) for name, one in self.formats.items()}
            return {
                module: Quantization(
                    _named(rule.weight, formats, scales.get("weight")),
                    _named(rule.input, formats, scales.get("input")),
                    rule.gradient,
                    rule.name,
                    rule.phases,
                    self.saved_inputs,
                )
                for rule in self.rules
                for module in rule.modules
                for scales in [self.static_scales.get(module, {})]
            }
        except FormatError as error:
            raise CheckpointError(f"quantization_config: {error}") from error

    def exclusions(self) -> dict[str, Excluded]:
        """Return what excluded each module that a rule named and did not take."""
        return {
            module: Excluded(rule.name, pattern)
            for rule in reversed(self.rules)
            for pattern, modules in rule.excluded.items()
            for module in modules
        }


def _named(name: str | None, formats: dict[str, Format], static_scale: float | None) -> Format | None:
    if name is None:
        return None
    if name not in formats:
        raise FormatError(f"no format '{name}'; {nearest(name, formats)}")
    return formats[name] if static_scale is None else replace(formats[name], static_scale=static_scale)


def record_of(plan: Plan, version: str, source: str = "") -> Record:
    """Return the record of ``plan``, made by qsurgeon ``version`` on ``source`` (see ``checkpoint.hub.Source``)."""
    taken: dict[Quantization, list[str]] = defaultdict(list)
    left: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for step in plan.steps:
        if isinstance(step.fate, Quantization):
            taken[step.fate].append(step.module.name)
        elif isinstance(step.fate, Excluded):
            left[step.fate.rule][step.fate.pattern].append(step.module.name)
    rules = tuple(
        RuleRecord(
            name=how.rule,
            weight=how.weight.name if how.weight else None,
            input=how.input.name if how.input else None,
            gradient=how.gradient,
            phases=how.phases,
            modules=tuple(modules),
            excluded={pattern: tuple(names) for pattern, names in left[how.rule].items()},
        )
        for how, modules in taken.items()
    )
    used = {format.name: format for how in taken for format in (how.weight, how.input) if format}
    formats = {name: FormatRecord.model_validate(format.to_dict()) for name, format in used.items()}
    return Record(
        version=1,
        qsurgeon_version=version,
        storage=plan.recipe.storage,
        saved_inputs=plan.recipe.saved_inputs,
        formats=formats,
        rules=rules,
        source=source,
        recipe=plan.recipe.text,
        static_scales={module: dict(numbers) for module, numbers in plan.static_scales.items()},
    )


def read_record(data: dict[str, Any], source: str) -> Record:
    """Return the record in a ``quantization_config``, without its ``quant_method``.

    Raises: CheckpointError, naming ``source``, if it is not one of ours.
    """
    fields = {key: value for key, value in data.items() if key != "quant_method"}
    try:
        return Record.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, ("quantization_config", *first["loc"])))
        raise CheckpointError(f"{source}: {at}: {first['msg']}") from error
