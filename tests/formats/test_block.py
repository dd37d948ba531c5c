"""Block formats: scale rules, edges, what a format promises about its values, and every error."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from operator import attrgetter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qsurgeon.errors import FormatError, GradientError, ShapeError
from qsurgeon.formats import Format, Quantized, get_format
from qsurgeon.formats.element import E2M1, E4M3, FloatElement
from qsurgeon.formats.packing import pack
from qsurgeon.formats.scale import E8M0

MXFP4, MXFP8, NVFP4 = get_format("mxfp4"), get_format("mxfp8"), get_format("nvfp4")

MX = (
    MXFP4,
    MXFP4.with_fields("mxfp4-even", scale_rule="even"),
    MXFP4.with_fields("mxfp4-rceil", scale_rule="rceil"),
    MXFP4.with_fields("mxfp4-ceil-block-1", scale_rule="ceil", block=1),
    MXFP4.with_fields("mxfp4-round", scale_rule="round"),
    MXFP4.with_fields("mxfp4-rceil-7.25", scale_rule="rceil/7.25"),
    MXFP4.with_fields("mxfp6-e2m3-even", element="e2m3", scale_rule="even"),
    MXFP4.with_fields("mxfp6-e3m2-ceil-block-16", element="e3m2", scale_rule="ceil", block=16),
    MXFP8,
    MXFP8.with_fields("mxfp8-e5m2-rceil-block-7", element="e5m2", scale_rule="rceil", block=7),
    get_format("mxint8"),
    MXFP4.with_fields("mxint4-even-block-8", element="int4", scale_rule="even", block=8),
    MXFP4.with_fields("mxint8-round-block-8", element="int8/64", scale_rule="round", block=8),
)
# Formats whose scale is a float; the first three differ in the scale above the blocks' only.
NV_TENSOR, NV_ROW = NVFP4.as_weight, NVFP4.as_input
NV_BARE = NVFP4.with_fields("nvfp4-bare", tensor_scale="none")
NV = (
    replace(NV_TENSOR, name="nvfp4-tensor"),
    replace(NV_ROW, name="nvfp4-row"),
    NV_BARE,
    NVFP4.with_fields("nvfp6-e2m3-tensor", element="e2m3", tensor_scale="tensor"),
    NVFP4.with_fields("nvfp8-e5m2-row-block-5", element="e5m2", tensor_scale="row", block=5),
    NVFP4.with_fields("nvfp4-four-over-six-row", four_over_six=True, tensor_scale="row"),
    get_format("int4_b32"),
    NVFP4.with_fields("int8-fp32-block-12", element="int8", scale="fp32", tensor_scale="none", block=12),
)
# Formats without blocks, and formats whose blocks span rows.
FLAT = (get_format("fp8_e4m3"), get_format("fp8_e5m2_row"), get_format("int8"))
SQUARE = (
    MXFP4.with_fields("mxfp4-32x32", block=[32, 32]),
    NV_TENSOR.with_fields("nvfp4-16x16", block=[16, 16]),
    get_format("fp8_e4m3_128x128"),
    MXFP8.with_fields("mxfp8-3x5", block=[3, 5]),
)
STOCHASTIC = (
    MXFP4.with_fields("mxfp4-stochastic", rounding="stochastic", seed=1),
    NV_TENSOR.with_fields("nvfp4-16x16-stochastic", rounding="stochastic", block=[16, 16]),
    get_format("int8").with_fields("int8-stochastic", rounding="stochastic"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

each_format = pytest.mark.parametrize("fmt", [*MX, *NV, *FLAT, *SQUARE, *STOCHASTIC], ids=attrgetter("name"))
each_nearest = pytest.mark.parametrize("fmt", [*MX, *NV, *FLAT, *SQUARE], ids=attrgetter("name"))
each_mx = pytest.mark.parametrize("fmt", MX, ids=attrgetter("name"))
each_nv = pytest.mark.parametrize("fmt", NV, ids=attrgetter("name"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_not_a_number = pytest.mark.parametrize(
    "value",
    [
        pytest.param(math.nan, id="nan"),
        pytest.param(math.inf, id="inf"),
        pytest.param(-math.inf, id="-inf"),
    ],
)

float32_arrays = hnp.arrays(
    "float32", hnp.array_shapes(max_dims=3, max_side=20), elements=st.floats(width=32), fill=st.just(0.25)
)
finite_rows = hnp.arrays(
    "float32",
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
any_format, any_mx = st.sampled_from([*MX, *NV, *FLAT, *SQUARE, *STOCHASTIC]), st.sampled_from(MX)


def scale_of(quantized: Quantized) -> Tensor:
    assert quantized.scale is not None
    return quantized.scale


def bits(x: Tensor) -> Tensor:
    """Return the bits of ``x``, the sign of a zero included, and one pattern for every NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), math.nan, x).view(integer)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def below(value: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()


def above(value: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(math.inf)).item()


def block_of(amax: float) -> Tensor:
    return torch.tensor([0.0] * 31 + [-amax])


# The scale of a block


@pytest.mark.parametrize(
    ("rule", "amax", "exponent"),
    [
        # 2^(floor(log2 amax) - 2): the top of a block may exceed 6
        pytest.param("floor", below(4.0), -1, id="floor, just below 4"),
        pytest.param("floor", 4.0, 0, id="floor, 4"),
        pytest.param("floor", below(8.0), 0, id="floor, just below 8"),
        pytest.param("floor", 8.0, 1, id="floor, 8"),
        # up from 7, where the amax rounds to 8 with one bit of mantissa
        pytest.param("even", below(4.0), 0, id="even, just below 4"),
        pytest.param("even", below(7.0), 0, id="even, just below 7"),
        pytest.param("even", 7.0, 1, id="even, 7"),
        pytest.param("even", 8.0, 1, id="even, 8"),
        # up where 6 is too small
        pytest.param("rceil", below(6.0), 0, id="rceil, just below 6"),
        pytest.param("rceil", 6.0, 0, id="rceil, 6"),
        pytest.param("rceil", above(6.0), 1, id="rceil, just above 6"),
        pytest.param("rceil", 12.0, 1, id="rceil, 12"),
        # up from what exceeds a power of two
        pytest.param("ceil", 4.0, 0, id="ceil, 4"),
        pytest.param("ceil", above(4.0), 1, id="ceil, just above 4"),
        pytest.param("ceil", 8.0, 1, id="ceil, 8"),
        # nearest to amax / 6 in logarithms: down below 6 / √2 and up from 6 · √2, which no number is
        pytest.param("round", 6 / 2**0.5 - 2.0**-21, -1, id="round, just below 6/√2"),
        pytest.param("round", 6 / 2**0.5 + 2.0**-21, 0, id="round, just above 6/√2"),
        pytest.param("round", 8.0, 0, id="round, 8"),
        pytest.param("round", 6 * 2**0.5 - 2.0**-20, 0, id="round, just below 6·√2"),
        pytest.param("round", 6 * 2**0.5 + 2.0**-20, 1, id="round, just above 6·√2"),
        # up from what exceeds 7.25
        pytest.param("rceil/7.25", 3.625, -1, id="rceil/7.25, 3.625"),
        pytest.param("rceil/7.25", above(3.625), 0, id="rceil/7.25, just above 3.625"),
        pytest.param("rceil/7.25", 7.25, 0, id="rceil/7.25, 7.25"),
        pytest.param("rceil/7.25", above(7.25), 1, id="rceil/7.25, just above 7.25"),
    ],
)
def test_the_scale_of_an_e2m1_block(rule: str, amax: float, exponent: int) -> None:
    fmt = MXFP4.with_fields("rule", scale_rule=rule)
    assert scale_of(fmt.quantize(block_of(amax))).tolist() == [127 + exponent]


@pytest.mark.parametrize(
    ("rule", "amax", "exponent"),
    [
        pytest.param("floor", 256.0, 0, id="floor, 256"),
        pytest.param("floor", below(512.0), 0, id="floor, just below 512"),
        pytest.param("floor", 512.0, 1, id="floor, 512"),
        pytest.param("even", below(496.0), 0, id="even, just below 496"),
        pytest.param("even", 496.0, 1, id="even, 496"),
        pytest.param("rceil", 448.0, 0, id="rceil, 448"),
        pytest.param("rceil", above(448.0), 1, id="rceil, just above 448"),
        pytest.param("ceil", 256.0, 0, id="ceil, 256"),
        pytest.param("ceil", above(256.0), 1, id="ceil, just above 256"),
        pytest.param("round", 448 / 2**0.5 - 2.0**-14, -1, id="round, just below 448/√2"),
        pytest.param("round", 448 / 2**0.5 + 2.0**-14, 0, id="round, just above 448/√2"),
        pytest.param("round", 448 * 2**0.5 + 2.0**-13, 1, id="round, just above 448·√2"),
    ],
)
def test_the_scale_of_an_e4m3_block(rule: str, amax: float, exponent: int) -> None:
    fmt = MXFP8.with_fields("rule", scale_rule=rule)
    assert scale_of(fmt.quantize(block_of(amax))).tolist() == [127 + exponent]


def test_floor_takes_the_right_power_of_two_next_to_each_of_them() -> None:
    exponents = torch.arange(-120, 120)
    powers = torch.exp2(exponents.float())
    lower = torch.nextafter(powers, torch.zeros(()))
    assert torch.equal(scale_of(MXFP4.quantize(powers[:, None])).squeeze(-1), (127 + exponents - 2).to(torch.uint8))
    assert torch.equal(scale_of(MXFP4.quantize(lower[:, None])).squeeze(-1), (127 + exponents - 3).to(torch.uint8))


@pytest.mark.parametrize(
    ("amax", "code"),
    [
        pytest.param(6 * 2.0**-126, 1, id="6 times the second smallest scale"),
        pytest.param(6 * 2.0**-127, 0, id="6 times the smallest scale"),
        pytest.param(6 * 2.0**-128, 0, id="less than that"),
        pytest.param(0.0, 0, id="zero"),
    ],
)
def test_rceil_takes_the_smallest_scale_that_saturates_nothing(amax: float, code: int) -> None:
    assert scale_of(MXFP4.with_fields("rceil", scale_rule="rceil").quantize(block_of(amax))).tolist() == [code]


@pytest.mark.parametrize(
    ("fmt", "code"),
    [
        pytest.param(MXFP4.with_fields("e2m1", scale_rule="ceil"), 127 + 125, id="e2m1: 6 * 2^125"),
        pytest.param(MXFP4.with_fields("e2m3", element="e2m3", scale_rule="ceil"), 127 + 125, id="e2m3: 7.5 * 2^125"),
        pytest.param(MXFP4.with_fields("e3m2", element="e3m2", scale_rule="ceil"), 127 + 123, id="e3m2: 28 * 2^123"),
        pytest.param(MXFP8.with_fields("e4m3", scale_rule="ceil"), 127 + 119, id="e4m3: 448 * 2^119"),
        pytest.param(MXFP8.with_fields("e5m2", element="e5m2", scale_rule="ceil"), 127 + 112, id="e5m2: 57344 * 2^112"),
    ],
)
def test_the_largest_scale_keeps_every_product_finite(fmt: Format, code: int) -> None:
    quantized = fmt.quantize(block_of(torch.finfo(torch.float32).max))
    assert scale_of(quantized).tolist() == [code]
    assert quantized.dequantize().isfinite().all()


def ocp_scale(amax: float, fmt: Format) -> int:
    """Return the code of an MX scale from its definition, in exact arithmetic."""
    if amax == 0:
        return 0
    significand, exponent = math.frexp(amax)  # amax = significand * 2^exponent, significand in [0.5, 1)
    floor_log2, significand = exponent - 1, 2 * significand
    largest, emax = fmt.element.max, fmt.element.emax
    if fmt.scale_rule == "floor":
        unbiased = floor_log2 - emax
    elif fmt.scale_rule == "even":
        bits_below_the_top = {"int4": 2, "int8/64": 6}
        mantissa = bits_below_the_top.get(fmt.element.name)
        if mantissa is None:
            assert isinstance(fmt.element, FloatElement)
            mantissa = fmt.element.mantissa
        half_step = 2.0 ** -(mantissa + 1)
        unbiased = floor_log2 - emax + (significand + half_step >= 2)
    elif fmt.scale_rule == "ceil":
        unbiased = floor_log2 - emax + (significand > 1)
    elif fmt.scale_rule == "rceil/7.25":
        unbiased = floor_log2 - 2 + (significand > 7.25 / 4)
    elif fmt.scale_rule == "round":
        unbiased = floor_log2 - emax - 2
        while Fraction(amax) ** 2 >= 2 * (Fraction(largest) * Fraction(2) ** unbiased) ** 2:
            unbiased += 1
    else:
        unbiased = floor_log2 - emax - 1
        while amax > math.ldexp(largest, unbiased):
            unbiased += 1
    top = math.frexp(torch.finfo(torch.float32).max / largest)[1] - 1
    return 127 + min(max(unbiased, -127), top)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(fmt=any_mx, amax=st.lists(st.floats(min_value=0, width=32, allow_infinity=False), min_size=1, max_size=20))
def test_any_scale_is_that_of_the_definition(fmt: Format, amax: list[float]) -> None:
    scale = scale_of(fmt.quantize(torch.tensor(amax)[:, None])).squeeze(-1)
    assert scale.tolist() == [ocp_scale(value, fmt) for value in amax]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(fmt=any_mx, rows=finite_rows)
def test_no_value_of_the_block_is_nearer_than_the_one_taken(fmt: Format, rows: object) -> None:
    x = torch.as_tensor(rows)
    quantized = fmt.quantize(x)
    assert isinstance(fmt.block, int)
    scale = E8M0.decode(scale_of(quantized)).double().repeat_interleave(fmt.block, -1)[:, : x.shape[-1]]
    grid = torch.tensor(fmt.element.values, dtype=torch.float64)
    grid = grid[grid.abs() <= fmt.element.max]  # neither NaN nor an integer without its opposite, which saturates
    nearest = (x.double()[..., None] - grid * scale[..., None]).abs().amin(-1)
    assert torch.equal((x.double() - fmt.element.decode(quantized.codes) * scale).abs(), nearest)


def test_mxfp4_rounds_a_block_to_these_values() -> None:
    x = torch.tensor([7.9, -5.0, 2.5, -1.25, 0.75, 0.25, -0.25, 3.3])
    quantized = MXFP4.quantize(x)
    assert scale_of(quantized).tolist() == [127]
    assert quantized.codes.tolist() == [7, 8 + 6, 4, 8 + 2, 2, 0, 8, 5]
    assert MXFP4.fake_quantize(x).tolist() == [6.0, -4.0, 2.0, -1.0, 1.0, 0.0, -0.0, 3.0]


def test_nvfp4_rounds_two_blocks_to_these_values_under_one_tensor_scale() -> None:
    large = [2688.0, -1344.0] + [0.0] * 14  # 6 * 448: the tensor scale is 1
    small = [6.0, -2.4, 0.3] + [0.0] * 13
    quantized = NV_TENSOR.quantize(torch.tensor(large + small))
    assert quantized.tensor_scale is not None
    assert quantized.tensor_scale.item() == 1.0
    assert E4M3.decode(scale_of(quantized)).tolist() == [448.0, 1.0]
    assert quantized.codes.tolist() == [7, 8 + 5] + [0] * 14 + [7, 8 + 4, 1] + [0] * 13
    assert quantized.dequantize().tolist() == [2688.0, -1344.0] + [0.0] * 14 + [6.0, -2.0, 0.5] + [0.0] * 13


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        pytest.param(6 * 1.0, 1.0, id="a value of e4m3"),
        pytest.param(6 * 1.0625, 1.0, id="a tie, down to the even code"),
        pytest.param(6 * 1.1875, 1.25, id="a tie, up to the even code"),
        pytest.param(6 * 1.07, 1.125, id="between, up"),
        pytest.param(6 * 3 * 2.0**-9, 3 * 2.0**-9, id="a subnormal of e4m3"),
        pytest.param(6 * 0.4 * 2.0**-9, 2.0**-9, id="what would round to zero"),
        pytest.param(0.0, 2.0**-9, id="zero"),
        pytest.param(6 * 500.0, 448.0, id="more than the largest"),
    ],
)
def test_a_float_scale_is_the_nearest_to_amax_over_six_but_never_zero(amax: float, scale: float) -> None:
    assert E4M3.decode(scale_of(NV_BARE.quantize(block_of(amax)[16:]))).tolist() == [scale]


