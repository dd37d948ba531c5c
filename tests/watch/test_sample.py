"""Which rows are sampled, and with what scale they are rounded."""

from typing import Any

import pytest
import torch
from torch import nn

import qsurgeon
from qsurgeon.formats import get_format
from qsurgeon.formats.kernels import VARIABLE, arithmetic
from qsurgeon.formats.quality import sqnr
from qsurgeon.layers import Quantization, QuantLinear
from qsurgeon.watch.sample import rows_of

ALL = 10**6  # rows: all of them


def test_a_sample_is_of_whole_rows_of_the_tensor_with_the_scale_of_all_of_it() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 200, bias=False)
    with torch.no_grad():
        layer.weight[next(row for row in range(200) if row not in rows_of(200, 8, 1)), 3] = 50.0
    QuantLinear.wrap(layer, Quantization(get_format("nvfp4"), None))
    whole = get_format("nvfp4").as_weight.fake_quantize(layer.weight.detach())
    rows = list(rows_of(200, 8, 1))
    with qsurgeon.Watch(nn.ModuleDict({"one": layer}), every=1, rows=8) as watch:
        number = watch.step()["qsurgeon/weight_sqnr_db/one"]
    sampled = layer.weight.detach()[rows]
    assert number == pytest.approx(sqnr(sampled, whole[rows]), abs=1e-4)
    assert abs(number - sqnr(sampled, get_format("nvfp4").as_weight.fake_quantize(sampled))) > 0.01


def test_rows_are_drawn_in_whole_bands_and_always_the_same() -> None:
    assert rows_of(5, 16, 1) == (0, 1, 2, 3, 4)
    drawn = rows_of(1000, 16, 1)
    assert len(set(drawn)) == 16
    assert list(drawn) == sorted(drawn)
    assert len({one % 64 for one in drawn}) > 8
    rows_of.cache_clear()
    assert rows_of(1000, 16, 1) == drawn
    bands = rows_of(1000, 16, 12)
    assert len(bands) == 24
    assert {one // 12 for one in bands} == {one // 12 for one in bands if one % 12 == 11}
    assert rows_of(20, ALL, 16) == tuple(range(20))


@pytest.mark.parametrize("past_autograd", [False, True])
@pytest.mark.parametrize(("trainable", "passes_of_a_step"), [(False, 0), (True, 1)], ids=["frozen", "trainable"])
def test_the_scale_of_a_tensor_is_computed_once_and_again_after_a_write(
    trainable: bool, passes_of_a_step: int, past_autograd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes(*given: Any) -> Any:
        shapes.append(tuple(given[0].shape))
        return tensor_scale(*given)

    layer = nn.Linear(64, 200, bias=False)
    QuantLinear.wrap(layer, Quantization(get_format("nvfp4"), None))
    layer.requires_grad_(trainable)
    unseen = next(row for row in range(200) if row not in rows_of(200, 16, 1))
    tensor_scale, shapes = arithmetic.tensor_scale, list[tuple[int, ...]]()
    with torch.no_grad(), qsurgeon.Watch(nn.ModuleDict({"one": layer}), every=1) as watch:
        monkeypatch.setattr(arithmetic, "tensor_scale", passes)
        monkeypatch.setenv(VARIABLE, "eager")  # compiled code finds the scale itself
        layer(torch.randn(8, 64))
        assert shapes.count((200, 64)) == 1  # the layer's own
        assert watch.step()["qsurgeon/active"] == 1.0
        assert shapes.count((200, 64)) == 1 + passes_of_a_step
        if past_autograd:
            layer.weight.data.mul_(3)
        else:
            layer.weight[unseen, 3] = 50.0
        layer(torch.randn(8, 64))
        assert shapes.count((200, 64)) == 3 + passes_of_a_step
        assert watch.step()["qsurgeon/active"] == 1.0
