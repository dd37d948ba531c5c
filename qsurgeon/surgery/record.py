"""The record in a checkpoint's config.json: explicit module names and complete formats.

Globs are never run again: a model is rebuilt from this record alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from itertools import chain, count
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from qsurgeon.errors import CheckpointError, FormatError, nearest
from qsurgeon.formats import CATALOG, Format
from qsurgeon.formats.fields import FIELDS
from qsurgeon.layers import Quantization
from qsurgeon.layers.noise import Noise
from qsurgeon.storage import Encoding, StorageName, encoding_of
from qsurgeon.surgery import versions
from qsurgeon.surgery.plan import Excluded, Plan
from qsurgeon.words import Behavior

QUANT_METHOD = "qsurgeon"
Role = Literal["weight", "input"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _compact(part: _Part, always: Set[str]) -> dict[str, Any]:
    """Return the keys that are written ``always``, and of the newer ones those that are not at their default."""
    keys = type(part).model_fields
    new = {key for key, field in keys.items() if key not in always and getattr(part, key) == field.default}
    return part.model_dump(mode="json", exclude=new)


def _format_keys() -> dict[str, Any]:
    """Return each field of a format; of those that 0.1.0 did not have, with the value that all had then."""
    one = next(iter(CATALOG.values()))
    defaults: dict[str, Any] = {field.name: field.default for field in fields(one)}
    return {
        key: (Any, ... if key in versions.FORMAT else replace(one, **{key: defaults[key]}).to_dict()[key])
        for key in FIELDS
    }


class FormatRecord(create_model("_Format", __base__=_Part, **_format_keys())):  # type: ignore[misc]  # seen when it runs
    """Every field of a format: what a name means must not depend on the catalogue of the day."""

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json keeps."""
        return _compact(self, versions.FORMAT)


class _Resolved(_Part):
    """The modules that a rule took, those that its patterns excluded, and the formats it gives."""

    name: str
    weight: str | None
    input: str | None
    modules: tuple[str, ...]
    excluded: dict[str, tuple[str, ...]]


