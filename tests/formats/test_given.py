"""Scales as a value, and rounding under scales that are given: to the bit what a format does on its own."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import DTYPES, ROTATED, VARIANTS, roles

from qsurgeon.errors import FormatError, GradientError, ShapeError
from qsurgeon.formats import Format, Quantized, Scales, get_format, kernels
from qsurgeon.formats.scale import E8M0, SCALES

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4")
ROLES = [role for fmt in (*VARIANTS, *ROTATED) for role in roles(fmt)]
each_role = pytest.mark.parametrize("fmt", ROLES, ids=lambda fmt: f"{fmt.name}-{fmt.tensor_scale}")


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the operations that say what a format is; native code is compared with them elsewhere."""
    monkeypatch.setenv(kernels.VARIABLE, "eager")


def bits(x: Tensor | None) -> Any:
    """Return what tells ``x`` from other tensors, the sign of a zero among it, and not one NaN from another."""
    if x is None:
        return None
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.nan, x).view(
            {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        )
    return x.shape, x.dtype, x.contiguous().numpy().tobytes()


def parts(found: Quantized) -> list[Any]:
    return [*map(bits, (found.data, found.scale, found.tensor_scale)), found.dtype, found.length, found.dim]


def wild(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return values of many magnitudes, with rows of zeros, of tiny and of huge values, and one infinite at the end."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(
        3 * torch.randn(rows, columns, generator=generator)
    )
    for row, factor in enumerate((0.0, -0.0, 2.0**-126, 1e-45, 1e30)):
        x[row] *= factor
    return x.to(dtype)


def columns_of(fmt: Format) -> int:
    return 3 * fmt.hadamard if fmt.hadamard else 2 * (fmt.block_shape[1] or 16) + 3


@each_role
def test_under_its_own_scales_a_tensor_is_rounded_as_without(fmt: Format) -> None:
    for dtype in (*DTYPES, torch.float64):
        x = wild(11, columns_of(fmt), dtype)
        broken = x.clone()
        broken[-1, 3], broken[-2, 0] = torch.inf, torch.nan
        for one in (x, broken, x.view(1, 11, -1).expand(2, 11, -1), x[-1]):
            scales = fmt.scales(one)
            assert bits(fmt.round_under(one, scales)) == bits(fmt.fake_quantize(one))
            codes = fmt.codes_under(one, scales)
            assert parts(fmt.quantized(codes, scales, one.dtype)) == parts(fmt.quantize(one))


@each_role
def test_a_part_is_rounded_as_in_the_whole(fmt: Format) -> None:
    x = wild(11, columns_of(fmt), torch.float32)
    scales, whole, codes = fmt.scales(x), fmt.fake_quantize(x), fmt.quantize(x).codes
    step = fmt.hadamard or 1
    pieces = [fmt.round_under(x[:, j : j + step], scales, at=(0, j)) for j in range(0, x.shape[1], step)]
    assert bits(torch.cat(pieces, 1)) == bits(whole)
    ends = step, x.shape[1] - step
    assert bits(fmt.codes_under(x[:, slice(*ends)], scales, at=(0, step))) == bits(codes[:, slice(*ends)])
    rows = [fmt.round_under(x[i : i + 3], scales, at=(i, 0)) for i in range(0, 11, 3)]
    assert bits(torch.cat(rows)) == bits(whole)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_e4m3_row", "fp8_e4m3_128x128"])
def test_blocks_may_run_along_another_dimension(name: str) -> None:
    fmt = get_format(name).as_weight
    x = wild(11, 37, torch.float32)
    scales = fmt.scales(x.T, dim=0)
    assert bits(fmt.round_under(x.T, scales)) == bits(fmt.fake_quantize(x.T, dim=0)) == bits(fmt.fake_quantize(x).T)
    assert parts(fmt.quantized(fmt.codes_under(x.T, scales), scales, x.dtype)) == parts(fmt.quantize(x.T, dim=0))
    assert bits(fmt.round_under(x.T[5:6], scales, at=(0, 5))) == bits(fmt.fake_quantize(x)[:, 5:6].T)


def test_gptq_rounds_a_column_at_a_time_and_is_nearer_to_the_output_than_rounding_alone() -> None:
    torch.manual_seed(0)
    fmt = get_format("nvfp4").as_weight
    w, x = torch.randn(24, 64), torch.randn(400, 64) @ torch.randn(64, 64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(x.T @ x + 0.01 * torch.eye(64)), upper=True)
    scales, left = fmt.scales(w), w.clone()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for j in range(64):
        codes[:, j : j + 1] = fmt.codes_under(left[:, j : j + 1], scales, at=(0, j))
        error = (left[:, j : j + 1] - fmt.round_under(left[:, j : j + 1], scales, at=(0, j))) / inverse[j, j]
        left[:, j + 1 :] -= error * inverse[j, j + 1 :]
    found = fmt.quantized(codes, scales, w.dtype).dequantize()
    noise = [(x @ (one - w).T).square().sum() for one in (found, fmt.fake_quantize(w))]
    assert noise[0] < 0.7 * noise[1]


@pytest.mark.parametrize(
    "fmt",
    [
        get_format("nvfp4").as_weight,
        get_format("int4_b32"),
        get_format("mxfp4"),
        get_format("int8").with_fields("int4-row", element="int4"),
    ],
    ids=lambda fmt: fmt.name,
)
def test_a_search_for_scales_loses_nothing_and_gains_something(fmt: Format) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 128) * torch.randn(16, 128).exp()
    best = start = fmt.scales(x)
    least = _errors(fmt, x, start)
    for factor in (0.5, 0.7, 0.8, 0.9, 2.0):
        if start.block is None:
            assert start.tensor is not None
            tried = fmt.nearest_scales(None, start.tensor * factor)
        else:
            tried = fmt.nearest_scales(start.block * factor, start.tensor)
        errors = _errors(fmt, x, tried)
        better, least = errors < least, torch.minimum(errors, least)
        if best.block is None or tried.block is None:
            assert tried.tensor is not None
            assert best.tensor is not None
            best = replace(best, tensor=torch.where(better, tried.tensor, best.tensor))
        else:
            best = replace(best, block=torch.where(better, tried.block, best.block))
    found = fmt.quantized(fmt.codes_under(x, best), best, x.dtype)
    assert torch.equal(found.dequantize(), fmt.round_under(x, best))
    lost = [(one - x).square().sum() for one in (found.dequantize(), fmt.fake_quantize(x))]
    assert lost[0] < 0.99 * lost[1]


