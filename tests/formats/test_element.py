"""Scalar formats: every code, every tie and its neighbours, against ml_dtypes and torch."""

import math
from operator import attrgetter

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsurgeon.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, ELEMENTS, INT4, INT8, INT8_64, Element, FloatElement
from qsurgeon.formats.scale import E8M0, PowerOfTwoScale

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "int4": ml_dtypes.int4,
    "int8": np.int8,
}
FLOATS = [element for element in ELEMENTS.values() if isinstance(element, FloatElement)]
INTEGERS = [INT4, INT8, INT8_64]
TORCH_DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
}
FLOAT32_MAX = torch.finfo(torch.float32).max

each_float = pytest.mark.parametrize("element", FLOATS, ids=attrgetter("name"))
each_integer = pytest.mark.parametrize("element", INTEGERS, ids=attrgetter("name"))
each_element = pytest.mark.parametrize("element", ELEMENTS.values(), ids=attrgetter("name"))
each_scalar = pytest.mark.parametrize("scalar", [*ELEMENTS.values(), E8M0], ids=attrgetter("name"))
each_scalar_of_ml_dtypes = pytest.mark.parametrize("scalar", [*FLOATS, INT4, INT8, E8M0], ids=attrgetter("name"))
each_eight_bit_scalar = pytest.mark.parametrize("scalar", [E4M3, E5M2, E8M0], ids=attrgetter("name"))
each_eight_bit_element = pytest.mark.parametrize("element", [E4M3, E5M2], ids=attrgetter("name"))


def all_codes(scalar: Element | PowerOfTwoScale) -> Tensor:
    return torch.arange(2**scalar.bits, dtype=torch.uint8)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def ties(element: Element) -> Tensor:
    grid = torch.tensor(element.magnitudes)
    return (grid[:-1] + grid[1:]) / 2  # exact: one bit more than the element's mantissa


def signed(x: Tensor, element: Element) -> Tensor:
    """Return ``x`` with zeros as the element has them: an integer's have no sign."""
    return x + 0.0 if element in INTEGERS else x


def ml_dtypes_rounded(x: Tensor, element: Element) -> Tensor:
    clamped = x.clamp(-element.max, element.max)  # E4M3 and E5M2 of ml_dtypes do not saturate
    if element in INTEGERS:  # numpy casts to integers by truncation, and has no int8 in 64ths
        return torch.from_numpy(np.rint(clamped.numpy() / element.smallest) * np.float32(element.smallest)) + 0.0
    return torch.from_numpy(clamped.numpy().astype(ML_DTYPES[element.name]).astype(np.float32))


def every_bfloat16() -> Tensor:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    return values[values.isfinite()]


def dense_and_wide(element: Element) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(50_000, generator=generator) * 2 - 1) * element.max * 1.1
    sign = torch.randint(0, 2, (50_000,), generator=generator) * 2 - 1
    low, high = math.log2(element.smallest) - 3, math.log2(element.max) + 3
    wide = torch.exp2(torch.rand(50_000, generator=generator) * (high - low) + low) * sign
    return torch.cat([dense, wide])


# What the codes mean


@each_scalar_of_ml_dtypes
def test_every_code_has_the_value_ml_dtypes_gives_it(scalar: Element | PowerOfTwoScale) -> None:
    codes = all_codes(scalar)
    as_stored = np.int8(codes.numpy().view(np.int8) << 4) >> 4 if scalar is INT4 else codes.numpy()
    expected = as_stored.astype(ML_DTYPES[scalar.name]) if scalar is INT4 else as_stored.view(ML_DTYPES[scalar.name])
    expected = expected.astype(np.float32)
    np.testing.assert_array_equal(scalar.decode(codes).numpy(), expected)


@each_eight_bit_scalar
def test_every_code_has_the_value_torch_gives_it(scalar: Element | PowerOfTwoScale) -> None:
    codes = all_codes(scalar)
    expected = codes.view(TORCH_DTYPES[scalar.name]).float()
    torch.testing.assert_close(scalar.decode(codes), expected, rtol=0, atol=0, equal_nan=True)


@each_scalar
def test_there_is_one_value_for_every_code(scalar: Element | PowerOfTwoScale) -> None:
    assert len(scalar.values) == 2**scalar.bits