@pytest.mark.parametrize("fmt", [NV_BARE, NV[0]], ids=attrgetter("name"))
def test_a_float_scale_is_the_nearest_to_every_tie_and_on_both_sides_of_it(fmt: Format) -> None:
    grid = torch.tensor(E4M3.magnitudes[1:])
    ties = 6 * (grid[:-1] + grid[1:]) / 2  # exact
    lower, upper = torch.nextafter(ties, torch.zeros(())), torch.nextafter(ties, torch.full((), math.inf))
    amax = torch.cat([lower, ties, upper, torch.tensor([2688.0])])  # the last makes the tensor scale 1
    even = torch.tensor(E4M3.magnitudes)[torch.arange(2, 127) // 2 * 2]
    expected = torch.cat([grid[:-1], even, grid[1:], torch.tensor([448.0])])
    assert torch.equal(E4M3.decode(scale_of(fmt.quantize(amax[:, None]))).squeeze(-1), expected)


def test_a_block_whose_scale_was_rounded_down_saturates() -> None:
    x = torch.tensor([6.375, -6.2, 1.0])  # scale 1: the tie 1.0625 went down
    assert NV_BARE.fake_quantize(x).tolist() == [6.0, -6.0, 1.0]


# Zeros


@each_format
def test_a_block_of_zeros_stays_zero_beside_others(fmt: Format) -> None:
    width = fmt.block_shape[1] or 8
    x = torch.cat([torch.zeros(2, width), gaussian(2, width)], dim=-1)
    rounded = fmt.fake_quantize(x)
    assert (rounded[:, :width] == 0).all()
    assert (rounded[:, width:] != 0).any()


@each_dtype
@each_format
def test_a_tensor_of_zeros_stays_zero(fmt: Format, dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, 40, dtype=dtype)
    assert torch.equal(fmt.fake_quantize(zeros), zeros)
    assert torch.equal(fmt.quantize(zeros).dequantize(), zeros)


@each_format
def test_a_zero_keeps_its_sign_unless_the_element_has_none_for_it(fmt: Format) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1e-30])
    signed = isinstance(fmt.element, FloatElement)
    assert fmt.fake_quantize(x).signbit().tolist() == [False, signed, False, signed]
    assert fmt.quantize(x).dequantize().signbit().tolist() == [False, signed, False, signed]


