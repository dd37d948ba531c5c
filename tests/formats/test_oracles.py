"""Whole formats, bit for bit against torchao and compressed-tensors.

Where an oracle's FP32 arithmetic differs from ours (a reciprocal, another order, a logarithm), the test says which
values may differ, and asserts that no other does.
"""

import pytest
import torch
from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8 as unpack_fp6
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import _choose_scale_float8 as choose_scale
from torchao.quantization.quant_primitives import _quantize_affine_float8 as to_float8

from qsurgeon.formats import Quantized, get_format
from qsurgeon.formats.element import E2M1, E2M3, E4M3, ELEMENTS, Element
from qsurgeon.formats.packing import pack, unpack
from qsurgeon.formats.scale import E8M0

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4").as_weight
TORCHAO_DTYPES = {
    "e2m1": torch.float4_e2m1fn_x2,
    "e2m3": DTYPE_FP6_E2M3,
    "e3m2": DTYPE_FP6_E3M2,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
NVFP4_ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=16,
    symmetric=True,
    scale_dtype=torch.float8_e4m3fn,
    zp_dtype=torch.float8_e4m3fn,
)
# Two FP32 roads to one quotient, three roundings each at most, end this close to it.
ROUNDING_ERROR = 2.0**-22

each_wide_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_element = pytest.mark.parametrize("element", TORCHAO_DTYPES)
each_rule = pytest.mark.parametrize("rule", ["floor", "even", "rceil", "ceil"])
each_seed = pytest.mark.parametrize("seed", range(4))


def scale_of(quantized: Quantized) -> Tensor:
    assert quantized.scale is not None
    return quantized.scale


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks(dtype: torch.dtype) -> Tensor:
    """Return blocks (n, 32) of plain, of very large and small, and of mixed magnitudes."""
    source = generator(0)
    plain = torch.randn(200, 32, generator=source)
    exponents = torch.rand(1000, 1, generator=source) * 230 - 112
    wide = torch.randn(1000, 32, generator=source) * torch.exp2(exponents)
    mixed = torch.randn(200, 32, generator=source) * torch.exp2(torch.rand(200, 32, generator=source) * 40 - 20)
    return torch.cat([plain, wide, mixed]).to(dtype)


def blocks_of_amax(amax: Tensor) -> Tensor:
    """Return a block (n, 32) for each ``amax`` that has it as its largest magnitude."""
    smaller = torch.rand(len(amax), 31, generator=generator(1), dtype=torch.float32) * 1.98 - 0.99
    return torch.cat([amax[:, None], (smaller * amax.float()[:, None]).to(amax.dtype)], dim=-1)


def edges(dtype: torch.dtype, beside: tuple[float, ...] = (0.0, torch.inf)) -> Tensor:
    """Return where rules change their mind: 1, 6, 7, … times powers of two, and what lies ``beside`` each."""
    significands = torch.tensor([1, 1.5, 1.75, 1.875, 1.9375])  # 2^k, 6, 448 and 7, 7.5, 496 of their powers
    exact = (significands[:, None] * torch.exp2(torch.arange(-100.0, 109.0, 2))).flatten().to(dtype)
    return torch.cat([exact, *(torch.nextafter(exact, torch.tensor(side, dtype=dtype)) for side in beside)])


def to_torchao(x: Tensor, element: str, rule: str) -> MXTensor:
    return MXTensor.to_mx(x, TORCHAO_DTYPES[element], 32, scaling_mode=ScaleCalculationMode[rule.upper()])


def is_tie(quotient: Tensor, element: Element) -> Tensor:
    """Return where a float64 ``quotient`` is a tie of ``element``, within what FP32 can tell."""
    grid = torch.tensor(element.magnitudes, dtype=torch.float64)
    middle = (grid[:-1] + grid[1:]) / 2
    magnitude = quotient.abs()
    return (magnitude[..., None] - middle).abs().amin(-1) <= magnitude * ROUNDING_ERROR


# MX against torchao


@each_wide_dtype
@each_rule
@each_element
def test_mx_is_torchaos(element: str, rule: str, dtype: torch.dtype) -> None:
    # Torchao's scales end at 2^-126, ours at 2^-127, and ours keep every product finite: neither is met here.
    at_edges = edges(dtype) if rule != "rceil" else edges(dtype, beside=(0.0,))  # see the next test
    x = torch.cat([blocks(dtype), blocks_of_amax(at_edges)])
    fmt = MXFP4.with_fields("mine", element=element, scale_rule=rule)
    theirs, ours = to_torchao(x, element, rule), fmt.quantize(x)
    assert torch.equal(scale_of(ours), theirs.scale.view(torch.uint8))
    assert torch.equal(bits(ours.dequantize()), bits(theirs.dequantize(dtype)))
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(theirs.dequantize(dtype)))


