"""Stochastic rounding, the Hadamard rotation, four-over-six and static scales: what each promises."""

import math
from operator import attrgetter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsurgeon.errors import FormatError, ShapeError
from qsurgeon.formats import Format, get_format
from qsurgeon.formats.quality import gaussian, heavy_tailed, reached, sqnr
from qsurgeon.formats.rotation import Rotation
from qsurgeon.formats.stochastic import uniform

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4").as_weight


def stochastic(seed: int, **fields: object) -> Format:
    return MXFP4.with_fields("stochastic", rounding="stochastic", seed=seed, **{"scale_rule": "rceil", **fields})


# Stochastic rounding


def test_uniform_numbers_are_uniform_and_independent_of_each_other() -> None:
    numbers = uniform(torch.ones(1000, 1000), 0, 0, seed=3)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    chi_square = ((counts - 1e4).square() / 1e4).sum().item()  # 99 degrees of freedom: mean 99, deviation 14
    assert 45 < chi_square < 160
    for other in (numbers.roll(1, 0), numbers.roll(1, 1), uniform(torch.ones(1000, 1000), 0, 0, seed=4)):
        assert abs(torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1].item()) < 0.005


def test_uniform_numbers_of_a_piece_are_those_of_the_whole() -> None:
    x = torch.randn(20, 30)
    assert torch.equal(uniform(x, 0, 0, 5)[4:9, 8:20], uniform(x[4:9, 8:20], 4, 8, 5))


def test_the_mean_over_seeds_is_the_value_where_nothing_saturates() -> None:
    x = gaussian()[:8, :64]
    mean = torch.stack([stochastic(seed).fake_quantize(x) for seed in range(2000)]).double().mean(0)
    step = x.view(8, 2, 32).abs().amax(-1, keepdim=True).expand(8, 2, 32).reshape(8, 64) / 2
    assert ((mean - x).abs() < 5 * step / math.sqrt(2000)).all()
    assert (MXFP4.fake_quantize(x) - x).abs().max() > 5 * step.max() / math.sqrt(2000)  # nearest is biased, here


def test_under_floor_what_saturates_is_biased_and_nothing_else() -> None:
    x = torch.tensor([7.9, 1.2] * 16)
    mean = torch.stack([stochastic(seed, scale_rule="floor").fake_quantize(x) for seed in range(500)]).mean(0)
    assert mean[0].item() == 6.0
    assert mean[1::2].mean().item() == pytest.approx(1.2, abs=0.02)


def test_the_same_tensor_is_rounded_to_the_same_values_and_another_seed_to_others() -> None:
    x = gaussian()
    assert torch.equal(stochastic(1).fake_quantize(x), stochastic(1).fake_quantize(x.clone()))
    assert (stochastic(1).fake_quantize(x) != stochastic(2).fake_quantize(x)).float().mean() > 0.1


def test_a_value_that_changed_in_its_last_bit_gets_a_fresh_number() -> None:
    x = gaussian()
    near = torch.nextafter(x, torch.full_like(x, torch.inf))
    assert (stochastic(1).fake_quantize(x) != stochastic(1).fake_quantize(near)).float().mean() > 0.1


@settings(deadline=None, max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), columns=st.integers(1, 100))
def test_each_value_goes_to_one_of_its_two_neighbours(seed: int, columns: int) -> None:
    x = gaussian()[:3, :columns]
    rounded = stochastic(seed).quantize(x)
    assert rounded.scale is not None
    scale = torch.exp2(rounded.scale.float() - 127).repeat_interleave(32, -1)[:, :columns]
    grid = torch.tensor(sorted(set(MXFP4.element.values)))
    place = torch.bucketize(x / scale, grid)
    below, above = grid[(place - 1).clamp_min(0)], grid[place.clamp_max(len(grid) - 1)]
    taken = rounded.dequantize() / scale
    assert ((taken == below) | (taken == above)).all()


def test_recomputing_under_gradient_checkpointing_rounds_to_the_same_values() -> None:
    from torch.utils.checkpoint import checkpoint

    from qsurgeon.layers import Quantization, QuantLinear

    def grads(checkpointed: bool) -> list[Any]:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        for layer in (layers[0], layers[2]):
            QuantLinear.wrap(layer, Quantization(stochastic(1), stochastic(2)))
        x = torch.randn(5, 64)
        out = checkpoint(layers, x, use_reentrant=False) if checkpointed else layers(x)
        out.square().sum().backward()
        return [parameter.grad for parameter in layers.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(grads(True), grads(False), strict=True))