def test_the_scale_of_a_block_of_zeros_is_the_smallest() -> None:
    assert scale_of(MXFP4.quantize(torch.zeros(32))).tolist() == [0]
    assert scale_of(NV_BARE.quantize(torch.zeros(16))).tolist() == [1]


def test_the_tensor_scale_of_zeros_is_a_normal_number() -> None:
    tensor_scale = NV_TENSOR.quantize(torch.zeros(16)).tensor_scale
    assert tensor_scale is not None
    assert tensor_scale.item() == 2.0**-100


# NaN and infinity


@each_not_a_number
@each_mx
def test_one_makes_exactly_its_own_block_nan(fmt: Format, value: float) -> None:
    assert isinstance(fmt.block, int)
    x = gaussian(2, 3 * fmt.block)
    clean = fmt.fake_quantize(x)
    x[0, fmt.block] = value
    rounded = fmt.fake_quantize(x)
    hit = torch.zeros_like(x, dtype=torch.bool)
    hit[0, fmt.block : 2 * fmt.block] = True
    assert torch.equal(rounded.isnan(), hit)
    assert torch.equal(bits(rounded[~hit]), bits(clean[~hit]))


@each_not_a_number
def test_one_makes_exactly_its_own_block_nan_under_a_float_scale(value: float) -> None:
    x = gaussian(2, 48)
    x[0, 20] = value
    expected = torch.zeros(2, 48, dtype=torch.bool)
    expected[0, 16:32] = True
    assert torch.equal(NV_BARE.fake_quantize(x).isnan(), expected)


