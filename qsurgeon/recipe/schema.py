"""What a recipe may say: frozen values whose fields are the recipe's keys. Unknown keys are errors."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    model_validator,
)

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats import CATALOG, Format, Gradient
from qsurgeon.formats.block import FIELDS
from qsurgeon.recipe.select import check_pattern

_NAME = re.compile(r"[A-Za-z][\w.+-]*")

Path = tuple[str | int, ...]  # of a value in a recipe: ("rules", 0, "target", 1)


def _one_of(field: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in FIELDS[field]:
            raise FormatError(f"no {field.replace('_', ' ')} '{value}'; {nearest(value, FIELDS[field])}")
        return value

    return AfterValidator(check)


def _choices(names: Iterable[str]) -> dict[str, list[str]]:
    return {"enum": list(names)}


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatSpec(Section):
    """A format of the recipe's own: a known one with some fields replaced."""

    like: str = Field(description="The format to start from: a catalogue name, or one above this one.")
    element: Annotated[str, _one_of("element"), Field(json_schema_extra=_choices(FIELDS["element"]))] | None = None
    block: Annotated[StrictInt, Field(ge=1, description="How many values share a scale.")] | None = None
    scale: Annotated[str, _one_of("scale"), Field(json_schema_extra=_choices(FIELDS["scale"]))] | None = None
    scale_rule: (
        Annotated[str, _one_of("scale_rule"), Field(json_schema_extra=_choices(FIELDS["scale_rule"]))] | None
    ) = None
    tensor_scale: (
        Annotated[str, _one_of("tensor_scale"), Field(json_schema_extra=_choices(FIELDS["tensor_scale"]))] | None
    ) = None


PatternText = Annotated[str, AfterValidator(check_pattern)]


class Rule(Section):
    """Give formats to the modules of ``types`` that ``target`` names and ``exclude`` does not."""

    name: Annotated[str, Field(min_length=1, description="What plan and inspect call the rule.")] | None = None
    target: tuple[PatternText, ...] = Field(min_length=1, description="Patterns of the modules to take.")
    types: tuple[Literal["Linear"], ...] = Field(("Linear",), min_length=1, description="Kinds of modules to take.")
    exclude: tuple[PatternText, ...] = Field((), description="Patterns of the modules to leave.")
    weight: str | None = Field(None, description="Format of the weight; without it the weight stays as it is.")
    input: str | None = Field(None, description="Format of the input; without it the input stays as it is.")
    gradient: Gradient = Field("ste", description="How the gradient passes the rounding.")

    @model_validator(mode="after")
    def _decides_something(self) -> "Rule":
        if self.weight is None and self.input is None:
            raise ValueError("a rule needs a format for weight, for input, or for both")
        return self


def _check_version(value: Any) -> Any:
    if type(value) is not int or value != 1:  # true and 1.0 equal 1
        raise ValueError(f"'version' must be the whole number 1, got {json.dumps(value)}")
    return value


class Recipe(Section):
    """Rules in order of precedence: a module takes the first that names it."""

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = Field(description="The version of this schema.")
    extends: str | None = Field(
        None, description="A recipe (shipped name, or path from this file) whose rules come after."
    )
    model: str | None = Field(None, description="Folder or hub id to operate on; --model wins.")
    output: str | None = Field(None, description="Folder to write; --output wins.")
    storage: Literal["master"] = Field(
        "master", description="master: full-precision weights stay, rounded at every forward."
    )
    untie: StrictBool = Field(False, description="Give a tied weight that a rule reaches a copy of its own.")
    formats: dict[str, FormatSpec] = Field({}, description="Formats of the recipe's own, by name.")
    rules: tuple[Rule, ...] = Field((), description="In order; a module takes the first rule that names it.")

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
            raise FormatError(f"no format '{name}'; {nearest(name, known)}")
        return known[name]

    def where(self, *path: str | int) -> tuple[str, str]:
        """Return where the value at ``path`` stands and its line with a caret.

        That is ``file:line:column`` for a recipe that was read from a file, and the path itself for another.
        """
        if path in self._marks:
            return self._marks[path]
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
        return text.removeprefix("."), ""

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
        raise FormatError(f"no format '{spec.like}'; {nearest(spec.like, known)}")
    fields = spec.model_dump(exclude={"like"}, exclude_none=True)
    return known[spec.like].with_fields(name, **fields)
