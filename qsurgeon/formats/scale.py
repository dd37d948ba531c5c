"""What a block's values are multiplied by: the number formats of scales, and the rules that find them.

Sources: OCP Microscaling Formats v1.0, sections 5.4 (E8M0) and 6.3 (rule ``floor``); the rules ``even``, ``ceil`` and
``rceil`` are those of torchao's ScaleCalculationMode; ``round`` is ``rceil/7.25`` is AutoRound's
``mx_fp4_rceil_v2``; E4M3 scales are NVFP4's.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qsurgeon.errors import FormatError
from qsurgeon.formats.element import E4M3, EXPONENT_MASK, FP32_BIAS, FP32_MANTISSA, Element, FloatElement, look_up

_MANTISSA_MASK = (1 << FP32_MANTISSA) - 1
_SUBNORMAL = FP32_BIAS - 1 + FP32_MANTISSA  # a subnormal number of FP32 is its bits, as a whole number, times 2^-149


@dataclass(frozen=True)
class PowerOfTwoScale:
    """FP32's exponent alone: no zero, no sign; the last code is NaN."""

    name: str

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 8

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of codes."""
        return torch.uint8

    @property
    def nan(self) -> int:
        """The code that means NaN."""
        return 255

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code: ``values[code]``."""
        return (*(math.ldexp(1.0, code - FP32_BIAS) for code in range(self.nan)), math.nan)

    @property
    def smallest(self) -> float:
        """The smallest value."""
        return self.values[0]

    def largest(self, limit: float) -> float:
        """Return the largest value that does not exceed ``limit``."""
        return max(value for value in self.values if value <= limit)

    def round(self, x: Tensor) -> Tensor:
        """Return the power of two that is nearest to each of ``x`` (float32, within the range), ties to even codes."""
        bits = x.view(torch.int32)
        half = 1 << FP32_MANTISSA - 1
        up = bits + (half - 1) + (bits >> FP32_MANTISSA).bitwise_and_(1)
        # The smallest two: one of them is subnormal in FP32.
        small = torch.where(bits > half + half // 2, 2 * half, half).to(torch.int32)
        return torch.where(bits < 2 * half, small, up.bitwise_and_(EXPONENT_MASK)).view(torch.float32)

    def encode(self, x: Tensor) -> Tensor:
        """Return the code (uint8) of each of ``x`` (float32), which must be values of this scale or NaN."""
        # An FP32 exponent is the code; the smallest value is subnormal there, with exponent 0.
        return (x.view(torch.int32) >> FP32_MANTISSA).bitwise_and(self.nan).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the value (float32) of each of ``codes`` (uint8)."""
        return look_up(self.values, codes)


@dataclass(frozen=True)
class ElementScale:
    """An element without its sign: finer steps than powers of two, over a shorter range."""

    element: FloatElement

    def __post_init__(self) -> None:
        if self.element.special == "none":
            raise FormatError(
                f"element {self.element.name} has no NaN: as a scale it could not say that a block is one"
            )

    @property
    def name(self) -> str:
        """The element's name."""
        return self.element.name

    @property
    def bits(self) -> int:
        """Bits of one code, the sign's, which is always 0, among them."""
        return self.element.bits

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of codes."""
        return torch.uint8

    @property
    def smallest(self) -> float:
        """The smallest value above zero."""
        return self.element.smallest

    def largest(self, limit: float) -> float:
        """Return the largest value that does not exceed ``limit``."""
        return max(value for value in self.element.magnitudes if value <= limit)

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest value to each of ``x`` (float32)."""
        return self.element.round(x)

    def encode(self, x: Tensor) -> Tensor:
        """Return the code (uint8) of each of ``x`` (float32), which must be values of this scale or NaN."""
        return self.element.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the value (float32) of each of ``codes`` (uint8)."""
        return self.element.decode(codes)


@dataclass(frozen=True)
class WideScale:
    """A float of 16 or 32 bits, kept as it is; its codes are its values, in its own dtype."""

    name: str
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return torch.finfo(self.dtype).bits

    @property
    def smallest(self) -> float:
        """The smallest normal number: below it precision is lost."""
        return torch.finfo(self.dtype).tiny

    def largest(self, limit: float) -> float:
        """Return the largest value that does not exceed ``limit``."""
        significand, exponent = math.frexp(limit)
        digits = 1 + self._mantissa
        return math.ldexp(math.floor(math.ldexp(significand, digits)), exponent - digits)

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest value to each of ``x`` (float32, not negative), ties to even; none for a NaN.

        By its bits, as of a normal number, which every scale is once it is clamped. A compiler that fuses operations
        drops a cast to a narrow dtype and back.
        """
        lost = FP32_MANTISSA - self._mantissa
        if not lost:
            return x.clone()
        bits = x.view(torch.int32)
        last = (bits >> lost).bitwise_and_(1)
        return (bits + ((1 << (lost - 1)) - 1)).add_(last).bitwise_and_(-1 << lost).view(torch.float32)

    @property
    def _mantissa(self) -> int:
        return -round(math.log2(torch.finfo(self.dtype).eps))

    def encode(self, x: Tensor) -> Tensor:
        """Return ``x`` (float32), which must be values of this scale or NaN, in its dtype."""
        return x.to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Return ``codes`` in float32."""
        return codes.to(torch.float32)


# Functions with names, so that a format, and a layer that has one, can be pickled.
def _floor(element: Element) -> int:
    return 0


def _ceil(element: Element) -> int:
    return _MANTISSA_MASK


def _even(element: Element) -> int:
    at_emax = sum(value >= 2.0**element.emax for value in element.magnitudes)  # how many lie from 2^emax up
    mantissa = (at_emax - 1).bit_length()
    return 1 << (FP32_MANTISSA - 1 - mantissa)


def _rceil(element: Element) -> int:
    return _up_to(element.max)


def _up_to(limit: float) -> int:
    """Return the carry that doubles the scale where amax exceeds ``limit``, a number of FP32, times a power of two."""
    significand, _ = math.frexp(limit)
    return _MANTISSA_MASK - (int(math.ldexp(significand, FP32_MANTISSA + 1)) & _MANTISSA_MASK)


def _rceil_7_25(element: Element) -> int:
    return _up_to(7.25)


def _round(element: Element) -> int:
    """Return the carry that takes the power of two that is nearest to amax / max on a scale of logarithms.

    With m · 2^k = amax and s · 2^emax = max, m and s from 1 to 2, that is 2^(k - emax), half of it where m < s / √2,
    and twice it where m >= s · √2: at most one of the two can be. In whole numbers, since no float is √2.
    """
    significand, _ = math.frexp(element.max)
    square = int(math.ldexp(significand, FP32_MANTISSA + 1)) ** 2  # (s · 2^23)^2
    one = 1 << FP32_MANTISSA
    if square >= 2 * one**2:
        return one - _root_above((square + 1) // 2)  # s / √2 · 2^23, rounded up: a mantissa below it borrows
    return 2 * one - _root_above(2 * square)


def _root_above(square: int) -> int:
    """Return the smallest whole number whose square is at least ``square``, which is above zero."""
    return math.isqrt(square - 1) + 1


E8M0 = PowerOfTwoScale("e8m0")
E4M3_SCALE = ElementScale(E4M3)
BF16 = WideScale("bf16", torch.bfloat16)
FP32 = WideScale("fp32", torch.float32)

Scale = PowerOfTwoScale | ElementScale | WideScale
SCALES: dict[str, Scale] = {one.name: one for one in (E8M0, E4M3_SCALE, BF16, FP32)}


@dataclass(frozen=True)
class ScaleRule(ABC):
    """How the scale of a block is found from its largest magnitude.

    A rule that is entered in ``RULES`` is known everywhere: recipes can name it, and every backend that does not know
    its kind leaves it to one that runs ``find``.
    """

    name: str

    @abstractmethod
    def fits(self, scale: Scale) -> bool:
        """Return whether the rule finds scales of this kind."""

    def takes(self, element: Element) -> bool:
        """Return whether the rule is defined for blocks of this element; most are for all."""
        return True

    @abstractmethod
    def find(self, amax: Tensor, element: Element, scale: Any) -> Tensor:
        """Return the scale (float32) of blocks with the largest magnitudes ``amax`` (float32, not negative).

        In the shape of ``amax``; the caller clamps it to the scale's range. Operations of torch only, the same bits on
        every device, and no decision that depends on a value: torch.compile sees them too.
        """

    def key(self, element: Element) -> str:
        """Return what the rule comes to for ``element``, as text: equal where the scales are equal."""
        return self.name


@dataclass(frozen=True)
class PowerRule(ScaleRule):
    """Take 2^(floor(log2 amax) - emax), twice that or half of it, as amax's mantissa says.

    carry: returns what is added to the bits of that mantissa for an element, 1 - 2^23 to 2^23 - 1: a sum that overflows
    into the exponent doubles the scale, one below zero halves it. No logarithm and no division is rounded, here or in
    native.cpp. elements: the names of those that the rule is defined for; None: all.
    """

    carry: Callable[[Element], int]
    elements: tuple[str, ...] | None = None

    def takes(self, element: Element) -> bool:
        """Return whether ``elements`` names the element."""
        return self.elements is None or element.name in self.elements

    def carry_of(self, element: Element) -> int:
        """Return what is added for ``element``. Raises: FormatError if that is no mantissa's bits."""
        carry = self.carry(element)
        if abs(carry) > _MANTISSA_MASK:
            raise FormatError(
                f"scale rule '{self.name}' adds {carry} for element {element.name}; expected -{_MANTISSA_MASK} to "
                f"{_MANTISSA_MASK}, the bits of a mantissa"
            )
        return carry

    def fits(self, scale: Scale) -> bool:
        """Return whether the scale is a power of two."""
        return isinstance(scale, PowerOfTwoScale)

    def find(self, amax: Tensor, element: Element, scale: PowerOfTwoScale) -> Tensor:
        """Return the power of two of each of ``amax``."""
        carry, bits = self.carry_of(element), amax.view(torch.int32)
        if element.emax > 0:  # a subnormal amax, whose bits have no hidden one, is below all scales whatever is added
            moved = bits + carry if carry >= 0 else (bits + carry).clamp_min_(0)
            return moved.bitwise_and_(EXPONENT_MASK).view(torch.float32) * 2.0**-element.emax
        # In whole numbers: a mode that flushes subnormal numbers to zero does not change the scale.
        counted = bits.to(torch.float32).view(torch.int32) - (_SUBNORMAL << FP32_MANTISSA)
        bits = torch.where(bits > _MANTISSA_MASK, bits, counted)
        exponent = (bits + carry >> FP32_MANTISSA).sub_(element.emax).clamp_(0, 2 * FP32_BIAS)
        return torch.where(exponent > 0, exponent << FP32_MANTISSA, 1 << FP32_MANTISSA - 1).view(torch.float32)

    def key(self, element: Element) -> str:
        """Return the number that is added."""
        return f"carry {self.carry_of(element)}"


@dataclass(frozen=True)
class NearestRule(ScaleRule):
    """Take the value of the scale that is nearest to amax / max: the largest value becomes the element's largest."""

    def fits(self, scale: Scale) -> bool:
        """Return whether the scale has steps finer than powers of two."""
        return not isinstance(scale, PowerOfTwoScale)

    def find(self, amax: Tensor, element: Element, scale: ElementScale | WideScale) -> Tensor:
        """Return the nearest scale to each of ``amax / max``."""
        return scale.round(amax / element.max)


# The one place where a rule is entered.
RULES: dict[str, ScaleRule] = {
    rule.name: rule
    for rule in (
        PowerRule("floor", _floor),  # OCP MX v1.0
        PowerRule("even", _even),  # rounds amax to the precision that the element has at its largest power of two
        PowerRule("rceil", _rceil),  # 2^ceil(log2(amax / max)): nothing saturates
        PowerRule("ceil", _ceil),  # 2^(ceil(log2 amax) - emax)
        # 2^round(log2(amax / max)); no amax lies in the middle, where log2 has half of a whole number: √2 is irrational
        PowerRule("round", _round),
        # 2^ceil(log2(amax / 7.25)), amax of 7.25 · 2^k included: values up to 7.25 saturate at 6 (arXiv 2607.24377)
        PowerRule("rceil/7.25", _rceil_7_25, ("e2m1",)),
        NearestRule("nearest"),
    )
}


def rules_for(scale: Scale | None, element: Element) -> tuple[str, ...]:
    """Return the names of the rules that find such a scale of this element's blocks; none where there is no scale."""
    if scale is None:
        return ()
    return tuple(name for name, rule in RULES.items() if rule.fits(scale) and rule.takes(element))