@each_not_a_number
def test_one_makes_all_of_its_row_nan_under_a_tensor_scale_a_row(value: float) -> None:
    x = gaussian(2, 48)
    clean = NV_ROW.fake_quantize(x)
    x[0, 20] = value
    rounded = NV_ROW.fake_quantize(x)
    assert rounded[0].isnan().all()
    assert torch.equal(bits(rounded[1]), bits(clean[1]))


@each_not_a_number
def test_one_makes_the_whole_tensor_nan_under_one_tensor_scale(value: float) -> None:
    x = gaussian(2, 48)
    x[0, 20] = value
    assert NV_TENSOR.fake_quantize(x).isnan().all()


@each_not_a_number
@each_format
def test_what_cannot_be_rounded_dequantizes_to_nan_where_fake_quantize_has_it(fmt: Format, value: float) -> None:
    x = gaussian(2, 48)
    x[1, 17] = value
    x[1, 3] = 0.0
    assert torch.equal(bits(fmt.quantize(x).dequantize()), bits(fmt.fake_quantize(x)))


@each_not_a_number
def test_the_scale_of_a_block_that_cannot_be_rounded_is_the_code_of_nan(value: float) -> None:
    assert scale_of(MXFP4.quantize(block_of(value))).tolist() == [255]
    assert scale_of(NV_BARE.quantize(block_of(value))).tolist() == [1, 127]


@each_not_a_number
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_survives_in_a_narrow_dtype(dtype: torch.dtype, value: float) -> None:
    x = torch.ones(64, dtype=dtype)
    x[5] = value
    assert MXFP4.fake_quantize(x).isnan().tolist() == [True] * 32 + [False] * 32


# The ends of the range


@pytest.mark.parametrize("fill", [pytest.param(1.0, id="all of it"), pytest.param(1e-3, id="one of it")])
@each_dtype
@each_format
def test_the_largest_value_of_a_dtype_does_not_become_infinite(fmt: Format, dtype: torch.dtype, fill: float) -> None:
    largest = torch.finfo(dtype).max
    x = torch.full((3, 40), largest * fill, dtype=dtype)
    x[1, 2], x[1, 35], x[2, 0] = largest, -largest, largest / 1.4
    assert fmt.fake_quantize(x).isfinite().all()
    assert torch.equal(bits(fmt.quantize(x).dequantize()), bits(fmt.fake_quantize(x)))


def test_what_would_round_to_infinity_in_float16_takes_its_largest_value() -> None:
    fmt = MXFP4.with_fields("ceil", scale_rule="ceil")
    assert fmt.fake_quantize(torch.tensor([65504.0])).tolist() == [65536.0]
    assert fmt.fake_quantize(torch.tensor([65504.0, -65504.0], dtype=torch.float16)).tolist() == [
        65504.0,
        -65504.0,
    ]


def test_subnormal_values_of_float32_are_rounded_under_the_smallest_scale() -> None:
    unit = 2.0**-127
    x = torch.tensor([6.0, -3.0, 0.5, 0.25, 0.75, 1.25]) * unit
    assert scale_of(MXFP4.quantize(x)).tolist() == [0]
    assert MXFP4.fake_quantize(x).tolist() == [6 * unit, -3 * unit, 0.5 * unit, 0.0, unit, unit]


@each_mx
def test_a_block_whose_largest_value_is_subnormal_is_neither_nan_nor_far_off(fmt: Format) -> None:
    x = torch.tensor([2.0**-149, -(2.0**-140), 2.0**-127, -3 * 2.0**-128])
    rounded = fmt.fake_quantize(x)
    assert ((rounded - x).abs() <= fmt.element.smallest * 2.0**-126).all()


@each_nv
def test_a_tensor_of_subnormal_values_becomes_zero_not_nan_under_float_scales(fmt: Format) -> None:
    assert fmt.fake_quantize(torch.tensor([2.0**-149, -(2.0**-130)])).tolist() == [0.0, 0.0]


def test_a_small_tensor_keeps_its_precision_under_a_tensor_scale() -> None:
    x = gaussian(4, 64)
    assert torch.equal(NV_TENSOR.fake_quantize(x * 2.0**-80), NV_TENSOR.fake_quantize(x) * 2.0**-80)


# Shapes


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, NV[0], NV[1], NV[4]], ids=attrgetter("name"))
def test_a_row_the_block_does_not_divide_is_rounded_as_if_padded_with_zeros(fmt: Format) -> None:
    assert isinstance(fmt.block, int)
    for columns in range(1, 101):
        x = gaussian(3, columns, seed=columns)
        padded = torch.nn.functional.pad(x, (0, -columns % fmt.block))
        ragged, whole = fmt.quantize(x), fmt.quantize(padded)
        assert torch.equal(ragged.codes, whole.codes[:, :columns]), columns
        assert torch.equal(scale_of(ragged), scale_of(whole)), columns
        assert torch.equal(bits(fmt.fake_quantize(x)), bits(fmt.fake_quantize(padded)[:, :columns])), columns


@pytest.mark.parametrize("columns", [1, 33, 64])
@pytest.mark.parametrize("fmt", [*MX, *(fmt for fmt in NV if fmt.tensor_scale != "tensor")], ids=attrgetter("name"))
def test_no_block_crosses_rows(fmt: Format, columns: int) -> None:
    x = gaussian(3, columns)
    alone = torch.stack([fmt.fake_quantize(row) for row in x])
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(alone))


@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 3, 70), (2, 1, 3, 70), (1, 1, 1, 2, 70)], ids=str)
@pytest.mark.parametrize("fmt", [*MX, *NV, *FLAT, STOCHASTIC[0], STOCHASTIC[2]], ids=attrgetter("name"))
def test_a_tensor_of_any_rank_is_rounded_as_its_rows_are(fmt: Format, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    expected = fmt.fake_quantize(x.reshape(-1, 70)).view(shape)
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(expected))
    assert torch.equal(bits(fmt.quantize(x).dequantize()), bits(expected))


@pytest.mark.parametrize("fmt", [SQUARE[0], *SQUARE[2:]], ids=attrgetter("name"))
def test_a_block_of_rows_spans_the_rows_of_one_matrix_and_of_no_two(fmt: Format) -> None:
    x = gaussian(2, 3, 50, 70)
    expected = torch.stack([fmt.fake_quantize(one) for one in x.view(6, 50, 70)]).view(x.shape)
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(expected))
    assert torch.equal(bits(fmt.quantize(x).dequantize()), bits(expected))


@pytest.mark.parametrize("fmt", SQUARE, ids=attrgetter("name"))
def test_a_square_block_is_rounded_as_one_row_of_its_values_would_be(fmt: Format) -> None:
    height, width = fmt.block_shape
    x = gaussian(2 * height, 3 * width)
    tiles = x.view(2, height, 3, width).transpose(1, 2).reshape(6, height * width)
    flat = fmt.with_fields("flat", block=height * width)
    expected = flat.fake_quantize(tiles).view(2, 3, height, width).transpose(1, 2).reshape(x.shape)
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(expected))


