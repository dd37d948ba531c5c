"""What rounding does to a tensor, against plain float64 arithmetic and against numbers that are known."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.scanning import Sums, measure, reference, total
from qsurgeon.scanning.measures import ideal

GRIDS = {name: one.as_weight for name, one in CATALOG.items()}


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch operations round, to the same bits: to compile a kernel for each format takes longer than the rest."""
    monkeypatch.setenv("QSURGEON_KERNELS", "eager")


def heavy(*shape: int) -> Tensor:
    """Values with outliers, some zeros and a block of zeros."""
    x = torch.randn(*shape) * torch.rand(*shape).add(0.05).reciprocal()
    x[..., 3::17] = 0
    x[0] = 0
    return x


@pytest.mark.parametrize("grid", list(GRIDS.values()), ids=list(GRIDS))
def test_every_number_is_what_float64_says(grid: Format) -> None:
    x = heavy(128, 256)
    found, wide = measure(x, grid), x.double()
    error = grid.fake_quantize(x).double() - wide
    becomes_zero = (wide != 0) & (grid.fake_quantize(x) == 0)
    shares = torch.where(wide == 0, 0, error.abs() / wide.abs())
    central = wide - wide.mean()
    expected = {
        "sqnr": 10 * math.log10(wide.square().sum() / error.square().sum()),
        "relative_l2": (error.norm() / wide.norm()).item(),
        "relative_mean": (error.abs().mean() / wide.abs().mean()).item(),
        "mean_relative": shares.mean().item(),
        "zeroed_share": becomes_zero.double().mean().item(),
        "clipped_share": grid.saturates(x).double().mean().item(),
        "kurtosis": (central**4).mean().item() / (central**2).mean().item() ** 2,
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found.count == x.numel()


# Independent numbers, of 2^20 samples each; here there are 2^18.
GAUSSIAN = [
    ("mxfp4", 18.79, 0.2104, 0.115, 0.088),
    ("nvfp4", 20.43, 0.179, 0.095, 0.068),
    ("mxfp6_e2m3", 30.9, 0.068, 0.028, 0.022),
    ("mxfp8_e4m3", 30.7, 0.023, 0.029, 0.0),
    ("mxfp8_e5m2", 25.4, 0.045, 0.054, 0.0),
]


@pytest.mark.parametrize(("name", "sqnr", "mean", "l2", "zeroed"), GAUSSIAN, ids=[one[0] for one in GAUSSIAN])
def test_the_gaussian_reference_is_the_known_one(name: str, sqnr: float, mean: float, l2: float, zeroed: float) -> None:
    found = reference(GRIDS[name])
    assert found.sqnr == pytest.approx(sqnr, abs=0.05)
    assert found.mean_relative == pytest.approx(mean, abs=0.001)
    assert found.relative_l2 == pytest.approx(l2, abs=0.001)
    assert found.zeroed_share == pytest.approx(zeroed, abs=0.001)
    assert found.kurtosis == pytest.approx(3, abs=0.05)


def test_almost_a_third_of_gaussian_blocks_clip_under_the_floor_rule_and_none_under_rceil() -> None:
    floor, rceil = GRIDS["mxfp4"], replace(GRIDS["mxfp4"], scale_rule="rceil")
    assert reference(floor).clipped_block_share == pytest.approx(0.297, abs=0.004)
    assert reference(floor).clipped_share == pytest.approx(0.0235, abs=0.001)
    assert reference(rceil).clipped_blocks == 0


def test_four_over_six_raises_the_mean_of_relative_errors_and_lowers_the_error() -> None:
    plain, better = reference(GRIDS["nvfp4"]), reference(replace(GRIDS["nvfp4"], four_over_six=True))
    assert better.mean_relative > plain.mean_relative
    assert better.relative_l2 < 0.95 * plain.relative_l2


# --- causes


@pytest.mark.parametrize("grid", list(GRIDS.values()), ids=list(GRIDS))
def test_the_causes_add_up_to_the_whole_error(grid: Format) -> None:
    assert sum(measure(heavy(128, 256), grid).causes.values()) == pytest.approx(1, abs=1e-4)


def block(*values: float) -> Tensor:
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]])


def test_a_value_above_the_largest_is_clipped_and_nothing_else() -> None:
    found = measure(block(7.0, 4.0, 2.0), GRIDS["mxfp4"])  # under scale 1 it becomes 6; under 7/6 it would be exact
    assert (found.e2, found.clipped, found.clipped_blocks, found.blocks) == (1.0, 1, 1, 1)
    # 4 and 2 are exact under 1; under 7/6 they are rounded, which the real scale takes away again.
    lost = (7 / 6 * 3 - 4) ** 2 + (7 / 6 * 1.5 - 2) ** 2
    assert found.clipping == pytest.approx(1.0, abs=1e-6)
    assert found.grid == pytest.approx(lost, abs=1e-6)
    assert found.scale == pytest.approx(-lost, abs=1e-6)
    assert found.deadzone == 0


