"""What a format is: its fields, which of them combine, and the numbers that follow. Knows nothing of tensors."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal, Self, cast, get_args

import torch

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats.element import ELEMENTS, Element
from qsurgeon.formats.scale import RULES, SCALES, ElementScale, PowerOfTwoScale, Scale, ScaleRule, rules_for

TensorScale = Literal["none", "by_role", "tensor", "row", "static"]
Rounding = Literal["nearest", "stochastic"]
Block = int | tuple[int, int] | None
HADAMARD_SIZES = (16, 32, 64, 128)
NONE = "none"  # how a recipe says that there is no block, no scale, no rotation
FOUR_OVER_SIX_TOP = 256.0  # arXiv 2512.02010: 1.5 times as large, a scale is still one of E4M3
SEEDS = 2**31
MOST_IN_A_BLOCK = 2**20
SMALLEST_TENSOR_SCALE = 2.0**-100  # below it, times the smallest block scale would leave FP32's normal numbers
LARGEST_TENSOR_SCALE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Fields:
    """The fields of a format, as data.

    ``block`` values in a row along the contraction dimension (the last, unless told otherwise) share one scale; two
    numbers (rows, columns) make a two-dimensional block of a weight; None: there is no scale but the tensor's. What
    the block does not divide ends in a shorter block.
    ``scale_rule``: for a power-of-two scale ``floor`` (OCP MX), ``even``, ``rceil``, ``ceil``, ``round`` or, of E2M1,
    ``rceil/7.25``; for another ``nearest``, amax / max rounded to nearest even; None without a scale.
    ``tensor_scale``: an FP32 scale above the block scales, one per ``tensor``, per ``row``, or ``static``: one
    number, ``static_scale``, found by calibration; ``by_role`` means per tensor for a weight and per row for an
    input, where it must not depend on the rest of the batch.
    ``rounding``: ``nearest``, ties to even, or ``stochastic``: up or down with a probability that keeps the mean.
    ``hadamard``: rotate this many values at a time along the contraction dimension before rounding, with random
    signs. ``four_over_six``: per block, the better of the largest value at 6 and at 4 (arXiv 2512.02010).
    ``seed``: of the stochastic rounding and of the rotation's signs.

    Raises: FormatError for fields that do not combine.
    """

    name: str
    element: Element
    block: Block
    scale: Scale | None
    scale_rule: str | None
    tensor_scale: TensorScale = "none"
    static_scale: float | None = None
    rounding: Rounding = "nearest"
    hadamard: int | None = None
    four_over_six: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for check in (_check_registered, _check_block, _check_scale, _check_tensor_scale, _check_rounding):
            check(self)
        # Computed now: torch.compile cannot trace the lock that a cached property takes the first time.
        _ = (self.rule, self.largest_scale, self.largest, self.top, self.element.values, self.key, self.kernel_key)
        _ = (self.without_rotation, self.without_number, self.as_weight)
        if not self.is_two_dimensional:
            _ = self.as_input

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block; (1, 0) without blocks."""
        return self.block if isinstance(self.block, tuple) else (1, self.block or 0)

    @property
    def is_two_dimensional(self) -> bool:
        """Whether a block spans rows."""
        return self.block_shape[0] > 1

    @property
    def has_row_scales(self) -> bool:
        """Whether the tensor scale is one a row; a static one without blocks is, so that NaN stays in its row."""
        return self.tensor_scale == "row" or (self.tensor_scale == "static" and self.block is None)

    @property
    def is_registered(self) -> bool:
        """Whether the registries have what the format was made of, under the same names."""
        return (
            ELEMENTS.get(self.element.name) is self.element
            and (self.scale is None or SCALES.get(self.scale.name) is self.scale)
            and (self.scale_rule is None or RULES.get(self.scale_rule) is self.rule)
        )

    @cached_property
    def rule(self) -> ScaleRule | None:
        """The rule that ``scale_rule`` names."""
        return RULES[self.scale_rule] if self.scale_rule else None

    @property
    def bits(self) -> float:
        """Bits per value: the element's, and its share of the block's scale."""
        return self.element.bits + (self.scale.bits / math.prod(self.block_shape) if self.scale else 0)

    @cached_property
    def largest_scale(self) -> float:
        """The largest block scale that is taken: its products with the element are finite in FP32."""
        return self.scale.largest(torch.finfo(torch.float32).max / self.element.max) if self.scale else 1.0

    @cached_property
    def largest(self) -> float:
        """The largest magnitude that element and block scale can say: in units of the tensor scale, if any."""
        return self.element.max * self.largest_scale

    @cached_property
    def top(self) -> float:
        """The magnitude, in units of the tensor scale, that the largest value of a tensor takes."""
        if self.four_over_six and isinstance(self.scale, ElementScale):
            return self.element.max * FOUR_OVER_SIX_TOP
        return self.largest

    @property
    def smallest(self) -> float:
        """The smallest magnitude above zero that element and block scale can say, in the units of ``largest``."""
        return self.element.smallest * (self.scale.smallest if self.scale else 1.0)

    @property
    def depends_on_role(self) -> bool:
        """Whether a weight and an input are rounded under different tensor scales: see as_weight and as_input."""
        return self.tensor_scale == "by_role"

    @cached_property
    def as_weight(self) -> Self:
        """What a layer rounds its weight to: ``by_role`` is one tensor scale for all of it; itself otherwise."""
        return replace(self, tensor_scale="tensor") if self.depends_on_role else self

    @cached_property
    def as_input(self) -> Self:
        """What a layer rounds its input to: ``by_role`` is a tensor scale for each row (token); itself otherwise.

        Raises: FormatError for two-dimensional blocks.
        """
        if self.is_two_dimensional:
            raise FormatError(
                f"block {shown(self.block)} of format '{self.name}' spans rows: an input's rows are tokens, whose "
                "values must not depend on each other; such a block is for weights"
            )
        return replace(self, tensor_scale="row") if self.depends_on_role else self

    @cached_property
    def without_rotation(self) -> Self:
        """This format for values that are rotated already."""
        if self.hadamard is None:
            return self
        return replace(self, hadamard=None, seed=self.seed if self.rounding == "stochastic" else 0)

    @cached_property
    def without_number(self) -> Self:
        """This format without its static scale's number: one for all modules."""
        return self if self.static_scale is None else replace(self, static_scale=None)

    @cached_property
    def key(self) -> str:
        """All but the name, as text."""
        return json.dumps(self.to_dict())

    @cached_property
    def kernel_key(self) -> str:
        """What a compiled kernel depends on, as text; it is told the rest when it runs.

        By numbers and not by names, which other entries of a registry may have.
        """
        told = {"tensor_scale", "static_scale", "hadamard", "seed"}
        rule = self.rule.key(self.element) if self.rule else NONE
        parts = self.to_dict() | {"element": repr(self.element), "scale": repr(self.scale), "scale_rule": rule}
        return json.dumps({name: value for name, value in parts.items() if name not in told})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as a recipe says them and a checkpoint's config.json keeps them."""
        return {
            "element": self.element.name,
            "block": list(self.block) if isinstance(self.block, tuple) else self.block or NONE,
            "scale": self.scale.name if self.scale else NONE,
            "scale_rule": self.scale_rule or NONE,
            "tensor_scale": self.tensor_scale,
            "static_scale": NONE if self.static_scale is None else self.static_scale,
            "rounding": self.rounding,
            "hadamard": self.hadamard or NONE,
            "four_over_six": self.four_over_six,
            "seed": self.seed,
        }

    def with_fields(self, name: str, **fields: Any) -> Self:
        """Return this format under another name with some fields, given as in ``to_dict``, replaced.

        Raises: FormatError for an unknown field or value, and for fields that do not combine.
        """
        return type(self).from_dict(name, {**self.to_dict(), **fields})

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> Self:
        """Return the format with these fields, given as in ``to_dict``.

        Raises: FormatError as ``with_fields``.
        """
        unknown = sorted(set(values) - set(FIELDS))
        if unknown:
            raise FormatError(f"a format has no field '{unknown[0]}'; {nearest(unknown[0], FIELDS)}")
        return cls(name, **{field: FIELDS[field](field, value) for field, value in values.items()})

    @classmethod
    def from_key(cls, name: str, key: str) -> Self:
        """Return the format of which ``key`` is the key; the same object each time."""
        found = _from_key(cls, name, key)  # type: ignore[arg-type]  # a class is hashable
        if not found.is_registered:  # a registry has another entry of the name by now
            _from_key.cache_clear()
            found = _from_key(cls, name, key)  # type: ignore[arg-type]
        return cast(Self, found)