@pytest.mark.parametrize("fmt", [SQUARE[0], SQUARE[1]], ids=attrgetter("name"))
def test_a_square_block_quantizes_a_weight_and_its_transpose_alike(fmt: Format) -> None:
    weight = gaussian(96, 160)
    assert torch.equal(fmt.fake_quantize(weight.t()), fmt.fake_quantize(weight).t())


@pytest.mark.parametrize("shape", [(2000, 70), (3, 40, 700), (2, 70_000)], ids=str)
@each_format
def test_a_large_tensor_is_rounded_as_its_parts_are(fmt: Format, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    x.flatten()[-1] = 100.0  # what all of it shares, if anything, comes from its end
    rounded = fmt.fake_quantize(x)
    assert rounded.is_contiguous()
    assert torch.equal(bits(rounded), bits(fmt.quantize(x).dequantize()))


@each_format
def test_a_large_tensor_is_rounded_alike_where_a_compiler_takes_it_whole(
    fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gaussian(2000, 70).t()
    in_pieces = fmt.fake_quantize(x, dim=0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(bits(fmt.fake_quantize(x, dim=0)), bits(in_pieces))


@pytest.mark.parametrize("shape", [(0,), (0, 40), (40, 0), (3, 0, 5), (0, 0)], ids=str)
@each_format
def test_an_empty_tensor_stays_empty(fmt: Format, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    for rounded in (fmt.fake_quantize(x), fmt.quantize(x).dequantize()):
        assert rounded.shape == shape
        assert rounded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "strided",
    [
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="every other column"),
        pytest.param(lambda x: x[1:, 3:47], id="a window"),
        pytest.param(lambda x: x[:1].expand(4, -1), id="an expanded row"),
    ],
)
@each_format
def test_rounding_does_not_depend_on_strides(fmt: Format, strided: Callable[[Tensor], Tensor]) -> None:
    x = strided(gaussian(50, 50))
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(fmt.fake_quantize(x.contiguous())))
    assert torch.equal(bits(fmt.quantize(x).dequantize()), bits(fmt.fake_quantize(x.contiguous())))


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@each_format
def test_blocks_run_along_the_given_dimension(fmt: Format, dim: int) -> None:
    x = gaussian(9, 34, 35)
    expected = fmt.fake_quantize(x.movedim(dim, -1).contiguous()).movedim(-1, dim)
    assert torch.equal(bits(fmt.fake_quantize(x, dim=dim)), bits(expected))
    assert torch.equal(bits(fmt.quantize(x, dim=dim).dequantize()), bits(expected))


def test_blocks_along_columns_take_their_scales_from_columns() -> None:
    x = torch.tensor([[4.0, 1.0], [0.3, 0.3]])
    assert MXFP4.fake_quantize(x, dim=0).tolist() == [[4.0, 1.0], [0.5, 0.25]]
    assert MXFP4.fake_quantize(x, dim=1).tolist() == [[4.0, 1.0], [0.25, 0.25]]


@each_dtype
@each_format
def test_dtype_and_shape_are_kept(fmt: Format, dtype: torch.dtype) -> None:
    x = gaussian(3, 40).to(dtype)
    for rounded in (fmt.fake_quantize(x), fmt.quantize(x).dequantize()):
        assert rounded.dtype == dtype
        assert rounded.shape == (3, 40)


@each_format
def test_the_input_is_left_as_it_is(fmt: Format) -> None:
    x = gaussian(3, 64)
    before = x.clone()
    fmt.fake_quantize(x)
    quantized = fmt.quantize(x)
    assert torch.equal(quantized.dequantize(), quantized.dequantize())
    assert torch.equal(x, before)


# Codes and scales


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (3, 70), (2, 3, 33)], ids=str)
@each_dtype
@each_format
def test_dequantized_codes_are_the_fake_quantized_values(
    fmt: Format, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = (gaussian(*shape) * 3).to(dtype)
    assert torch.equal(bits(fmt.quantize(x).dequantize()), bits(fmt.fake_quantize(x)))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(fmt=any_format, array=float32_arrays, data=st.data())
def test_dequantized_codes_are_the_fake_quantized_values_whatever_comes(
    fmt: Format, array: object, data: st.DataObject
) -> None:
    x = torch.as_tensor(array)
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1))
    assert torch.equal(bits(fmt.quantize(x, dim).dequantize()), bits(fmt.fake_quantize(x, dim)))


@each_format
def test_a_code_is_a_byte_a_value_and_fits_the_element(fmt: Format) -> None:
    codes = fmt.quantize(gaussian(3, 70)).codes
    assert codes.dtype == torch.uint8
    assert codes.shape == (3, 70)
    assert codes.max().item() < 2**fmt.element.bits


@each_format
def test_there_is_a_scale_a_block(fmt: Format) -> None:
    scale, (height, width) = fmt.quantize(gaussian(2, 30, 70)).scale, fmt.block_shape
    if fmt.scale is None:
        assert scale is None
        return
    assert scale is not None
    assert scale.dtype == {8: torch.uint8, 16: torch.bfloat16, 32: torch.float32}[fmt.scale.bits]
    assert scale.shape == (2, math.ceil(30 / height), math.ceil(70 / width))


def test_scales_lie_along_the_dimension_that_was_quantized() -> None:
    quantized = MXFP4.quantize(gaussian(70, 3), dim=0)
    assert quantized.codes.shape == (70, 3)
    assert scale_of(quantized).shape == (3, 3)
    assert torch.equal(scale_of(quantized), scale_of(MXFP4.quantize(gaussian(70, 3).t())).t())


@each_mx
def test_there_is_no_tensor_scale_above_powers_of_two(fmt: Format) -> None:
    assert fmt.quantize(gaussian(3, 70)).tensor_scale is None


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)], ids=str)
def test_the_scale_of_a_tensor_has_no_dimension(shape: tuple[int, ...]) -> None:
    tensor_scale = NV_TENSOR.quantize(gaussian(*shape)).tensor_scale
    assert tensor_scale is not None
    assert tensor_scale.dtype == torch.float32
    assert tensor_scale.shape == ()


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)], ids=str)
def test_the_scales_of_rows_are_one_a_row(shape: tuple[int, ...]) -> None:
    tensor_scale = NV_ROW.quantize(gaussian(*shape)).tensor_scale
    assert tensor_scale is not None
    assert tensor_scale.dtype == torch.float32
    assert tensor_scale.shape == shape[:-1]


def test_the_tensor_scale_is_the_largest_value_over_448_times_6() -> None:
    x = gaussian(3, 64)
    tensor_scale, row_scale = NV_TENSOR.quantize(x).tensor_scale, NV_ROW.quantize(x).tensor_scale
    assert tensor_scale is not None
    assert row_scale is not None
    assert tensor_scale.item() == (x.abs().amax() / 2688).item()
    assert row_scale.tolist() == (x.abs().amax(-1) / 2688).tolist()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, *NV[:2]], ids=attrgetter("name"))