@each_element
def test_rceil_is_torchaos_where_its_logarithm_is_exact_and_else_one_power_of_two_above(element: str) -> None:
    # Just above max * 2^k, torchao's FP32 log2 rounds to k, so that its block saturates; ours takes 2^(k+1).
    largest = ELEMENTS[element].max
    amax = edges(torch.float32, beside=(torch.inf,))
    fmt = MXFP4.with_fields("mine", element=element, scale_rule="rceil")
    ours = scale_of(fmt.quantize(amax[:, None])).squeeze(-1)
    theirs = to_torchao(blocks_of_amax(amax), element, "rceil").scale.view(torch.uint8).squeeze(-1)
    differs = ours != theirs
    assert differs.any()
    assert torch.equal(ours[differs], theirs[differs] + 1)
    assert (amax[differs].double() > largest * E8M0.decode(theirs[differs]).double()).all()
    assert (amax.double() <= largest * E8M0.decode(ours).double()).all()


@each_wide_dtype
@each_rule
def test_mxfp4_bytes_are_torchaos(rule: str, dtype: torch.dtype) -> None:
    x = blocks(dtype)
    ours = MXFP4.with_fields("mine", scale_rule=rule).quantize(x)
    assert torch.equal(ours.data, to_torchao(x, "e2m1", rule).qdata)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@each_wide_dtype
def test_mxfp8_bytes_are_torchaos(dtype: torch.dtype, element: str) -> None:
    x = blocks(dtype)
    ours = MXFP4.with_fields("mine", element=element).quantize(x)
    assert torch.equal(ours.data, to_torchao(x, element, "floor").qdata.view(torch.uint8))


@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
def test_a_block_with_nan_is_torchaos(rule: str) -> None:
    x = torch.randn(4, 64, generator=generator(0))
    x[1, 40] = torch.nan
    ours = MXFP4.with_fields("mine", scale_rule=rule).quantize(x)
    theirs = to_torchao(x, "e2m1", rule)
    assert torch.equal(scale_of(ours), theirs.scale.view(torch.uint8))
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=0, atol=0, equal_nan=True)


# MX against compressed-tensors


@each_wide_dtype
@pytest.mark.parametrize(("element", "width"), [("e2m1", 4), ("e2m3", 6)])
def test_even_is_the_scale_of_compressed_tensors(element: str, width: int, dtype: torch.dtype) -> None:
    amax = torch.cat([blocks(dtype).abs().amax(-1), edges(dtype)])
    fmt = MXFP4.with_fields("mine", element=element, scale_rule="even")
    theirs = generate_mx_scales(amax, num_bits=width).to(torch.uint8)
    assert torch.equal(scale_of(fmt.quantize(amax[:, None])).squeeze(-1), theirs)


# NVFP4


def nvfp4_weight(seed: int, dtype: torch.dtype) -> Tensor:
    """Return Gaussian rows (64, 512), those of odd seeds of standard deviations from 1 to 16."""
    source = generator(seed)
    spread = torch.exp2(torch.rand(64, 1, generator=source) * 4 * (seed % 2))
    return (torch.randn(64, 512, generator=source) * spread).to(dtype)


def nvfp4_weight_without_rounding_errors(dtype: torch.dtype) -> Tensor:
    """Return rows (28, 32) of two blocks whose tensor scale is 1/8 and whose block scales are powers of two.

    The first block of each row holds sixteenths up to 6, ties among them, times its scale; the second holds
    values of E2M1 times the largest scale, 448.
    """
    source = generator(0)
    sixteenths = torch.randint(-95, 96, (28, 16), generator=source)
    sixteenths[sixteenths == 0] = -1  # compressed-tensors loses the sign of a zero that comes in
    sixteenths[:, 0] = 96
    scales = torch.exp2(torch.arange(28) % 14 - 5.0)  # from 2^-5 to 2^8
    first = sixteenths / 16 * scales[:, None] / 8
    second = E2M1.decode(torch.randint(1, 8, (28, 16), generator=source)) * 448 / 8
    second[:, 0] = -6 * 448 / 8
    return torch.cat([first, second], dim=-1).to(dtype)


def to_torchao_nvfp4(x: Tensor) -> NVFP4Tensor:
    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))