@cache
def _from_key(kind: type[Fields], name: str, key: str) -> Fields:
    return kind.from_dict(name, json.loads(key))


def check_operands(weight: Fields | None, input: Fields | None) -> None:
    """Do nothing if a product's two operands may be in these formats; None stays as it is.

    Raises: FormatError for an input's two-dimensional blocks, and for rotations of which one does not undo the other.
    """
    if input is not None:
        _ = input.as_input
    if (
        weight is None
        or input is None
        or (weight.hadamard, weight.hadamard and weight.seed)
        == (
            input.hadamard,
            input.hadamard and input.seed,
        )
    ):
        return
    if weight.hadamard == input.hadamard:
        raise FormatError(
            f"seed {weight.seed} of the weight's format and {input.seed} of the input's: both operands are rotated by "
            "the same random signs, or their product is another"
        )
    raise FormatError(
        f"hadamard {weight.hadamard or NONE} of the weight's format and {input.hadamard or NONE} of the input's: both "
        "operands are rotated alike, or their product is another"
    )


def shown(block: Any) -> str:
    """Return a block as tables show it: 32, 16×16, none."""
    if isinstance(block, tuple | list):
        return "×".join(map(str, block))
    return NONE if block is None else str(block)


def _check_size(block: Block) -> Block:
    sizes = [size for size in (block if isinstance(block, tuple) else (block,)) if size is not None]
    if any(size < 1 for size in sizes):
        raise FormatError(f"block is {shown(block)}; at least 1 value must share a scale")
    if math.prod(sizes) > MOST_IN_A_BLOCK:
        raise FormatError(
            f"block is {shown(block)}; at most {MOST_IN_A_BLOCK} values share a scale "
            "(block: none, for a whole row or tensor)"
        )
    return block