def test_an_int8_of_ocp_counts_sixty_fourths() -> None:
    codes = all_codes(INT8_64)
    assert torch.equal(INT8_64.decode(codes) * 64, INT8.decode(codes))
    assert (INT8_64.max, INT8_64.smallest, INT8_64.emax) == (127 / 64, 1 / 64, 0)


@pytest.mark.parametrize(("element", "largest"), [(INT4, 7.0), (INT8, 127.0)], ids=["int4", "int8"])
def test_an_integer_is_symmetric_and_never_takes_its_most_negative_code(element: Element, largest: float) -> None:
    assert element.max == largest
    assert element.round(torch.tensor([-1e9, 1e9])).tolist() == [-largest, largest]
    assert min(element.values) == -largest - 1


def test_the_sixteen_values_of_e2m1_are_these() -> None:
    positive = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert E2M1.values == (*positive, *(-value for value in positive))


def test_e8m0_spans_the_powers_of_two_of_float32_and_ends_in_nan() -> None:
    assert E8M0.values[0] == 2.0**-127
    assert E8M0.values[127] == 1.0
    assert E8M0.values[254] == 2.0**127
    assert math.isnan(E8M0.values[255])


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        pytest.param(E2M1, (4, 1, 2, 6.0, 1.0, 0.5), id="e2m1"),
        pytest.param(E2M3, (6, 1, 2, 7.5, 1.0, 0.125), id="e2m3"),
        pytest.param(E3M2, (6, 3, 4, 28.0, 0.25, 0.0625), id="e3m2"),
        pytest.param(E4M3, (8, 7, 8, 448.0, 2.0**-6, 2.0**-9), id="e4m3"),
        pytest.param(E5M2, (8, 15, 15, 57344.0, 2.0**-14, 2.0**-16), id="e5m2"),
    ],
)
def test_the_limits_are_those_of_the_definition(element: FloatElement, expected: tuple[float, ...]) -> None:
    limits = (element.bits, element.bias, element.emax, element.max, element.min_normal, element.smallest)
    assert limits == expected


def test_a_code_of_e8m0_is_eight_bits_and_its_last_is_nan() -> None:
    assert (E8M0.bits, E8M0.nan, E8M0.smallest) == (8, 255, 2.0**-127)


@pytest.mark.parametrize(
    ("element", "count"),
    [
        pytest.param(E2M1, 8, id="e2m1"),
        pytest.param(E2M3, 32, id="e2m3"),
        pytest.param(E3M2, 32, id="e3m2"),
        pytest.param(E4M3, 127, id="e4m3"),
        pytest.param(E5M2, 124, id="e5m2"),
    ],
)
def test_the_magnitudes_are_all_finite_values_in_order(element: Element, count: int) -> None:
    assert len(element.magnitudes) == count
    assert list(element.magnitudes) == sorted(set(element.magnitudes))
    assert element.magnitudes[0] == 0.0
    assert all(map(math.isfinite, element.magnitudes))


@each_scalar
def test_decode_gives_float32_in_the_shape_of_the_codes(scalar: Element | PowerOfTwoScale) -> None:
    decoded = scalar.decode(torch.zeros(2, 3, 5, dtype=torch.uint8))
    assert decoded.dtype == torch.float32
    assert decoded.shape == (2, 3, 5)


# From values back to codes


@each_element
def test_encode_gives_back_the_code_of_every_finite_value(element: Element) -> None:
    codes = all_codes(element)
    finite = codes[element.decode(codes).abs() <= element.max]
    encoded = element.encode(element.decode(finite))
    assert encoded.dtype == torch.uint8
    assert encoded.tolist() == finite.tolist()


def test_encode_gives_back_every_code_of_e8m0() -> None:
    codes = all_codes(E8M0)
    encoded = E8M0.encode(E8M0.decode(codes))
    assert encoded.dtype == torch.uint8
    assert encoded.tolist() == codes.tolist()