def test_packed_codes_come_back_as_they_were(fmt: Format, dim: int) -> None:
    quantized = fmt.quantize(gaussian(33, 35), dim=dim)
    back = Quantized(
        quantized.data.clone(),
        quantized.scale,
        quantized.tensor_scale,
        fmt,
        length=(33, 35)[dim],
        dtype=torch.float32,
        dim=dim,
    )
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(bits(back.dequantize()), bits(quantized.dequantize()))


def test_four_bit_codes_are_packed_along_the_dimension_of_the_blocks() -> None:
    x = torch.tensor([[4.0, -0.0], [6.0, -6.0], [1.0, 1.0]])
    assert MXFP4.quantize(x).data.tolist() == [[0x86], [0xF7], [0x66]]
    assert MXFP4.quantize(x, dim=0).data.tolist() == [[0x76, 0xF8], [0x02, 0x02]]


def test_the_dtype_that_was_quantized_is_the_one_dequantized() -> None:
    quantized = MXFP4.quantize(gaussian(32).to(torch.float16))
    assert quantized.dtype == torch.float16
    assert replace(quantized, dtype=torch.float32).dequantize().dtype == torch.float32


@pytest.mark.parametrize(
    ("fmt", "change", "message"),
    [
        pytest.param(
            MXFP4, lambda q: {"data": q.data.long()},
            "data of torch.int64 cannot be packed codes; expected torch.uint8", id="data-dtype",
        ),
        pytest.param(
            MXFP4, lambda q: {"data": q.data[:, 1:]}, "31 bytes a row cannot be 64 codes; expected 32", id="data-shape"
        ),
        pytest.param(
            MXFP4, lambda q: {"scale": None},
            "scale is None, which is not that of format 'mxfp4' here; expected (torch.uint8, (4, 2))", id="no-scale",
        ),
        pytest.param(
            MXFP4, lambda q: {"scale": q.scale[:1]},
            "scale is (torch.uint8, (1, 2)), which is not that of format 'mxfp4' here; expected (torch.uint8, (4, 2))",
            id="scale-shape",
        ),
        pytest.param(
            MXFP4, lambda q: {"scale": q.scale.int()},
            "scale is (torch.int32, (4, 2)), which is not that of format 'mxfp4' here; expected (torch.uint8, (4, 2))",
            id="scale-dtype",
        ),
        pytest.param(
            MXFP4, lambda q: {"tensor_scale": torch.tensor(1.0)},
            "tensor_scale is 1.0, which format 'mxfp4' does not go with", id="tensor-scale-too-many",
        ),
        pytest.param(
            NV_ROW, lambda q: {"tensor_scale": q.tensor_scale[:3]},
            "tensor_scale of torch.float32 with 3 values; expected torch.float32, one or one a row",
            id="tensor-scale-shape",
        ),
        pytest.param(
            NV_TENSOR, lambda q: {"tensor_scale": q.tensor_scale.double()},
            "tensor_scale of torch.float64 with 1 values; expected torch.float32, one or one a row",
            id="tensor-scale-dtype",
        ),
    ],
)  # fmt: skip
def test_bytes_that_are_not_the_formats_are_refused(
    fmt: Format, change: Callable[[Any], dict[str, Any]], message: str
) -> None:
    quantized = fmt.quantize(gaussian(4, 64))
    with pytest.raises(ShapeError) as caught:
        replace(quantized, **change(quantized)).dequantize()
    assert str(caught.value) == message


# What rounding promises


@settings(deadline=None, max_examples=100, derandomize=True)
@given(fmt=any_mx, rows=finite_rows)
def test_rounding_twice_is_rounding_once(fmt: Format, rows: object) -> None:
    once = fmt.fake_quantize(torch.as_tensor(rows))
    assert torch.equal(bits(fmt.fake_quantize(once)), bits(once))


@pytest.mark.parametrize("fmt", NV[:2], ids=attrgetter("name"))
def test_rounding_twice_is_rounding_once_under_a_tensor_scale_that_is_a_power_of_two(fmt: Format) -> None:
    x = gaussian(64, 64) * 200
    x[:, 0] = 2688.0
    once = fmt.fake_quantize(x)
    assert torch.equal(bits(fmt.fake_quantize(once)), bits(once))


@pytest.mark.parametrize("fmt", NV[:2], ids=attrgetter("name"))
@pytest.mark.parametrize("seed", range(8))
def test_rounding_twice_under_any_tensor_scale_keeps_codes_and_block_scales(fmt: Format, seed: int) -> None:
    # The values themselves may move in the last bit of FP32, with the tensor scale.
    first = fmt.quantize(gaussian(64, 64, seed=seed))
    second = fmt.quantize(first.dequantize())
    assert torch.equal(second.codes, first.codes)
    assert torch.equal(scale_of(second), scale_of(first))


# Not of these two: e2m3 is so fine that the largest of a block may round to less than its largest value, and another
# float scale is nearer then; and the better of 4 and 6 for values may be another for what they were rounded to.
MOVING = ("nvfp6-e2m3-tensor", "nvfp4-four-over-six-row")
SETTLED = [fmt for fmt in (*NV, *FLAT, *SQUARE, *STOCHASTIC) if fmt.name not in MOVING]


@pytest.mark.parametrize("fmt", SETTLED, ids=attrgetter("name"))
@pytest.mark.parametrize("seed", range(4))
def test_rounding_what_is_rounded_changes_no_code(fmt: Format, seed: int) -> None:
    # A tensor or block scale that is found anew may differ in its last bit, and so may the values.
    first = fmt.quantize(gaussian(64, 96, seed=seed))
    second = fmt.quantize(first.dequantize())
    assert torch.equal(second.codes, first.codes)
    torch.testing.assert_close(second.dequantize(), first.dequantize(), rtol=2**-22, atol=0)


any_nearest = st.sampled_from([*MX, *NV, *FLAT, *SQUARE])


@settings(deadline=None, max_examples=150, derandomize=True)
@given(fmt=any_nearest, columns=st.integers(1, 100), seed=st.integers(0, 99), power=st.integers(-60, 60))
def test_no_value_is_farther_off_than_the_nearest_that_its_scale_allows(
    fmt: Format, columns: int, seed: int, power: int
) -> None:
    x = gaussian(5, columns, seed=seed) * 2.0**power
    quantized = fmt.quantize(x)
    plain = Quantized(
        torch.full_like(quantized.data, 0), quantized.scale, quantized.tensor_scale, fmt, torch.float32, columns
    )
    one = fmt.element.encode(torch.tensor([1.0])).item()
    ones = pack(torch.full(x.shape, one, dtype=torch.uint8), fmt.element.bits)
    scale = replace(plain, data=ones).dequantize().double()  # of each value
    grid = torch.tensor(sorted({value for value in fmt.element.values if abs(value) <= fmt.element.max})).double()
    nearest = (grid * scale[..., None] - x.double()[..., None]).abs().amin(-1)
    error = (quantized.dequantize().double() - x.double()).abs()
    assert (error <= nearest + 1e-6 * x.abs().double() + 2.0**-149).all()