def _check_registered(fields: Fields) -> None:
    for kind, part, known in (("element", fields.element, ELEMENTS), ("scale", fields.scale, SCALES)):
        if part is not None and known.get(part.name) != part:
            raise FormatError(
                f"{kind} '{part.name}' is not the one that {kind.upper()}S has under this name: enter it there, where "
                "checkpoints and compiled models look it up"
            )


def _check_block(fields: Fields) -> None:
    _check_size(fields.block)
    if (fields.block is None) != (fields.scale is None):
        raise FormatError(
            f"block {shown(fields.block)} does not go with scale {fields.scale.name if fields.scale else NONE}: a "
            "block is what shares a scale, so that there are both or neither"
        )


def _check_scale(fields: Fields) -> None:
    rules = rules_for(fields.scale, fields.element)
    if fields.scale_rule in rules or (fields.scale is None and fields.scale_rule is None):
        return
    name = fields.scale.name if fields.scale else NONE
    rule = RULES.get(str(fields.scale_rule))
    if rule is not None and not rule.takes(fields.element):
        raise FormatError(
            f"scale rule '{rule.name}' is not defined for element {fields.element.name}; "
            f"{nearest(rule.name, rules or (NONE,))}"
        )
    raise FormatError(
        f"scale rule '{fields.scale_rule or NONE}' does not go with scale {name}; "
        f"{nearest(str(fields.scale_rule), rules or (NONE,))}"
    )