def _errors(fmt: Format, x: Tensor, scales: Scales) -> Tensor:
    """Return the squared error of each block, or of each row where there are none."""
    error = (fmt.round_under(x, scales) - x).square()
    width = fmt.block_shape[1]
    return error.view(len(x), -1, width).sum(-1) if width else error.sum(-1)


def test_what_meets_a_given_scale_that_is_too_small_saturates() -> None:
    x = torch.tensor([[1.0, -7.0, 100.0, *[0.0] * 29]])
    scales = MXFP4.nearest_scales(torch.tensor([[0.3]]))
    assert scales.block is not None
    assert scales.block.item() == 0.25
    assert MXFP4.round_under(x, scales)[0, :3].tolist() == [1.0, -1.5, 1.5]


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda one: one.name)
def test_nearest_scales_are_the_nearest(scale: Any) -> None:
    fmt = MXFP4.with_fields("mine", scale="e8m0") if scale is E8M0 else None
    fmt = fmt or get_format("int4_b32").with_fields("mine", scale=scale.name)
    if scale.bits > 8:
        at = torch.exp2(torch.linspace(-120, 100, 999))
        near = fmt.nearest_scales(at[:, None]).block
        expected = at.to(scale.dtype).float()
    else:
        values = (
            torch.tensor([one for one in scale.values if 0 < one <= fmt.largest_scale])
            if scale is E8M0
            else (torch.tensor([one for one in scale.element.magnitudes if one > 0]))
        )
        low, high = values[:-1].double(), values[1:].double()
        middle = (low + high) / 2
        at = torch.stack([low, low + (high - low) * 0.49, middle, low + (high - low) * 0.51, high]).float().flatten()
        even = torch.arange(len(low)) % 2 == (0 if scale is E8M0 else 1)
        expected = torch.stack([low, low, torch.where(even, low, high), high, high]).float().flatten()
        near = fmt.nearest_scales(at[:, None]).block
    assert near is not None
    assert torch.equal(near.flatten(), expected)
    assert fmt.nearest_scales(torch.tensor([math.nan])).block.isnan().all()  # type: ignore[union-attr]


