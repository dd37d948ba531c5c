"""Scalar number formats as data, and the one rounding.

An element is a handful of numbers; its values, limits and codes follow from them. Bit layouts: OCP Microscaling
Formats v1.0, section 5.3 (E2M1, E4M3, E5M2, E8M0). Arithmetic is in FP32 whatever comes in.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

EXPONENT_MASK = 0x7F800000  # FP32: the exponent's eight bits
FP32_MANTISSA = 23
FP32_BIAS = 127


def _look_up(values: tuple[float, ...], codes: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.to(torch.int32)]


@dataclass(frozen=True)
class Element:
    """A signed scalar float: a sign bit, exponent bits, mantissa bits; code 0 is zero.

    ``special`` says what the codes at the top of each sign mean: ``none`` (E2M1: every code is a number),
    ``nan`` (E4M3: the last one is NaN), ``ieee`` (E5M2: the last exponent holds infinity and NaN).
    """

    name: str
    exponent: int
    mantissa: int
    special: Literal["none", "nan", "ieee"] = "none"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def nan(self) -> int:
        """The code that NaN takes; 0 where there is none, for the block's scale is NaN then."""
        return 0 if self.special == "none" else (1 << (self.bits - 1)) - 1

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Every finite value without its sign, smallest first: ``magnitudes[code]``."""
        reserved = {"none": 0, "nan": 1, "ieee": 2**self.mantissa}[self.special]
        return tuple(map(self._magnitude, range(2 ** (self.bits - 1) - reserved)))

    def _magnitude(self, code: int) -> float:
        field, fraction = divmod(code, 2**self.mantissa)
        hidden = 1 if field else 0  # subnormal values have no hidden one
        return math.ldexp(hidden + fraction / 2**self.mantissa, max(field, 1) - self.bias)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, sign bit included: ``values[code]``."""
        half = list(self.magnitudes)
        if self.special == "ieee":
            half.append(math.inf)
        half += [math.nan] * (2 ** (self.bits - 1) - len(half))
        return (*half, *(-value for value in half))

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.magnitudes[-1]

    @property
    def min_normal(self) -> float:
        """The smallest value with a hidden one; below it the grid is evenly spaced."""
        return self._magnitude(2**self.mantissa)

    @property
    def smallest(self) -> float:
        """The smallest value above zero."""
        return self.magnitudes[1]

    @property
    def emax(self) -> int:
        """The exponent of the largest power of two: OCP MX v1.0, section 6.3."""
        return math.frexp(self.max)[1] - 1

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest value of this element to each of ``x`` (float32, any shape).

        Ties take the even code; what exceeds the largest value saturates, infinity too; NaN stays NaN; the sign
        of a zero is kept. Adding and subtracting 1.5 · 2^23 steps rounds to whole steps, where a step is the
        distance of two neighbours at ``x``: FP32 addition itself rounds ties to even.
        """
        clamped = x.clamp(-self.max, self.max)
        power = clamped.view(torch.int32).bitwise_and(EXPONENT_MASK).view(torch.float32)
        magic = power.clamp_min(self.min_normal).mul_(1.5 * 2.0 ** (FP32_MANTISSA - self.mantissa))
        return torch.add(clamped, magic).sub_(magic).copysign_(clamped)

    def encode(self, x: Tensor) -> Tensor:
        """Return the code (uint8) of each of ``x``, which must be values of this element."""
        bits = x.view(torch.int32)
        magnitude = bits.bitwise_and(0x7FFFFFFF)
        drop = FP32_MANTISSA - self.mantissa
        normal = (magnitude >> drop) - ((FP32_BIAS - self.bias) << self.mantissa)
        # Where there is no hidden one the code counts steps.
        subnormal = (x.abs() / self.smallest).to(torch.int32)
        code = torch.where(x.abs() < self.min_normal, subnormal, normal)
        code = code.clamp_max_(min(len(self.magnitudes), (1 << (self.bits - 1)) - 1))  # infinity follows the largest
        code = torch.where(x.isnan(), self.nan, code)
        sign = (bits >> 31).bitwise_and(1 << (self.bits - 1))
        return code.bitwise_or(sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the value (float32) of each of ``codes`` (uint8)."""
        return _look_up(self.values, codes)


@dataclass(frozen=True)
class PowerOfTwo:
    """An unsigned scale that is a power of two, FP32's exponent alone: no zero, no sign; the last code is NaN."""

    name: str

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 8

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

    def encode(self, x: Tensor) -> Tensor:
        """Return the code (uint8) of each of ``x`` (float32), which must be values of this element or NaN."""
        # An FP32 exponent is the code; the smallest value is subnormal there, with exponent 0.
        return (x.view(torch.int32) >> FP32_MANTISSA).bitwise_and(self.nan).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the value (float32) of each of ``codes`` (uint8)."""
        return _look_up(self.values, codes)


E2M1 = Element("e2m1", exponent=2, mantissa=1)
E2M3 = Element("e2m3", exponent=2, mantissa=3)
E3M2 = Element("e3m2", exponent=3, mantissa=2)
E4M3 = Element("e4m3", exponent=4, mantissa=3, special="nan")
E5M2 = Element("e5m2", exponent=5, mantissa=2, special="ieee")
E8M0 = PowerOfTwo("e8m0")

Scale = Element | PowerOfTwo
ELEMENTS: dict[str, Element] = {e.name: e for e in (E2M1, E2M3, E3M2, E4M3, E5M2)}
SCALES: dict[str, Scale] = {e.name: e for e in (E8M0, E4M3)}