def _check_tensor_scale(fields: Fields) -> None:
    kind, scale = fields.tensor_scale, fields.scale
    if kind not in get_args(TensorScale):
        raise FormatError(f"no tensor scale '{kind}'; {nearest(kind, get_args(TensorScale))}")
    if kind != "none" and scale is not None and not isinstance(scale, ElementScale):
        span = "powers of two span" if isinstance(scale, PowerOfTwoScale) else "it spans"
        raise FormatError(
            f"tensor_scale '{kind}' with scale {scale.name}: {span} FP32's range already; leave it at 'none'"
        )
    if kind == "none" and scale is None:
        raise FormatError("tensor_scale 'none' with block none: nothing would scale the values")
    if kind == "row" and fields.is_two_dimensional:
        raise FormatError(f"tensor_scale 'row' with block {shown(fields.block)}: such a block spans rows")
    if fields.static_scale is not None:
        if kind != "static":
            raise FormatError(f"static_scale goes with tensor_scale 'static', not '{kind}'")
        if not SMALLEST_TENSOR_SCALE <= fields.static_scale <= LARGEST_TENSOR_SCALE:
            raise FormatError(
                f"static_scale is {fields.static_scale}; expected a number from {SMALLEST_TENSOR_SCALE:.1e} to "
                f"{LARGEST_TENSOR_SCALE:.1e}"
            )


def _check_rounding(fields: Fields) -> None:
    if fields.rounding not in get_args(Rounding):
        raise FormatError(f"no rounding '{fields.rounding}'; {nearest(fields.rounding, get_args(Rounding))}")
    if fields.hadamard is not None and fields.hadamard not in HADAMARD_SIZES:
        raise FormatError(f"hadamard is {fields.hadamard}; expected one of: {', '.join(map(str, HADAMARD_SIZES))}")
    if fields.four_over_six:
        if fields.element.magnitudes[-2:] != (4.0, 6.0):
            raise FormatError(
                f"four_over_six with element {fields.element.name}: it chooses between the largest values of e2m1"
            )
        if fields.scale is None or isinstance(fields.scale, PowerOfTwoScale):
            name = fields.scale.name if fields.scale else NONE
            raise FormatError(f"four_over_six with scale {name}: no such scale is 1.5 times another, as 6 is of 4")
    if not 0 <= fields.seed < SEEDS:
        raise FormatError(f"seed is {fields.seed}; expected 0 to {SEEDS - 1}")
    if fields.seed and fields.hadamard is None and fields.rounding != "stochastic":
        raise FormatError(
            f"seed is {fields.seed}, but nothing is random: there is no hadamard, and rounding is nearest"
        )


# How a recipe's value of each field is read; each takes the field's name and the value.
def _named(table: dict[str, Any], *, optional: bool = False) -> Callable[[str, Any], Any]:
    def read(field: str, value: Any) -> Any:
        known = (*table, NONE) if optional else tuple(table)  # a registry may have grown
        if value not in known:
            raise FormatError(f"no {field.replace('_', ' ')} '{value}'; {nearest(str(value), known)}")
        return table.get(value)

    return read


def _words(kind: Any) -> Callable[[str, Any], Any]:
    return _named({word: word for word in get_args(kind)})


def _rule(field: str, value: Any) -> str | None:
    rule: ScaleRule | None = _named(RULES, optional=True)(field, value)
    return rule.name if rule else None


def _whole(field: str, value: Any) -> int:
    if type(value) is not int:
        raise FormatError(f"{field} is {value!r}; expected a whole number")
    return value


def _block(field: str, value: Any) -> Block:
    if value == NONE:
        return None
    if isinstance(value, list | tuple) and len(value) == 2:
        rows, columns = (_whole(field, one) for one in value)
        return _check_size(columns if rows == 1 else (rows, columns))
    if type(value) is not int:
        raise FormatError(f"{field} is {value!r}; expected a whole number, two of them [rows, columns], or {NONE}")
    return _check_size(value)


def _number(field: str, value: Any) -> float | None:
    if value == NONE:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(
            f"{field} is {value!r}; expected a number (1.0e-3, not 1e-3, which YAML reads as text), or {NONE}"
        )
    return float(value) if abs(value) <= LARGEST_TENSOR_SCALE else math.inf


def _size(field: str, value: Any) -> int | None:
    return None if value == NONE else _whole(field, value)


def _truth(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FormatError(f"{field} is {value!r}; expected true or false")
    return value


FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "element": _named(ELEMENTS),
    "block": _block,
    "scale": _named(SCALES, optional=True),
    "scale_rule": _rule,
    "tensor_scale": _words(TensorScale),
    "static_scale": _number,
    "rounding": _words(Rounding),
    "hadamard": _size,
    "four_over_six": _truth,
    "seed": _whole,
}