@settings(deadline=None, max_examples=100, derandomize=True)
@given(fmt=any_format, rows=finite_rows)
def test_rounding_is_odd(fmt: Format, rows: object) -> None:
    x = torch.as_tensor(rows)
    values, negated = fmt.fake_quantize(x), fmt.fake_quantize(-x)
    assert torch.equal(negated, -values)
    if isinstance(fmt.element, FloatElement):  # an integer's zero has no sign
        assert torch.equal(bits(negated), bits(-values))


@pytest.mark.parametrize("power", [-100, -1, 2, 100])
@each_mx
def test_powers_of_two_go_through_rounding_unchanged(fmt: Format, power: int) -> None:
    x = gaussian(16, 64)
    assert torch.equal(bits(fmt.fake_quantize(x * 2.0**power)), bits(fmt.fake_quantize(x) * 2.0**power))


@each_nearest
def test_values_of_one_block_keep_their_order(fmt: Format) -> None:
    width = fmt.block_shape[1] or 70
    x = (gaussian(64, width) * torch.exp2(gaussian(64, width, seed=1) * 3)).sort(-1).values
    assert (fmt.fake_quantize(x).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_format
def test_a_dtype_is_rounded_as_its_values_are_in_float32(fmt: Format, dtype: torch.dtype) -> None:
    x = (gaussian(16, 64) * torch.exp2(gaussian(16, 1, seed=1) * 2)).to(dtype).float().to(dtype)
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(fmt.fake_quantize(x.float()).to(dtype)))


@pytest.mark.parametrize("fmt", [MXFP4, *NV[:2]], ids=attrgetter("name"))
def test_float64_is_rounded_as_its_values_are_in_float32(fmt: Format) -> None:
    x = gaussian(16, 70)
    expected = fmt.fake_quantize(x).double()
    assert torch.equal(bits(fmt.fake_quantize(x.double())), bits(expected))
    assert torch.equal(bits(fmt.quantize(x.double()).dequantize()), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_mx
def test_a_narrow_dtype_holds_what_powers_of_two_scale_exactly(fmt: Format, dtype: torch.dtype) -> None:
    x = (gaussian(16, 64) * torch.exp2(gaussian(16, 1, seed=1) * 2)).to(dtype)
    assert torch.equal(bits(fmt.fake_quantize(x).float()), bits(fmt.fake_quantize(x.float())))


# Saturation


def test_what_exceeds_the_largest_value_of_its_block_saturates() -> None:
    x = torch.tensor([7.9, 6.0, above(6.0), -7.0, -6.0, 0.0])  # scale 1
    assert MXFP4.saturates(x).tolist() == [True, False, True, True, False, False]


def test_saturation_is_of_the_block_not_of_the_tensor() -> None:
    x = torch.tensor([7.0] * 32 + [8.0] + [7.0] * 31)  # scales 1 and 2
    assert MXFP4.saturates(x).tolist() == [True] * 32 + [False] * 32


@pytest.mark.parametrize("rule", ["rceil", "ceil"])
@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"])
def test_nothing_saturates_under_a_rule_that_rounds_up(element: str, rule: str) -> None:
    fmt = MXFP4.with_fields("mine", element=element, scale_rule=rule)
    assert not fmt.saturates(gaussian(64, 64)).any()


@each_format
def test_what_saturates_takes_the_largest_value_of_its_sign(fmt: Format) -> None:
    x = gaussian(64, 70)
    taken = fmt.element.decode(fmt.quantize(x).codes)
    saturated = fmt.saturates(x)
    assert torch.equal(taken[saturated], (fmt.element.max * x.sign())[saturated])


def test_this_share_of_gaussian_values_and_of_their_blocks_saturates_in_mxfp4() -> None:
    saturated = MXFP4.saturates(gaussian(2**10, 2**10))
    assert saturated.float().mean().item() == pytest.approx(0.0235, abs=0.0005)
    assert saturated.view(-1, 32).any(-1).float().mean().item() == pytest.approx(0.297, abs=0.005)


def test_a_nvfp4_block_whose_scale_was_rounded_down_saturates() -> None:
    assert NV_BARE.saturates(torch.tensor([6.375, -6.2, 6.0])).tolist() == [True, True, False]


@pytest.mark.parametrize("fmt", NV[:2], ids=attrgetter("name"))
def test_the_largest_value_under_a_tensor_scale_does_not_saturate(fmt: Format) -> None:
    # It is 6 * 448 times that scale, but for FP32's rounding.
    x = gaussian(200, 1, 64)
    largest = x.abs() == x.abs().amax(-1, keepdim=True)
    saturated = torch.stack([fmt.saturates(tensor) for tensor in x])
    assert not saturated[largest].any()


@each_format
def test_saturation_is_told_in_the_shape_of_the_tensor(fmt: Format) -> None:
    x = gaussian(9, 34, 35)
    told = fmt.saturates(x, dim=1)
    assert told.dtype == torch.bool
    assert torch.equal(told, fmt.saturates(x.movedim(1, -1).contiguous()).movedim(-1, 1))


@pytest.mark.parametrize("shape", [(0,), (0, 40), (40, 0), (3, 0, 5)], ids=str)
@pytest.mark.parametrize("fmt", [MXFP4, *NV[:2]], ids=attrgetter("name"))
def test_nothing_saturates_in_an_empty_tensor(fmt: Format, shape: tuple[int, ...]) -> None:
    assert fmt.saturates(torch.empty(shape)).shape == shape


def test_saturation_may_be_asked_of_a_tensor_that_takes_part_in_autograd() -> None:
    x = torch.tensor([7.9, 6.0], requires_grad=True)
    assert MXFP4.saturates(x).tolist() == [True, False]


# Weight and input


def test_a_row_under_its_own_tensor_scale_does_not_depend_on_the_others() -> None:
    x = gaussian(3, 40)
    rounded = NV_ROW.fake_quantize(x)
    x[0] *= 1000
    assert torch.equal(bits(NV_ROW.fake_quantize(x)[1:]), bits(rounded[1:]))


def test_a_row_under_one_tensor_scale_does_depend_on_the_others() -> None:
    x = gaussian(3, 40)
    rounded = NV_TENSOR.fake_quantize(x)
    x[0] *= 1000
    assert not torch.equal(NV_TENSOR.fake_quantize(x)[1:], rounded[1:])


def test_by_role_is_one_scale_for_a_weight_and_one_a_row_for_an_input() -> None:
    assert NVFP4.as_weight == NVFP4.with_fields("nvfp4", tensor_scale="tensor")
    assert NVFP4.as_input == NVFP4.with_fields("nvfp4", tensor_scale="row")


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, *NV], ids=attrgetter("name"))
def test_what_is_decided_already_is_the_same_for_weight_and_input(fmt: Format) -> None:
    assert fmt.as_weight is fmt
    assert fmt.as_input is fmt