def to_compressed_tensors(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes, the block scales (uint8 codes) and the divisor of all of them."""
    rows = x.float().unflatten(-1, (-1, 16))
    divisor = generate_gparam(rows.amin(), rows.amax())
    scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), NVFP4_ARGS, divisor)
    values = cast_to_fp4((rows / (scale / divisor)[..., None]).clamp(-6, 6)).flatten(-2)
    return pack_fp4_to_uint8(values), scale.to(torch.float8_e4m3fn).view(torch.uint8), divisor


def nvfp4_quotients(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return, in float64, what is rounded to a block scale and, given codes of the scales, to an element."""
    rows = x.double().unflatten(-1, (-1, 16))
    tensor_scale = x.double().abs().amax() / (6 * 448)
    of_blocks = rows.abs().amax(-1) / 6 / tensor_scale
    return of_blocks, (rows / (E4M3.decode(scale).double()[..., None] * tensor_scale)).flatten(-2)


def assert_only_ties_differ(x: Tensor, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Compare (codes, scales): a scale may differ on a tie, and so may an element where the scales agree."""
    of_blocks, of_elements = nvfp4_quotients(x, ours[1])
    other_scale = ours[1] != theirs[1]
    assert is_tie(of_blocks[other_scale], E4M3).all()
    other_code = (ours[0] != theirs[0]) & ~other_scale.repeat_interleave(16, -1)
    assert is_tie(of_elements[other_code], E2M1).all()
    assert other_scale.float().mean() < 0.05
    assert other_code.float().mean() < 0.05


@each_wide_dtype
@each_seed
def test_the_tensor_scale_of_nvfp4_is_torchaos(seed: int, dtype: torch.dtype) -> None:
    x = nvfp4_weight(seed, dtype)
    ours = NVFP4.quantize(x).tensor_scale
    assert ours is not None
    assert ours.item() == per_tensor_amax_to_scale(x.abs().amax()).item()


@each_wide_dtype
@each_seed
def test_nvfp4_is_torchaos_but_for_ties(seed: int, dtype: torch.dtype) -> None:
    # Scales of torchao end at 2^-6, the smallest normal value; none of these is smaller.
    x = nvfp4_weight(seed, dtype)
    ours, theirs = NVFP4.quantize(x), to_torchao_nvfp4(x)
    scale = theirs.scale.view(torch.uint8)
    assert scale.min() > 0b0_0001_000
    assert_only_ties_differ(x, (ours.codes, scale_of(ours)), (unpack(theirs.qdata, 4, 512), scale))


@each_wide_dtype
@each_seed
def test_nvfp4_is_that_of_compressed_tensors_but_for_ties(seed: int, dtype: torch.dtype) -> None:
    x = nvfp4_weight(seed, dtype)
    ours = NVFP4.quantize(x)
    packed, scale, _ = to_compressed_tensors(x)
    assert_only_ties_differ(x, (ours.codes, scale_of(ours)), (unpack(packed, 4, 512), scale))


@each_wide_dtype
def test_nvfp4_is_torchaos_to_the_bit_where_nothing_is_rounded_but_elements(dtype: torch.dtype) -> None:
    x = nvfp4_weight_without_rounding_errors(dtype)
    ours, theirs = NVFP4.quantize(x), to_torchao_nvfp4(x)
    assert torch.equal(scale_of(ours), theirs.scale.view(torch.uint8))
    assert torch.equal(ours.data, theirs.qdata)
    assert torch.equal(bits(ours.dequantize()), bits(theirs.dequantize(dtype)))
    assert torch.equal(bits(NVFP4.fake_quantize(x)), bits(theirs.dequantize(dtype)))


@each_wide_dtype
def test_nvfp4_is_that_of_compressed_tensors_to_the_bit_where_nothing_is_rounded_but_elements(
    dtype: torch.dtype,
) -> None:
    x = nvfp4_weight_without_rounding_errors(dtype)
    ours = NVFP4.quantize(x)
    packed, scale, divisor = to_compressed_tensors(x)
    assert ours.tensor_scale is not None
    assert divisor.item() == 8.0
    assert ours.tensor_scale.item() == 1 / 8
    assert torch.equal(scale_of(ours), scale)
    assert torch.equal(ours.data, packed)


def test_there_are_ties_of_every_kind_where_nothing_is_rounded_but_elements() -> None:
    x = nvfp4_weight_without_rounding_errors(torch.float32)
    _, of_elements = nvfp4_quotients(x, scale_of(NVFP4.quantize(x)))
    assert {0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0} <= set(of_elements.abs().flatten().tolist())


@each_seed
def test_nvfp4_dequantizes_as_torchao_does(seed: int) -> None:
    x = nvfp4_weight(seed, torch.float32)
    ours, theirs = NVFP4.quantize(x), to_torchao_nvfp4(x)
    same = (ours.codes == unpack(theirs.qdata, 4, 512)) & (
        ours.scale == theirs.scale.view(torch.uint8)
    ).repeat_interleave(16, -1)
    assert torch.equal(bits(ours.dequantize()[same]), bits(theirs.dequantize()[same]))


# Bytes


def test_every_pair_of_values_has_the_byte_of_compressed_tensors() -> None:
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)  # both zeros among them
    theirs = pack_fp4_to_uint8(E2M1.decode(codes))
    assert torch.equal(pack(codes, bits=4), theirs)


def test_every_byte_has_the_values_of_compressed_tensors() -> None:
    data = torch.arange(256, dtype=torch.uint8)[:, None]
    theirs = unpack_fp4_from_uint8(data, 256, 2, dtype=torch.float32)
    assert torch.equal(bits(E2M1.decode(unpack(data, bits=4, length=2))), bits(theirs))


def test_every_six_bit_code_has_the_bytes_of_compressed_tensors() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(4, 16)
    codes = torch.cat([codes, codes.flip(0), codes.t().reshape(4, 16)])
    values = E2M3.decode(codes)
    assert torch.equal(pack(codes, bits=6), pack_fp6_to_uint8(values))
    assert torch.equal(
        bits(E2M3.decode(unpack(pack(codes, 6), 6, 16))), bits(unpack_fp6(pack(codes, 6), 12, 16, torch.float32))
    )


def test_an_mxfp6_weight_has_the_bytes_of_compressed_tensors() -> None:
    x = torch.randn(16, 64, generator=generator(0))
    fmt = get_format("mxfp6_e2m3").with_fields("mine", scale_rule="even")
    ours = fmt.quantize(x)
    scale = generate_mx_scales(x.view(16, 2, 32).abs().amax(-1), num_bits=6).to(torch.uint8)
    assert torch.equal(scale_of(ours), scale)
    values = ours.dequantize() / E8M0.decode(scale).repeat_interleave(32, -1)
    assert torch.equal(ours.data, pack_fp6_to_uint8(values))


# FP8 and integers


@each_wide_dtype
@each_seed
@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", ["tensor", "row"])
def test_fp8_is_a_cast_of_torch_under_amax_over_the_largest_value(
    kind: str, element: str, seed: int, dtype: torch.dtype
) -> None:
    x = nvfp4_weight(seed, dtype)
    oracle = TORCHAO_DTYPES[element]
    amax = x.float().abs().amax(-1, keepdim=True) if kind == "row" else x.float().abs().amax()
    scale = amax / torch.finfo(oracle).max
    theirs = (x.float() / scale).to(oracle)
    ours = get_format("fp8_e4m3").with_fields("mine", element=element, tensor_scale=kind).quantize(x)
    assert torch.equal(ours.data, theirs.view(torch.uint8))
    assert ours.tensor_scale is not None
    assert torch.equal(ours.tensor_scale.flatten(), scale.flatten())
    assert torch.equal(bits(ours.dequantize()), bits((theirs.float() * scale).to(dtype)))


@each_wide_dtype
@each_seed
def test_fp8_by_squares_is_torchaos_blockwise_quantization(seed: int, dtype: torch.dtype) -> None:
    x = torch.randn(256, 384, generator=generator(seed)).to(dtype)
    scale = choose_scale(x.float(), [128, 128])  # in bfloat16, torchao would round amax / 448 to it first
    theirs = to_float8(x, scale)
    ours = get_format("fp8_e4m3_128x128").quantize(x)
    assert torch.equal(scale_of(ours), scale)
    assert torch.equal(ours.data, theirs.view(torch.uint8))


@each_seed
def test_int8_by_row_is_that_of_compressed_tensors(seed: int) -> None:
    # Theirs is amax / 127.5 and has the code -128; given the scale, the codes inside ±127 are the same.
    x = nvfp4_weight(seed, torch.float32)
    ours = get_format("int8").quantize(x)
    assert ours.tensor_scale is not None
    scale = ours.tensor_scale[:, None]
    assert torch.equal(scale, x.abs().amax(-1, keepdim=True) / 127)
    args = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    theirs = ct_quantize(x, scale, torch.zeros_like(scale), args, dtype=torch.int8)
    assert torch.equal(ours.data, theirs.view(torch.uint8))


@each_seed
@pytest.mark.parametrize("block", [32, 64, 128])
def test_int4_in_blocks_is_that_of_compressed_tensors(block: int, seed: int) -> None:
    x = nvfp4_weight(seed, torch.float32)
    ours = get_format(f"int4_b{block}").quantize(x)
    amax = x.view(64, -1, block).abs().amax(-1)
    assert torch.equal(scale_of(ours), (amax / 7).bfloat16())
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=block, symmetric=True)
    theirs = ct_quantize(x, scale_of(ours).float(), torch.zeros_like(amax), args, dtype=torch.int8)
    assert torch.equal(ours.codes, theirs.clamp(-7, 7).view(torch.uint8) & 15)  # theirs has the code -8


def test_an_mxfp4_weight_has_the_bytes_of_compressed_tensors() -> None:
    x = torch.randn(16, 64, generator=generator(0))
    ours = MXFP4.quantize(x)
    values = ours.dequantize() / E8M0.decode(scale_of(ours)).repeat_interleave(32, -1)
    assert values.signbit()[values == 0].any()  # a negative zero is among them
    assert torch.equal(ours.data, pack_fp4_to_uint8(values))