# The rotation


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_a_rotation_is_undone_and_keeps_lengths_and_products(size: int) -> None:
    rotation, x, w = Rotation(size, seed=4), torch.randn(5, 256), torch.randn(7, 256)
    assert torch.allclose(rotation.back(rotation(x)), x, atol=1e-5)
    assert torch.allclose(rotation(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(rotation(x) @ rotation(w).t(), x @ w.t(), atol=1e-3)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_a_rotation_is_the_hadamard_matrix_after_the_signs(size: int) -> None:
    from scipy.linalg import hadamard

    rotation = Rotation(size, seed=4)
    matrix = rotation(torch.eye(size))
    expected = torch.from_numpy(hadamard(size)).float() / math.sqrt(size)
    signs = matrix[:, :1] * math.sqrt(size)
    assert set(signs.flatten().round().tolist()) == {1.0, -1.0}
    assert torch.allclose(matrix, signs * expected, atol=1e-6)


def test_the_seed_gives_the_signs_for_good() -> None:
    assert "".join("+" if sign > 0 else "-" for sign in Rotation(16, 4).signs) == "++++++---+-++++-"
    x = torch.randn(3, 64)
    assert torch.equal(Rotation(64, 1)(x), Rotation(64, 1)(x))
    assert not torch.equal(Rotation(64, 1)(x), Rotation(64, 2)(x))


def test_a_row_that_the_size_does_not_divide_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        MXFP4.with_fields("mine", hadamard=64).fake_quantize(torch.ones(3, 96))
    assert str(caught.value) == "hadamard 64 does not divide the 96 values of a row"


@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_rotated_and_rounded_comes_back_near_what_it_was(dim: int) -> None:
    x = gaussian()
    rotated = MXFP4.with_fields("mine", hadamard=32, seed=1)
    rounded = rotated.fake_quantize(x, dim=dim)
    assert sqnr(x, rounded) == pytest.approx(sqnr(x, MXFP4.fake_quantize(x, dim=dim)), abs=0.1)
    assert torch.equal(rotated.quantize(x, dim=dim).dequantize(), rounded)


def test_a_rotation_spreads_outliers_for_mxfp4() -> None:
    x = heavy_tailed()
    plain, rotated = (reached(fmt, x) for fmt in (MXFP4, MXFP4.with_fields("mine", hadamard=32, seed=1)))
    assert plain == pytest.approx(17.6, abs=0.1)
    assert rotated == pytest.approx(18.8, abs=0.2)


def test_saturation_is_asked_of_rotated_values() -> None:
    fmt = MXFP4.with_fields("mine", hadamard=32)
    with pytest.raises(FormatError) as caught:
        fmt.saturates(torch.ones(32))
    assert str(caught.value) == (
        "format 'mine' rotates values before it rounds them; ask its without_rotation, of rotated ones"
    )
    assert fmt.without_rotation.saturates(torch.tensor([7.9] * 32)).all()


# Four over six


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4.with_fields("square", block=[16, 16])], ids=attrgetter("name"))
def test_four_over_six_is_never_worse_in_a_block_than_six_alone(fmt: Format) -> None:
    # Under one and the same tensor scale.
    x = gaussian()
    above = {"tensor_scale": "static", "static_scale": x.abs().max().item() / (6 * 256)}
    six, either = (fmt.with_fields("mine", four_over_six=chosen, **above) for chosen in (False, True))
    height, width = fmt.block_shape

    def errors(rounded: Tensor) -> Tensor:
        return (rounded - x).square().view(512 // height, height, 512 // width, width).sum((1, 3))

    better = errors(either.fake_quantize(x)) - errors(six.fake_quantize(x))
    assert (better <= 1e-6).all()
    assert (better < -1e-3).float().mean() > 0.03


def test_four_over_six_takes_four_where_that_is_better() -> None:
    # 4.6 and 5 lie between 4 and 6; with the largest at 4 they are 3.07 and 3.33.
    x = torch.tensor([6.0, 4.6, 5.0] + [4.5] * 13)
    fmt = get_format("nvfp4").with_fields("mine", tensor_scale="none", four_over_six=True)
    quantized = fmt.quantize(x)
    assert fmt.scale is not None
    assert quantized.scale is not None
    assert fmt.scale.decode(quantized.scale).item() == 1.5
    assert quantized.dequantize().tolist() == [6.0, 4.5, 4.5] + [4.5] * 13


def test_the_tensor_scale_leaves_room_for_a_scale_one_and_a_half_times_as_large() -> None:
    x = gaussian()
    fmt = NVFP4.with_fields("mine", four_over_six=True)
    tensor_scale = fmt.quantize(x).tensor_scale
    assert tensor_scale is not None
    assert tensor_scale.item() == (x.abs().max() / (6 * 256)).item()


# Static scales


def test_a_static_scale_is_the_number_itself_whatever_the_tensor() -> None:
    fmt = NVFP4.with_fields("mine", tensor_scale="static", static_scale=0.25)
    for x in (gaussian(), gaussian() * 100):
        tensor_scale = fmt.quantize(x).tensor_scale
        assert tensor_scale is not None
        assert tensor_scale.item() == 0.25
    calibrated = NVFP4.with_fields("mine", tensor_scale="static", static_scale=gaussian().abs().max().item() / 2688)
    assert torch.equal(calibrated.fake_quantize(gaussian()), NVFP4.fake_quantize(gaussian()))


def test_what_exceeds_a_static_scale_saturates_and_what_is_not_finite_is_nan() -> None:
    fp8 = get_format("fp8_e4m3").with_fields("mine", tensor_scale="static", static_scale=0.01)
    x = torch.tensor([[4.48, 100.0], [1.0, math.inf]])
    rounded = fp8.fake_quantize(x)
    assert rounded[0].tolist() == pytest.approx([4.48, 4.48])
    assert rounded[1].isnan().all()
    assert fp8.quantize(x).dequantize()[1].isnan().all()


def test_a_static_scale_without_a_number_asks_for_calibration() -> None:
    fmt = NVFP4.with_fields("mine", tensor_scale="static")
    with pytest.raises(FormatError) as caught:
        fmt.fake_quantize(torch.ones(16))
    assert str(caught.value) == (
        "format 'mine' has a static tensor scale and no number for it: calibrate the model (qsurgeon.calibrate), or "
        "set static_scale"
    )


# The ratio of signal to noise


def laplace() -> Tensor:
    uniforms = torch.rand(2**20, generator=torch.Generator().manual_seed(0)).view(1024, 1024) - 0.5
    return -uniforms.sign() * torch.log1p(-2 * uniforms.abs())


def normal(deviation: float = 1.0) -> Tensor:
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * deviation


def with_rule(name: str, rule: str) -> Format:
    return get_format(name).with_fields("mine", scale_rule=rule)


@pytest.mark.parametrize(
    ("fmt", "x", "decibels"),
    [
        pytest.param(MXFP4, normal(), 18.79, id="mxfp4"),
        pytest.param(MXFP4, normal(0.02), 18.86, id="mxfp4 of a weight's deviation"),
        pytest.param(with_rule("mxfp4", "even"), normal(), 19.03, id="mxfp4, even"),
        pytest.param(with_rule("mxfp4", "rceil"), normal(), 18.75, id="mxfp4, rceil"),
        pytest.param(with_rule("mxfp4", "ceil"), normal(), 16.82, id="mxfp4, ceil"),
        pytest.param(MXFP4.with_fields("16", block=16), normal(), 18.58, id="mxfp4, block 16"),
        pytest.param(NVFP4, normal(), 20.43, id="nvfp4"),
        pytest.param(NVFP4.with_fields("mine", four_over_six=True), normal(), 21.20, id="nvfp4, four over six"),
        pytest.param(MXFP4, laplace(), 17.9, id="mxfp4 of Laplace"),
        pytest.param(NVFP4, laplace(), 20.7, id="nvfp4 of Laplace"),
        pytest.param(get_format("mxfp6_e2m3"), normal(), 30.9, id="mxfp6_e2m3"),
        pytest.param(get_format("mxfp6_e3m2"), normal(), 25.4, id="mxfp6_e3m2"),
        pytest.param(get_format("mxfp8_e4m3"), normal(), 30.65, id="mxfp8_e4m3"),
        pytest.param(with_rule("mxfp8_e4m3", "rceil"), normal(), 31.51, id="mxfp8_e4m3, rceil"),
        pytest.param(get_format("mxfp8_e5m2"), normal(), 25.4, id="mxfp8_e5m2"),
        pytest.param(stochastic(1, scale_rule="floor"), normal(), 16.0, id="mxfp4, stochastic"),
    ],
)
def test_this_ratio_of_signal_to_noise_is_reached(fmt: Format, x: Tensor, decibels: float) -> None:
    assert reached(fmt, x) == pytest.approx(decibels, abs=0.1)
    assert sqnr(x, fmt.fake_quantize(x)) == pytest.approx(decibels, abs=0.1)


def test_nothing_lost_is_infinitely_little_noise() -> None:
    assert sqnr(torch.ones(3), torch.ones(3)) == math.inf