def test_encode_gives_back_the_codes_of_infinity() -> None:
    codes = torch.tensor([0b0_11111_00, 0b1_11111_00], dtype=torch.uint8)
    assert E5M2.encode(E5M2.decode(codes)).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("element", "code"),
    [
        pytest.param(E2M1, 0, id="e2m1 has none"),
        pytest.param(E2M3, 0, id="e2m3 has none"),
        pytest.param(E3M2, 0, id="e3m2 has none"),
        pytest.param(E4M3, 0b0_1111_111, id="e4m3"),
        pytest.param(E5M2, 0b0_11111_11, id="e5m2"),
    ],
)
def test_nan_takes_the_last_code_or_zero_where_there_is_none(element: Element, code: int) -> None:
    assert element.encode(torch.tensor([math.nan])).tolist() == [code]


@each_integer
def test_zero_has_one_code_and_no_sign_in_an_integer(element: Element) -> None:
    assert element.encode(torch.tensor([0.0, -0.0])).tolist() == [0, 0]
    assert element.encode(torch.tensor([math.nan])).tolist() == [0]
    assert not element.round(torch.tensor([-0.0, -element.smallest / 2])).signbit().any()


@each_float
def test_the_two_zeros_have_codes_of_their_own(element: Element) -> None:
    assert element.encode(torch.tensor([0.0, -0.0])).tolist() == [0, 2 ** (element.bits - 1)]


# Rounding


