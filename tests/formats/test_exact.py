"""Scales and values against rational arithmetic, where floating point is least like it: subnormal, huge, at edges."""

from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

from qsurgeon.formats import CATALOG, Format, get_format, kernels
from qsurgeon.formats.element import ELEMENTS, Element
from qsurgeon.formats.scale import ElementScale, PowerOfTwoScale, WideScale, rules_for

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4")
SINGLE, BF16 = (24, -126), (8, -126)  # digits, and the exponent of the smallest normal number

# Every rule with every element, and every other scale of the catalogue. Rows of two values are a short block.
FORMATS = [
    MXFP4.with_fields(f"{element}-{rule}", element=element, scale_rule=rule)
    for element in ELEMENTS
    for rule in rules_for(MXFP4.scale, ELEMENTS[element])
] + [
    fmt.as_weight.with_fields(fmt.name, block=fmt.block_shape[1], tensor_scale="none")
    for fmt in CATALOG.values()
    if fmt.scale is not None and not isinstance(fmt.scale, PowerOfTwoScale)
]
# Each native kernel is seconds of a C++ compiler: those of other tests, and all rules at two exponents of an element.
KNOWN = {fmt.kernel_key for fmt in CATALOG.values()}
NATIVE = [fmt for fmt in FORMATS if fmt.kernel_key in KNOWN or fmt.element.name in ("e2m1", "int8/64")]