class RuleRecord(Behavior, _Resolved):
    """A rule as it was resolved."""

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json keeps."""
        return _compact(self, versions.RULE)


class Record(_Part):
    """All that is needed to rebuild a model's wrapping, and to say why a Linear was left."""

    version: int
    qsurgeon_version: str
    storage: StorageName
    formats: dict[str, FormatRecord]
    rules: tuple[RuleRecord, ...]
    # Where the model came from: `owner/name@commit` on the hub, or a folder's name; and the recipe's text in full. The
    # model card is made of this record alone, also by whoever loads the model and pushes it on.
    source: str = ""
    recipe: str = ""
    # What calibration found, by module and operand; it wins over the format's own number.
    static_scales: dict[str, dict[Role, float]]
    # What norms get while the model is trained.
    noise: Noise | None = None

    def quantizations(self) -> dict[str, Quantization]:
        """Return how each wrapped module computes, by its name. Raises: CheckpointError for a broken format."""
        try:
            formats = {name: Format.from_dict(name, dict(vars(one))) for name, one in self.formats.items()}
            return {
                module: Quantization(
                    _named(rule.weight, formats, scales.get("weight")),
                    _named(rule.input, formats, scales.get("input")),
                    Behavior.of(rule),
                    rule.name,
                )
                for rule in self.rules
                for module in rule.modules
                for scales in [self.static_scales.get(module, {})]
            }
        except FormatError as error:
            by = versions.written_by(self.qsurgeon_version)
            raise CheckpointError(f"quantization_config: {error}{by}") from error

    @property
    def encoding(self) -> Encoding | None:
        """How weights are stored that have a format; None where they stay in full precision."""
        return encoding_of(self.storage)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json keeps, in the oldest version of a record that can say it."""
        parts = {
            "formats": {name: one.to_dict() for name, one in self.formats.items()},
            "rules": [rule.to_dict() for rule in self.rules],
        }
        without = {"noise"} if self.noise is None else set()
        return versions.lowered({**self.model_dump(mode="json", exclude=without), **parts})

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
    taken = {step.module.name: step.fate for step in plan.steps if isinstance(step.fate, Quantization)}
    left = {step.module.name: step.fate for step in plan.steps if isinstance(step.fate, Excluded)}
    header = Header(version, plan.recipe.storage, source, plan.recipe.text)
    return make_record(header, taken, left, plan.noise)


@dataclass(frozen=True)
class Header:
    """What a record says of the model as a whole: the fields of ``Record`` with the same names."""

    version: str
    storage: str
    source: str
    recipe: str


def make_record(
    header: Header,
    taken: Mapping[str, Quantization],
    left: Mapping[str, Excluded],
    noise: Noise | None = None,
) -> Record:
    """Return the record of the modules ``taken``, and of those that a rule named and ``left``, by their names.

    ``noise``: what their norms get.
    """
    formats = _Formats()
    rules: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for module, how in taken.items():
        weight, input_ = formats.note(module, "weight", how.weight), formats.note(module, "input", how.input)
        rules[how.rule, weight, input_, how.behavior].append(module)
    excluded: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, fate in left.items():
        excluded[fate.rule][fate.pattern].append(module)
    return Record(
        version=versions.PRESENT,
        qsurgeon_version=header.version,
        storage=header.storage,
        formats=formats.records(),
        rules=tuple(
            RuleRecord(
                name=name,
                weight=weight,
                input=input_,
                modules=tuple(modules),
                excluded={pattern: tuple(names) for pattern, names in excluded[name].items()},
                **behavior.fields,
            )
            for (name, weight, input_, behavior), modules in rules.items()
        ),
        source=header.source,
        recipe=header.recipe,
        static_scales=formats.numbers(),
        noise=noise,
    )


class _Formats:
    """The formats of a record by their names, and what differs between the modules that have one in common.

    A static scale that all modules of a format share is the format's own; others are the modules'. Formats of two
    recipes may share a name: the second is renamed.
    """

    def __init__(self) -> None:
        self._names: dict[Format, str] = {}
        self._uses: dict[str, dict[tuple[str, Role], float | None]] = defaultdict(dict)

    def note(self, module: str, role: Role, format: Format | None) -> str | None:
        """Take a module's format; return its name in the record."""
        if format is None:
            return None
        plain = format.without_number
        if plain not in self._names:
            taken = self._names.values()
            others = (f"{format.name}-{number}" for number in count(2))
            self._names[plain] = next(name for name in chain([format.name], others) if name not in taken)
        name = self._names[plain]
        self._uses[name][module, role] = format.static_scale
        return name

    def records(self) -> dict[str, FormatRecord]:
        """Return each format, with the static scale that its modules share."""
        return {
            name: FormatRecord.model_validate(replace(plain, static_scale=self._shared(name)).to_dict())
            for plain, name in self._names.items()
        }

    def numbers(self) -> dict[str, dict[Role, float]]:
        """Return the static scales that modules do not share, by module and operand."""
        found: dict[str, dict[Role, float]] = defaultdict(dict)
        for name, uses in self._uses.items():
            for (module, role), number in uses.items():
                if number is not None and self._shared(name) is None:
                    found[module][role] = number
        return dict(found)

    def _shared(self, name: str) -> float | None:
        values = set(self._uses[name].values())
        return values.pop() if len(values) == 1 else None


def read_record(data: dict[str, Any], source: str) -> Record:
    """Return the record in a ``quantization_config``, without its ``quant_method``.

    Raises: CheckpointError, naming ``source``, if it is not one of ours, or says what this version does not know.
    """
    own = {key: value for key, value in data.items() if key != "quant_method"}
    try:
        return Record.model_validate(versions.raised(own))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, ("quantization_config", *first["loc"])))
        what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        by = versions.written_by(data.get("qsurgeon_version"))
        raise CheckpointError(f"{source}: {at}: {what}{by}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def record_in(config: Any) -> Record | None:
    """Return the record that a config carries, or None if it has none of ours.

    Raises: CheckpointError for a record that cannot be read.
    """
    data = getattr(config, "quantization_config", None)
    record = getattr(data, "record", None)
    if isinstance(record, Record):
        return record
    if isinstance(data, dict) and data.get("quant_method") == QUANT_METHOD:
        return read_record(data, "config.json")
    return None