def test_the_seven_ties_of_e2m1_round_to_these() -> None:
    rounded = E2M1.round(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    assert rounded.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@each_element
def test_every_value_rounds_to_itself(element: Element) -> None:
    values = torch.tensor([value for value in element.values if abs(value) <= element.max])
    assert torch.equal(bits(element.round(values)), bits(values))


@pytest.mark.parametrize("sign", [pytest.param(1.0, id="positive"), pytest.param(-1.0, id="negative")])
@each_element
def test_every_tie_takes_the_even_code(element: Element, sign: float) -> None:
    codes = torch.arange(len(element.magnitudes) - 1)
    even = torch.tensor(element.magnitudes)[codes + codes % 2]
    assert torch.equal(bits(element.round(sign * ties(element))), bits(signed(sign * even, element)))


@pytest.mark.parametrize("sign", [pytest.param(1.0, id="positive"), pytest.param(-1.0, id="negative")])
@each_element
def test_just_nearer_zero_than_a_tie_takes_the_smaller_neighbour(element: Element, sign: float) -> None:
    below = torch.nextafter(ties(element), torch.tensor(0.0))
    smaller = torch.tensor(element.magnitudes[:-1])
    assert torch.equal(bits(element.round(sign * below)), bits(signed(sign * smaller, element)))


@pytest.mark.parametrize("sign", [pytest.param(1.0, id="positive"), pytest.param(-1.0, id="negative")])
@each_element
def test_just_farther_from_zero_than_a_tie_takes_the_larger_neighbour(element: Element, sign: float) -> None:
    above = torch.nextafter(ties(element), torch.tensor(math.inf))
    larger = torch.tensor(element.magnitudes[1:])
    assert torch.equal(bits(element.round(sign * above)), bits(sign * larger))


@each_float
def test_half_the_smallest_value_keeps_only_its_sign(element: Element) -> None:
    half = element.smallest / 2
    rounded = element.round(torch.tensor([half, -half, 0.0, -0.0]))
    assert torch.equal(bits(rounded), bits(torch.tensor([0.0, -0.0, 0.0, -0.0])))


@each_float
def test_values_that_are_subnormal_in_float32_round_to_a_zero_of_their_sign(element: Element) -> None:
    tiny = torch.tensor([2.0**-149, -(2.0**-149), 2.0**-127, -(2.0**-127)])
    assert torch.equal(bits(element.round(tiny)), bits(torch.tensor([0.0, -0.0, 0.0, -0.0])))


@each_element
def test_what_exceeds_the_largest_value_saturates_infinity_too(element: Element) -> None:
    beyond = torch.tensor([element.max * 1.0001, element.max * 2, FLOAT32_MAX, math.inf])
    assert element.round(beyond).tolist() == [element.max] * 4
    assert element.round(-beyond).tolist() == [-element.max] * 4


@each_element
def test_nan_stays_nan_among_numbers(element: Element) -> None:
    rounded = element.round(torch.tensor([1.0, math.nan, -math.nan, -1.0]))
    assert rounded.isnan().tolist() == [False, True, True, False]
    assert rounded[[0, 3]].tolist() == [1.0, -1.0]


@each_element
def test_every_bfloat16_rounds_as_ml_dtypes_rounds_it(element: Element) -> None:
    x = every_bfloat16()
    assert torch.equal(bits(element.round(x)), bits(ml_dtypes_rounded(x, element)))


@each_element
def test_dense_and_wide_values_round_as_ml_dtypes_rounds_them(element: Element) -> None:
    x = dense_and_wide(element)
    assert torch.equal(bits(element.round(x)), bits(ml_dtypes_rounded(x, element)))


@each_eight_bit_element
def test_every_bfloat16_rounds_as_torch_rounds_it(element: Element) -> None:
    x = every_bfloat16()
    expected = x.clamp(-element.max, element.max).to(TORCH_DTYPES[element.name]).float()
    assert torch.equal(bits(element.round(x)), bits(expected))


@each_eight_bit_element
def test_dense_and_wide_values_round_as_torch_rounds_them(element: Element) -> None:
    x = dense_and_wide(element)
    expected = x.clamp(-element.max, element.max).to(TORCH_DTYPES[element.name]).float()
    assert torch.equal(bits(element.round(x)), bits(expected))


@each_element
def test_what_is_rounded_has_the_code_of_the_oracle(element: Element) -> None:
    x = dense_and_wide(element)
    clamped = x.clamp(-element.max, element.max).numpy()
    if element in INTEGERS:
        expected = torch.from_numpy(np.rint(clamped / element.smallest).astype(np.int8).view(np.uint8))
        expected &= 2**element.bits - 1
    else:
        expected = torch.from_numpy(clamped.astype(ML_DTYPES[element.name]).view(np.uint8))
    assert torch.equal(element.encode(element.round(x)), expected)


@each_element
@settings(deadline=None, max_examples=50, derandomize=True)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_other_value_is_nearer_than_the_one_rounded_to(element: Element, value: float) -> None:
    rounded = element.round(torch.tensor([value])).item()
    distance = min(abs(abs(value) - magnitude) for magnitude in element.magnitudes)
    assert abs(rounded) in element.magnitudes
    assert abs(value - rounded) == distance


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@each_element
def test_stochastic_rounding_takes_the_farther_neighbour_as_often_as_the_value_is_near_it(
    element: Element, sign: float
) -> None:
    low, high = torch.tensor(element.magnitudes[:-1]), torch.tensor(element.magnitudes[1:])
    uniform = torch.arange(0, 64) / 64  # every share of 1/64
    for quarter in (0.25, 0.5, 0.75):
        x = (low + (high - low) * quarter)[:, None].expand(-1, 64) * sign
        rounded = element.round_stochastic(x, uniform.expand_as(x)) * sign
        assert ((rounded == low[:, None]) | (rounded == high[:, None])).all()
        assert ((rounded == high[:, None]).sum(-1) == 64 * quarter).all()


@each_element
def test_stochastic_rounding_leaves_values_and_saturates(element: Element) -> None:
    values = torch.tensor([value for value in element.values if abs(value) <= element.max])
    never = torch.zeros_like(values)
    assert torch.equal(bits(element.round_stochastic(values, never)), bits(values))
    assert element.round_stochastic(torch.tensor([math.inf, -1e38]), torch.zeros(2)).tolist() == [
        element.max,
        -element.max,
    ]
    assert element.round_stochastic(torch.tensor([math.nan]), torch.zeros(1)).isnan().all()


@each_element
def test_rounding_is_monotone(element: Element) -> None:
    rounded = element.round(dense_and_wide(element).sort().values)
    assert (rounded.diff() >= 0).all()


@each_element
def test_rounding_does_not_depend_on_shape_or_strides(element: Element) -> None:
    x = dense_and_wide(element)[:240]
    expected = element.round(x).view(4, 5, 12).transpose(0, 2)
    assert torch.equal(element.round(x.view(4, 5, 12).transpose(0, 2)), expected)


@each_element
def test_rounding_leaves_its_input_as_it_is(element: Element) -> None:
    x = torch.tensor([0.3, -1000.0, 5.0])
    element.round(x)
    assert torch.equal(x, torch.tensor([0.3, -1000.0, 5.0]))