def exponent_of(x: Fraction) -> int:
    """Return floor(log2 x)."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if x >= Fraction(2) ** exponent else exponent - 1


def rounded(x: Fraction, digits: int, lowest: int) -> Fraction:
    """Return the nearest number of so many binary digits, ties to even; subnormal ones below 2^lowest."""
    if not x:
        return x
    step = Fraction(2) ** (max(exponent_of(abs(x)), lowest) - digits + 1)
    return round(x / step) * step


@cache
def fractions_of(element: Element) -> list[Fraction]:
    return list(map(Fraction, element.magnitudes))


def nearest(x: Fraction, element: Element) -> Fraction:
    """Return the nearest value of the element, ties to the even code; what is too large saturates."""
    values = fractions_of(element)
    above = min(bisect_left(values, abs(x)), len(values) - 1)
    near = (max(above - 1, 0), above)
    code = min(near, key=lambda code: (abs(values[code] - abs(x)), code % 2))
    return values[code] if x >= 0 else -values[code]


RULES: dict[str, Callable[[Fraction, Element], int]] = {
    "floor": lambda amax, element: exponent_of(amax) - element.emax,
    "ceil": lambda amax, element: -exponent_of(1 / amax) - element.emax,
    "rceil": lambda amax, element: -exponent_of(Fraction(element.max) / amax),
    "even": lambda amax, element: exponent_of(halves_up(amax, digits_at_emax(element))) - element.emax,
    # 2^n is the nearest to q = amax / max where 2^(n - 1/2) <= q < 2^(n + 1/2): where 2q² is from 4^n to 4^(n + 1).
    "round": lambda amax, element: exponent_of(2 * (amax / Fraction(element.max)) ** 2) // 2,
    "rceil/7.25": lambda amax, element: -exponent_of(Fraction(29, 4) / amax),
}


def digits_at_emax(element: Element) -> int:
    """Return the binary digits that the element has at its largest power of two."""
    one = Fraction(2) ** element.emax
    step = min(Fraction(value) - one for value in element.magnitudes if value > one)
    return exponent_of(one / step) + 1


def halves_up(x: Fraction, digits: int) -> Fraction:
    """Return ``x`` rounded to so many digits; half of a step goes up, which an exponent does not tell from even."""
    step = Fraction(2) ** (exponent_of(x) - digits + 1)
    return (x / step + Fraction(1, 2)).__floor__() * step


def scale_of(amax: Fraction, fmt: Format) -> Fraction:
    """Return the scale of a block as its rule defines it, within the range of its kind."""
    scale, element = fmt.scale, fmt.element
    smallest, largest = Fraction(scale.smallest), Fraction(fmt.largest_scale)  # type: ignore[union-attr]
    if isinstance(scale, PowerOfTwoScale):
        found = Fraction(2) ** RULES[str(fmt.scale_rule)](amax, element) if amax else smallest
    else:
        found = rounded(amax / Fraction(element.max), *SINGLE)
        if isinstance(scale, ElementScale):
            found = nearest(found, scale.element)
        elif isinstance(scale, WideScale) and scale.bits == 16:
            found = rounded(found, *BF16)
    return min(max(found, smallest), largest)


def magnitudes(fmt: Format, dtype: torch.dtype) -> list[float]:
    """Return magnitudes at and beside where rules change their mind, the largest and smallest of a dtype among them."""
    low, high = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    at = [1.0, fmt.element.max, 2.0**fmt.element.emax, 1.9375, 2 - 2.0**-7, 2 - 2.0**-8, 7.25, fmt.element.max * 2**0.5]
    powers = [2.0**k for k in (-149, -140, -133, -128, -127, -126, -125, -24, 0)]
    found = [low, high, least, 3 * least, *(one * power for one in at for power in powers)]
    x = torch.tensor(found, dtype=torch.float64).clamp(max=high).to(dtype)
    beside = [torch.nextafter(x, torch.tensor(side, dtype=dtype)) for side in (0.0, torch.inf)]
    seen = torch.cat([x, *beside])
    return sorted({float(one) for one in seen[seen.isfinite()].tolist()})


@pytest.mark.parametrize(
    ("fmt", "dtype", "kind"),
    [(fmt, dtype, "eager") for fmt in FORMATS for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [(fmt, torch.float32, "native") for fmt in NATIVE],
    ids=lambda one: str(getattr(one, "name", one)),
)
def test_scales_and_values_are_those_of_rational_arithmetic(
    fmt: Format, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, kind)
    amax = magnitudes(fmt, dtype)
    x = torch.tensor([[one, -one * 0.7] for one in amax], dtype=torch.float64).to(dtype)
    quantized = fmt.quantize(x)
    assert fmt.scale is not None
    assert quantized.scale is not None
    scales = fmt.scale.decode(quantized.scale).flatten().tolist()
    values = fmt.element.decode(quantized.codes).tolist()
    for row, scale, found in zip(x.tolist(), scales, values, strict=True):
        expected = scale_of(max(Fraction(abs(one)) for one in row), fmt)
        assert Fraction(scale) == expected, (row, scale, float(expected))
        quotients = [rounded(Fraction(one) / expected, *SINGLE) for one in row]
        assert found == [float(nearest(one, fmt.element)) for one in quotients], (row, scale)


def blocks_of(amax: list[float]) -> Tensor:
    return torch.tensor(amax, dtype=torch.float32)[:, None]


def test_even_of_mxint8_at_subnormal_amax_rounds_up_from_where_it_should() -> None:
    # 2^-126 less a step and less a half of one of the element's six bits: the first is nearer to 2^-126.
    fmt = get_format("mxint8").with_fields("even", scale_rule="even")
    first = 2.0**-126 - 2.0**-134
    below = first - 2.0**-149
    scales = fmt.quantize(blocks_of([first, below])).scale
    assert scales is not None
    assert scales.flatten().tolist() == [1, 0]


def test_rceil_at_a_subnormal_quotient_saturates_nothing() -> None:
    fmt = MXFP4.with_fields("rceil", scale_rule="rceil")
    at, beyond = 6 * 2.0**-127, 6 * 2.0**-127 + 2.0**-147
    scales = fmt.quantize(blocks_of([at, beyond])).scale
    assert scales is not None
    assert scales.flatten().tolist() == [0, 1]
    assert not fmt.saturates(blocks_of([at, beyond])).any()


STATIC = [
    fmt.with_fields("static", tensor_scale="static", static_scale=number)
    for fmt in (
        NVFP4,
        NVFP4.with_fields("46", four_over_six=True),
        NVFP4.with_fields("16x16", block=[16, 16]),
        get_format("fp8_e4m3"),
        get_format("int8"),
    )
    for number in (2.0**-100, 1e-9, 1.0, 1e30, torch.finfo(torch.float32).max)
]


@pytest.mark.parametrize("kind", ["native", "eager"])
@pytest.mark.parametrize(
    "fmt", STATIC, ids=lambda fmt: f"{fmt.element.name}-{fmt.four_over_six}-{fmt.block}-{fmt.static_scale:.0e}"
)
def test_what_a_static_scale_is_too_small_for_saturates(
    fmt: Format, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, kind)
    assert fmt.static_scale is not None
    x = torch.tensor([1e30, -1e30, 3e38, 1e-30, 1.0, 0.0, -5e-39, 1e20]).repeat_interleave(16)[None].clone()
    x[0, 3] = 0.0
    top = fmt.largest * fmt.static_scale
    found, quantized = fmt.fake_quantize(x), fmt.quantize(x)
    assert found.isfinite().all()
    assert torch.equal(found, quantized.dequantize())
    beyond = x.double().abs() > top * 1.001
    expected = (x.double().sign() * top).float()[beyond]
    torch.testing.assert_close(found[beyond], expected, rtol=1e-6, atol=0)
    assert fmt.saturates(x)[beyond].all()
    assert fmt.fake_quantize(torch.tensor([[torch.inf, *[1.0] * 15]])).isnan().any()