# A format is data


@each_format
def test_a_format_comes_back_from_its_fields(fmt: Format) -> None:
    assert MXFP4.with_fields(fmt.name, **fmt.to_dict()) == fmt


def test_fields_that_are_not_given_are_kept() -> None:
    assert NVFP4.with_fields("mine", block=8).to_dict() == {
        "element": "e2m1",
        "block": 8,
        "scale": "e4m3",
        "scale_rule": "nearest",
        "tensor_scale": "by_role",
        "static_scale": "none",
        "rounding": "nearest",
        "hadamard": "none",
        "four_over_six": False,
        "seed": 0,
    }


def test_another_name_is_all_that_differs_without_fields() -> None:
    assert MXFP4.with_fields("mine") == replace(MXFP4, name="mine")


# Errors


@pytest.mark.parametrize("block", [0, -16])
def test_a_block_of_no_values_is_refused(block: int) -> None:
    with pytest.raises(FormatError) as caught:
        Format("mine", E2M1, block, E8M0, "floor")
    assert str(caught.value) == f"block is {block}; at least 1 value must share a scale"


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        pytest.param("many", "'many'", id="a word"),
        pytest.param("16", "'16'", id="digits"),
        pytest.param(16.5, "16.5", id="a fraction"),
        pytest.param(True, "True", id="a truth value"),
    ],
)
def test_a_block_that_is_not_a_whole_number_is_refused(block: Any, shown: str) -> None:
    with pytest.raises(FormatError) as caught:
        MXFP4.with_fields("mine", block=block)
    assert str(caught.value) == (f"block is {shown}; expected a whole number, two of them [rows, columns], or none")


def test_a_tensor_scale_that_is_none_of_the_known_is_refused() -> None:
    with pytest.raises(FormatError) as caught:
        replace(NV[0], tensor_scale="rows")  # type: ignore[arg-type]
    assert str(caught.value) == "no tensor scale 'rows'; did you mean 'row'?"


def test_a_rule_for_float_scales_does_not_go_with_a_power_of_two() -> None:
    with pytest.raises(FormatError) as caught:
        MXFP4.with_fields("mine", scale_rule="nearest")
    assert str(caught.value) == (
        "scale rule 'nearest' does not go with scale e8m0; expected one of: ceil, even, floor, rceil, rceil/7.25, round"
    )


def test_a_rule_for_powers_of_two_does_not_go_with_a_float_scale() -> None:
    with pytest.raises(FormatError) as caught:
        NVFP4.with_fields("mine", scale_rule="floor")
    assert str(caught.value) == "scale rule 'floor' does not go with scale e4m3; expected one of: nearest"


def test_a_misspelt_rule_is_answered_with_the_nearest_that_goes_with_the_scale() -> None:
    with pytest.raises(FormatError) as caught:
        Format("mine", E2M1, 32, E8M0, "flor")
    assert str(caught.value) == "scale rule 'flor' does not go with scale e8m0; did you mean 'floor'?"


@pytest.mark.parametrize("tensor_scale", ["tensor", "row", "by_role"])
def test_a_tensor_scale_does_not_go_with_powers_of_two(tensor_scale: str) -> None:
    with pytest.raises(FormatError) as caught:
        MXFP4.with_fields("mine", tensor_scale=tensor_scale)
    assert str(caught.value) == (
        f"tensor_scale '{tensor_scale}' with scale e8m0: powers of two span FP32's range already; leave it at 'none'"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("element", "e2m2", "no element 'e2m2'; did you mean 'e5m2'?", id="element"),
        pytest.param("scale", "e8m1", "no scale 'e8m1'; did you mean 'e8m0'?", id="scale"),
        pytest.param("scale_rule", "cel", "no scale rule 'cel'; did you mean 'ceil'?", id="scale rule"),
        pytest.param("tensor_scale", "rows", "no tensor scale 'rows'; did you mean 'row'?", id="tensor scale"),
    ],
)
def test_an_unknown_value_of_a_field_is_answered_with_the_nearest(field: str, value: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        MXFP4.with_fields("mine", **{field: value})
    assert str(caught.value) == message


def test_an_unknown_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(FormatError) as caught:
        MXFP4.with_fields("mine", blok=16)
    assert str(caught.value) == "a format has no field 'blok'; did you mean 'block'?"


@pytest.mark.parametrize("call", ["fake_quantize", "quantize", "saturates"])
@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_a_dtype_that_cannot_be_quantized_is_named(dtype: torch.dtype, call: str) -> None:
    with pytest.raises(ShapeError) as caught:
        getattr(MXFP4, call)(torch.ones(32).to(dtype))
    assert str(caught.value) == (f"cannot quantize a tensor of {dtype}; expected float32, bfloat16, float16 or float64")


@pytest.mark.parametrize("call", ["fake_quantize", "quantize", "saturates"])
def test_a_tensor_without_dimensions_cannot_be_quantized(call: str) -> None:
    with pytest.raises(ShapeError) as caught:
        getattr(MXFP4, call)(torch.tensor(1.0))
    assert str(caught.value) == "cannot quantize a tensor without dimensions; blocks run along one"


@pytest.mark.parametrize("call", ["fake_quantize", "quantize"])
@pytest.mark.parametrize(
    "derive",
    [
        pytest.param(lambda x: x, id="a parameter"),
        pytest.param(lambda x: x * 2, id="what was computed from one"),
    ],
)
def test_a_tensor_that_takes_part_in_autograd_is_refused(derive: Callable[[Tensor], Tensor], call: str) -> None:
    x = derive(torch.ones(32, requires_grad=True))
    with pytest.raises(GradientError) as caught:
        getattr(MXFP4, call)(x)
    assert str(caught.value) == (
        "fake quantization has no gradient of its own: use QuantLinear (or layers.straight_through), "
        "or call it under torch.no_grad()"
    )


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_parameter_is_rounded_where_no_gradient_is_recorded(no_grad: Callable[[], torch.no_grad]) -> None:
    weight = torch.nn.Parameter(torch.full((32,), 7.9))
    with no_grad():
        rounded = MXFP4.fake_quantize(weight)
        dequantized = MXFP4.quantize(weight).dequantize()
    assert rounded.tolist() == [6.0] * 32
    assert dequantized.tolist() == [6.0] * 32
    assert not rounded.requires_grad


@each_format
def test_zeros_stay_zero_where_denormals_are_flushed(fmt: Format) -> None:
    if not torch.set_flush_denormal(True):
        pytest.fail("this processor cannot flush denormals, so that the test says nothing")
    try:
        assert fmt.fake_quantize(torch.zeros(2, 40)).tolist() == [[0.0] * 40] * 2
        assert fmt.quantize(torch.zeros(2, 40)).codes.count_nonzero().item() == 0
    finally:
        torch.set_flush_denormal(False)