# What is refused


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(
            lambda: Scales(torch.tensor([[0.3]]), None, MXFP4),
            "block scale 0.300000012 is none that format 'mxfp4' can store; the nearest is 0.25 (Format.nearest_scales "
            "finds it)",
            id="no number of the scale",
        ),
        pytest.param(
            lambda: Scales(torch.tensor([[-1.0]]), torch.tensor(1.0), NVFP4),
            "block scale -1 is none that format 'nvfp4' can store; the nearest is 0.001953125 (Format.nearest_scales "
            "finds it)",
            id="negative",
        ),
        pytest.param(
            lambda: Scales(torch.tensor([[1.0]]), torch.tensor(0.0), NVFP4),
            "tensor scale 0 is none that format 'nvfp4' can store; the nearest is 7.88860905e-31 "
            "(Format.nearest_scales finds it)",
            id="zero",
        ),
        pytest.param(lambda: Scales(None, None, MXFP4), "format 'mxfp4' has a block scale", id="without"),
        pytest.param(
            lambda: Scales(torch.ones(1, 1), torch.ones(()), MXFP4), "format 'mxfp4' has no tensor scale", id="one more"
        ),
        pytest.param(
            lambda: get_format("int8").nearest_scales(torch.ones(1, 1)), "format 'int8' has no block scale", id="near"
        ),
        pytest.param(
            lambda: Scales(torch.ones(1, 1).double(), None, MXFP4),
            "block scales of torch.float64; expected torch.float32",
            id="dtype",
        ),
        pytest.param(
            lambda: NVFP4.round_under(torch.ones(1, 32), MXFP4.scales(torch.ones(1, 32))),
            "scales of format 'mxfp4', block 32, cannot be those of format 'nvfp4', block 16",
            id="another format",
        ),
    ],
)
def test_scales_that_cannot_be_are_an_error(make: Any, text: str) -> None:
    with pytest.raises(FormatError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("fmt", "at", "shape", "text"),
    [
        pytest.param(
            MXFP4, (0, 40), (4, 32),
            "rows 0 to 4 and columns 40 to 72 of (4, 32) are not in the blocks of scales (4, 2)",
            id="beyond the columns",
        ),
        pytest.param(
            MXFP4, (1, 0), (4, 64), "rows 1 to 5 and columns 0 to 64 of (4, 64) are not in the blocks of scales (4, 2)",
            id="beyond the rows",
        ),
        pytest.param(
            get_format("int8"), (1, 0), (4, 64),
            "rows 1 to 5 and columns 0 to 64 of (4, 64) are not in the rows of scales (4,)", id="beyond row scales",
        ),
        pytest.param(
            MXFP4, (-1, 0), (1, 64),
            "at is (-1, 0); expected a row and a column from 0 up, the row 0 of more than a matrix",
            id="before",
        ),
        pytest.param(
            MXFP4.with_fields("turned", hadamard=16), (0, 8), (4, 16),
            "column 8 is within a run of 16 values that format 'turned' rotates together; rotate the whole, and ask "
            "its without_rotation",
            id="within a rotation",
        ),
    ],
)  # fmt: skip
def test_a_part_that_is_none_of_the_whole_is_an_error(
    fmt: Format, at: tuple[int, int], shape: tuple[int, int], text: str
) -> None:
    scales = fmt.scales(torch.ones(4, 64))
    with pytest.raises(ShapeError) as caught:
        fmt.round_under(torch.ones(shape), scales, at)
    assert str(caught.value) == text


def test_scales_take_no_part_in_autograd() -> None:
    with pytest.raises(GradientError) as caught:
        Scales(torch.ones(1, 1, requires_grad=True), None, MXFP4)
    assert str(caught.value) == (
        "block scales that require a gradient: rounding under them has none; detach them, and give the scales a "
        "gradient of their own (torch.autograd.Function)"
    )
    with torch.no_grad():
        assert Scales(torch.ones(1, 1, requires_grad=True), None, MXFP4).block is not None


def test_scales_may_be_replaced() -> None:
    scales = MXFP4.scales(torch.ones(2, 64))
    assert scales.block is not None
    assert replace(scales, block=scales.block * 2).block.eq(0.5).all()  # type: ignore[union-attr]
