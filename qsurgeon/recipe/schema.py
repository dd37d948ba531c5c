"""The schema of a recipe: frozen values whose fields are the recipe's keys. Unknown keys are errors."""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    StrictBool,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats import CATALOG, Format
from qsurgeon.formats.element import ELEMENTS
from qsurgeon.formats.fields import FIELDS, HADAMARD_SIZES, NONE, Rounding, TensorScale
from qsurgeon.formats.scale import RULES, SCALES
from qsurgeon.layers.kinds import DEFAULT, KINDS
from qsurgeon.recipe.noise import NoiseSection
from qsurgeon.recipe.section import PatternText, Section
from qsurgeon.recipe.text import Path
from qsurgeon.recipe.words import unknown_format
from qsurgeon.storage import MASTER, Encoding, StorageName, encoding_of
from qsurgeon.words import Behavior, Common

_NAME = re.compile(r"[A-Za-z][\w.+-]*")


def _field(description: str, **hint: Any) -> Any:
    """Return a field of a format that need not be said; ``hint`` tells editors what it may be."""
    return Field(default=None, description=description, json_schema_extra=hint)


def _one_of(description: str, registry: Mapping[str, Any], *others: str) -> Any:
    """Return such a field that takes the words of ``registry``, which may grow, and ``others``."""

    def hint(schema: dict[str, Any]) -> None:
        schema["enum"] = [*registry, *others]

    return Field(default=None, description=description, json_schema_extra=hint)


_SIZE = {"type": "integer", "minimum": 1}
_NONE = {"const": NONE}


class FormatSpec(Section):
    """A format of the recipe's own: a known one with some fields replaced."""

    like: str = Field(description="The format to start from: a catalogue name, or one above this one.")
    element: Any = _one_of("The scalar number format.", ELEMENTS)
    block: Any = _field(
        "How many values share a scale; [rows, columns] for a weight; none: the tensor scale is the only one.",
        anyOf=[_SIZE, {"type": "array", "items": _SIZE, "minItems": 2, "maxItems": 2}, _NONE],
    )
    scale: Any = _one_of("The number format of a block's scale.", SCALES, NONE)
    scale_rule: Any = _one_of("How a block's scale is found.", RULES, NONE)
    tensor_scale: Any = _field("What shares the FP32 scale above the blocks'.", enum=[*get_args(TensorScale)])
    static_scale: Any = _field(
        "The one number of a static tensor scale, where it is not found by calibration.",
        anyOf=[{"type": "number", "exclusiveMinimum": 0}, _NONE],
    )
    rounding: Any = _field("To the nearest value, or to a neighbor at random.", enum=[*get_args(Rounding)])
    hadamard: Any = _field("How many values are rotated together before rounding.", enum=[*HADAMARD_SIZES, NONE])
    four_over_six: Any = _field("Per block, the better of the largest value at 6 and at 4.", type="boolean")
    seed: Any = _field("Of the stochastic rounding and of the rotation's signs.", type="integer", minimum=0)

    @field_validator(*FIELDS)
    @classmethod
    def _is_read(cls, value: Any, info: ValidationInfo) -> Any:
        FIELDS[str(info.field_name)](str(info.field_name), value)
        return value


def _check_type(name: str) -> str:
    if name not in KINDS:
        raise ValueError(f"'types' cannot be '{name}'; {nearest(name, KINDS)}")
    return name


def _list_types(schema: dict[str, Any]) -> None:
    schema["enum"] = list(KINDS)


TypeName = Annotated[str, AfterValidator(_check_type), Field(json_schema_extra=_list_types)]


class _Choice(Section):
    """Which modules a rule takes, and the formats that it gives them."""

    name: Annotated[str, Field(min_length=1, description="What plan and inspect call the rule.")] | None = None
    target: tuple[PatternText, ...] = Field(min_length=1, description="Patterns of the modules to take.")
    types: tuple[TypeName, ...] = Field((DEFAULT,), min_length=1, description="Kinds of modules to take.")
    exclude: tuple[PatternText, ...] = Field(
        (), description="Patterns of the modules to leave; <output_head>? names the output head."
    )
    weight: str | None = Field(None, description="Format of the weight; without it the weight stays as it is.")
    input: str | None = Field(None, description="Format of the input; without it the input stays as it is.")