def test_a_small_value_beside_a_large_one_is_in_the_dead_zone() -> None:
    found = measure(block(6.0, 0.2), GRIDS["mxfp4"])
    assert found.e2 == pytest.approx(0.04)
    assert found.causes == pytest.approx({"scale": 0, "clipping": 0, "deadzone": 1, "grid": 0})
    assert found.zeroed == 1


def test_a_value_between_two_of_the_grid_is_the_grids() -> None:
    assert measure(block(6.0, 2.4), GRIDS["mxfp4"]).causes == pytest.approx(
        {"scale": 0, "clipping": 0, "deadzone": 0, "grid": 1}, abs=1e-5
    )


def test_a_scale_that_had_to_be_a_power_of_two_is_the_scales() -> None:
    # Under 3.1/6 both are exact, or nearly; the largest value is 3.1 and the scale 1/2, which takes it to 3.
    x = block(3.1, 3.1 / 6 * 4)
    found = measure(x, replace(GRIDS["mxfp4"], scale_rule="ceil"))
    assert found.causes["scale"] == pytest.approx(1, abs=1e-4)


def test_without_blocks_no_scale_is_to_blame() -> None:
    assert measure(heavy(64, 64), GRIDS["fp8_e4m3_row"]).causes["scale"] == 0


def test_a_static_scale_that_is_too_small_clips() -> None:
    static = replace(get_format("fp8_e4m3"), tensor_scale="static", static_scale=1e-3)
    found = measure(torch.randn(64, 64), static)
    assert found.causes["clipping"] > 0.9
    assert found.clipped_share > 0.5


def test_an_ideal_scale_takes_each_blocks_largest_value_to_the_elements_largest() -> None:
    x = torch.randn(8, 64)
    rounded = ideal(GRIDS["mxfp4"]).fake_quantize(x).reshape(8, 2, 32)
    largest = x.reshape(8, 2, 32).abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(rounded.gather(-1, largest), x.reshape(8, 2, 32).gather(-1, largest))


# --- sums


def parts(x: Tensor, rows: int) -> Iterator[Tensor]:
    return iter(x.split(rows))


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    x, grid = heavy(96, 64), GRIDS["mxfp4"]
    whole, added = measure(x, grid), total(measure(part, grid) for part in parts(x, 32))
    assert added.tops == whole.tops
    assert (added.peak, added.zeroed, added.clipped, added.blocks, added.clipped_blocks) == (
        whole.peak, whole.zeroed, whole.clipped, whole.blocks, whole.clipped_blocks,
    )  # fmt: skip
    assert added.to_dict()["sqnr_db"] == pytest.approx(whole.to_dict()["sqnr_db"], rel=1e-5)
    assert added.causes == pytest.approx(whole.causes, abs=1e-5)


def test_sums_survive_json_to_the_bit() -> None:
    sums = measure(heavy(32, 64), GRIDS["nvfp4"])
    assert Sums.of_raw(json.loads(json.dumps(sums.raw()))) == sums


def test_percentiles_are_of_blocks_in_units_of_the_root_mean_square() -> None:
    x = torch.ones(100, 32)
    x[0] = 10.0
    found, rms = measure(x, GRIDS["mxfp4"]), math.sqrt((99 + 100) / 100)
    assert found.top(50) == pytest.approx(1 / rms, rel=0.011)
    assert found.top(100) == pytest.approx(10 / rms)
    assert measure(torch.zeros(4, 32), GRIDS["mxfp4"]).to_dict()["block_amax_over_rms"]["p50"] is None


def test_where_nothing_is_lost_nothing_is_said_to_be() -> None:
    found = measure(torch.full((4, 32), 2.0), GRIDS["mxfp4"]).to_dict()
    assert found["sqnr_db"] is None
    assert (found["relative_l2"], found["zeroed"], found["clipped"]) == (0.0, 0.0, 0.0)
    assert found["causes"] == {"scale": 0.0, "clipping": 0.0, "deadzone": 0.0, "grid": 0.0}


def test_statistics_are_of_float32_whatever_comes_in() -> None:
    x = torch.randn(64, 256).to(torch.bfloat16)
    assert measure(x, GRIDS["nvfp4"]) == measure(x.float(), GRIDS["nvfp4"])


def test_large_values_do_not_overflow_the_fourth_moment() -> None:
    small = torch.randn(64, 256)
    assert measure(small * 2.0**40, GRIDS["mxfp4"]).kurtosis == pytest.approx(measure(small, GRIDS["mxfp4"]).kurtosis)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_not_measured(wrong: float) -> None:
    x = torch.randn(4, 32)
    x[1, 2] = wrong
    assert math.isnan(measure(x, GRIDS["mxfp4"]).x2)


def test_nothing_has_no_statistics() -> None:
    found = measure(torch.zeros(0, 32), GRIDS["mxfp4"])
    assert (found.count, found.blocks) == (0, 0)
    assert math.isnan(found.kurtosis)
