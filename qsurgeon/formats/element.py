"""Scalar number formats as data, and the one rounding.

An element is a handful of numbers; its values, limits and codes follow from them. Bit layouts: OCP Microscaling
Formats v1.0, section 5.3 (E2M1, E2M3, E3M2, E4M3, E5M2, INT8). Arithmetic is in FP32 whatever comes in.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

EXPONENT_MASK = 0x7F800000  # FP32: the exponent's eight bits
FP32_MANTISSA = 23
FP32_BIAS = 127


def look_up(values: tuple[float, ...], codes: Tensor) -> Tensor:
    """Return ``values[code]`` (float32) for each of ``codes``."""
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.to(torch.int32)]


@dataclass(frozen=True)
class Element(ABC):
    """A signed scalar number format of at most 8 bits; code 0 is zero, and what is too large saturates."""

    name: str

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one code."""

    @property
    @abstractmethod
    def nan(self) -> int:
        """The code that NaN takes; 0 where there is none, for the block's scale is NaN then."""

    @property
    @abstractmethod
    def magnitudes(self) -> tuple[float, ...]:
        """Every finite value without its sign, smallest first: ``magnitudes[code]``."""

    @property
    @abstractmethod
    def values(self) -> tuple[float, ...]:
        """The value of every code, sign bit included: ``values[code]``."""

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.magnitudes[-1]

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

        Ties take the even code; what exceeds the largest value saturates, infinity too; NaN stays NaN.
        """
        return self.round_(x.clone())

    def round_(self, x: Tensor) -> Tensor:
        """Round ``x`` in place, as ``round``, and return it.

        Adding and subtracting 1.5 · 2^23 steps rounds to whole steps, where a step is the distance of two
        neighbours at ``x``: FP32 addition itself rounds ties to even.
        """
        x.clamp_(-self.max, self.max)
        magic = self._steps(x, 1.5 * 2.0**FP32_MANTISSA)
        return self._signed_(torch.add(x, magic).sub_(magic), x)

    def round_stochastic(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Return a neighbour of each of ``x`` (float32): the one farther from zero if ``uniform`` says so.

        ``uniform`` (in [0, 1), the shape of ``x``) is compared with how far from the nearer-to-zero neighbour the
        value lies, so that the mean over uniform numbers is the value itself, unless it saturates.
        """
        x = x.clamp(-self.max, self.max)
        step = self._steps(x, 1.0)
        steps = x.abs() / step
        whole = steps.floor()
        whole += steps - whole > uniform
        # A comparison with NaN is false; floor keeps it.
        return self._signed_(whole.mul_(step).copysign_(x), x)

    @abstractmethod
    def _steps(self, x: Tensor, times: float) -> Tensor | float:
        """Return the distance of two neighbours at each of ``x``, ``times`` over."""

    @abstractmethod
    def _signed_(self, rounded: Tensor, x: Tensor) -> Tensor:
        """Give ``rounded``, in place, zeros of the sign that the element has for them."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return the code (uint8) of each of ``x``, which must be values of this element."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the value (float32) of each of ``codes`` (uint8)."""
        return look_up(self.values, codes)


@dataclass(frozen=True)
class FloatElement(Element):
    """A sign bit, exponent bits, mantissa bits.

    ``special`` says what the codes at the top of each sign mean: ``none`` (E2M1: every code is a number),
    ``nan`` (E4M3: the last one is NaN), ``ieee`` (E5M2: the last exponent holds infinity and NaN).
    """

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
    def min_normal(self) -> float:
        """The smallest value with a hidden one; below it the grid is evenly spaced."""
        return self._magnitude(2**self.mantissa)

    def _steps(self, x: Tensor, times: float) -> Tensor:
        power = x.view(torch.int32).bitwise_and(EXPONENT_MASK).view(torch.float32)
        return power.clamp_min_(self.min_normal).mul_(times * 2.0**-self.mantissa)

    def _signed_(self, rounded: Tensor, x: Tensor) -> Tensor:
        return rounded.copysign_(x)

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
        code = code.bitwise_or_((bits >> 31).bitwise_and_(1 << (self.bits - 1)))
        return torch.where(x.isnan(), self.nan, code).to(torch.uint8)


@dataclass(frozen=True)
class IntegerElement(Element):
    """A two's complement integer times a power of two, without its most negative value: -max to max.

    ``fraction``: how many of the bits lie behind the point, the implied scale of OCP's INT8 (2^-6) among them.
    """

    width: int
    fraction: int = 0

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.width

    @property
    def nan(self) -> int:
        """0: there is no code for NaN; the scale above is NaN then."""
        return 0

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Every value without its sign, smallest first: ``magnitudes[code]``."""
        return tuple(math.ldexp(code, -self.fraction) for code in range(1 << (self.width - 1)))

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, the most negative, which is never taken, among them."""
        lowest = -math.ldexp(1 << (self.width - 1), -self.fraction)
        return (*self.magnitudes, lowest, *(-value for value in self.magnitudes[:0:-1]))

    def _steps(self, x: Tensor, times: float) -> float:
        return times * self.smallest

    def _signed_(self, rounded: Tensor, x: Tensor) -> Tensor:
        return rounded.add_(0.0)  # there is no negative zero

    def encode(self, x: Tensor) -> Tensor:
        """Return the code (uint8) of each of ``x``, which must be values of this element."""
        whole = torch.where(x.isnan(), 0, x / self.smallest).to(torch.int32)
        return whole.bitwise_and_((1 << self.width) - 1).to(torch.uint8)


E2M1 = FloatElement("e2m1", exponent=2, mantissa=1)
E2M3 = FloatElement("e2m3", exponent=2, mantissa=3)
E3M2 = FloatElement("e3m2", exponent=3, mantissa=2)
E4M3 = FloatElement("e4m3", exponent=4, mantissa=3, special="nan")
E5M2 = FloatElement("e5m2", exponent=5, mantissa=2, special="ieee")
INT4 = IntegerElement("int4", width=4)
INT8 = IntegerElement("int8", width=8)
INT8_64 = IntegerElement("int8/64", width=8, fraction=6)  # INT8 of OCP MX v1.0, section 5.3.6

ELEMENTS: dict[str, Element] = {e.name: e for e in (E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8, INT8_64)}