def _check_version(value: Any) -> Any:
    if type(value) is not int or value != 1:  # true and 1.0 equal 1
        raise ValueError(f"'version' must be the whole number 1, got {json.dumps(value)}")
    return value


class _Head(Section):
    """What a recipe says beside its formats and rules."""

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = Field(description="The version of this schema.")
    extends: str | None = Field(
        None, description="A recipe (shipped name, or path from this file) whose rules come after."
    )
    model: str | None = Field(None, description="Folder or hub id to operate on; --model wins.")
    output: str | None = Field(None, description="Folder to write; --output wins.")
    storage: StorageName = Field(
        MASTER,
        description="master: full-precision weights stay, rounded at every forward. packed: their codes and scales "
        "replace them; for adapters, and inference.",
    )


class Rule(Behavior, _Choice):
    """Give formats to the modules of ``types`` that ``target`` names and ``exclude`` does not."""

    @model_validator(mode="after")
    def _decides_something(self) -> "Rule":
        if self.weight is None and self.input is None:
            raise ValueError("a rule needs a format for weight, for input, or for both")
        return self


class Recipe(Common, _Head):
    """Rules in order of precedence: a module takes the first that names it."""

    untie: StrictBool = Field(False, description="Give a tied weight that a rule reaches a copy of its own.")
    formats: dict[str, FormatSpec] = Field({}, description="Formats of the recipe's own, by name.")
    rules: tuple[Rule, ...] = Field((), description="In order; a module takes the first rule that names it.")
    noise: NoiseSection | None = Field(None, description="Noise on the weights of norms while a model is trained.")

    _marks: Mapping[Path, tuple[str, str]] = PrivateAttr(default_factory=dict)
    _text: str = PrivateAttr("")

    @model_validator(mode="after")
    def _has_rules(self) -> "Recipe":
        if not self.rules and self.extends is None:
            raise ValueError("a recipe needs rules, or another recipe to extend")
        names = [rule.name for rule in self.rules if rule.name is not None]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two rules are called '{twice[0]}'; a name tells which one decided")
        return self

    @property
    def text(self) -> str:
        """The recipe as YAML: the file as it was written, or what was merged or made in Python, written out."""
        if self._text:
            return self._text
        dumped: str = yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        return dumped

    @cached_property
    def own_formats(self) -> dict[str, Format]:
        """The formats of ``formats:``. Raises: FormatError for fields that do not combine."""
        made: dict[str, Format] = {}
        for name, spec in self.formats.items():
            made[name] = make_format(name, spec, made)
        return made

    def format(self, name: str) -> Format:
        """Return the format that ``name`` means in this recipe. Raises: FormatError for an unknown one."""
        known = {**CATALOG, **self.own_formats}
        if name not in known:
            raise FormatError(unknown_format(name, known))
        return known[name]

    def where(self, *path: str | int) -> tuple[str, str]:
        """Return where the value at ``path`` stands and its line with a caret.

        That is ``file:line:column`` for a recipe that was read from a file, and the path itself for another.
        """
        if path in self._marks:
            return self._marks[path]
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
        return text.removeprefix("."), ""

    @property
    def encoding(self) -> Encoding | None:
        """How weights are stored that have a format; None where they stay in full precision."""
        return encoding_of(self.storage)

    def behavior(self, place: int) -> Behavior:
        """Return how the rule at ``place`` uses its formats; what it does not say itself, the recipe may."""
        return Behavior.of(self.rules[place], self)

    def rule_name(self, place: int) -> str:
        """Return the name of the rule at ``place``, counted from 0; one without a name is called by its place."""
        return self.rules[place].name or f"rule {place + 1}"


def make_format(name: str, spec: FormatSpec, above: dict[str, Format]) -> Format:
    """Return the format that ``spec`` describes; ``above`` are the recipe's own formats that stand before it.

    Raises: FormatError for a name that is taken, an unknown base, fields that do not combine.
    """
    if not _NAME.fullmatch(name):
        raise FormatError(f"'{name}' cannot name a format: a name begins with a letter and has no spaces")
    if name in CATALOG:
        raise FormatError(f"'{name}' is a format of the catalogue; name yours otherwise")
    known = {**CATALOG, **above}
    if spec.like not in known:
        raise FormatError(unknown_format(spec.like, known))
    fields = spec.model_dump(exclude={"like"}, exclude_none=True)
    return known[spec.like].with_fields(name, **fields)
