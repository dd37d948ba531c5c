"""Tensors that are not plain: wide, huge, empty, spread, lazy, transformed, and modes around them."""

import threading
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsurgeon.errors import GradientError, ShapeError
from qsurgeon.formats import CATALOG, Format, get_format, kernels
from qsurgeon.formats.kernels import native

MXFP4, NVFP4, INT8 = get_format("mxfp4"), get_format("nvfp4"), get_format("int8")
FORMATS = [*(fmt.as_weight for fmt in CATALOG.values()), NVFP4.as_input]

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.name}-{fmt.tensor_scale}")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at the first use of some parts
each_kind = pytest.mark.parametrize("kind", kernels.KINDS)


def all_of(fmt: Format, x: Tensor) -> list[Tensor]:
    codes = fmt.quantize(x)
    found = [fmt.fake_quantize(x), fmt.saturates(x), codes.data, codes.scale, codes.tensor_scale, codes.dequantize()]
    return [one for one in found if one is not None]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# float64


@each_format
def test_a_finite_float64_beyond_float32_saturates_and_an_infinite_one_is_nan(fmt: Format) -> None:
    x = torch.tensor([[1e300, -1e39, 3.0, 0.0]], dtype=torch.float64)
    rounded, codes = fmt.fake_quantize(x), fmt.quantize(x)
    assert rounded.isfinite().all()
    assert torch.equal(codes.dequantize(), rounded)
    assert torch.equal(rounded[0, :2].sign(), x[0, :2].sign())
    assert (rounded[0, :2].abs() > 1e38).all()
    assert fmt.saturates(x)[0].tolist() == [True, True, False, False]
    assert fmt.fake_quantize(x.clone().index_fill_(1, torch.tensor([0]), torch.inf))[0, 1].isnan()


# Shapes and strides


@each_kind
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (2, 0, 5), (1,), (1, 1), (2, 1, 1)], ids=str)
@each_format
def test_empty_and_single_ones_keep_their_shape(
    fmt: Format, shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "eager" if kind == "compile" and 0 not in shape else kind)
    x = torch.ones(shape)
    codes, rounded = fmt.quantize(x), fmt.fake_quantize(x)
    assert rounded.shape == codes.dequantize().shape == fmt.saturates(x).shape == shape
    assert torch.equal(codes.dequantize(), rounded)


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(lambda x: x[:1].expand(6, -1), id="expanded"),
        pytest.param(lambda x: x[0, 0].expand(6, 70), id="one number"),
        pytest.param(lambda x: x.T.contiguous().T, id="transposed"),
        pytest.param(lambda x: torch.cat([x, x])[::2], id="every second row"),
        pytest.param(lambda x: x.repeat(1, 2)[:, ::2], id="every second column"),
        pytest.param(lambda x: x.flip(0), id="flipped"),
        pytest.param(torch._neg_view, id="lazily negative"),
        pytest.param(lambda x: x.repeat(1, 2)[:, 1:71], id="off its alignment"),
    ],
)
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4.as_weight, NVFP4.as_input, INT8], ids=attrgetter("name"))
def test_what_a_view_looks_at_is_rounded(fmt: Format, spread: Callable[[Tensor], Tensor]) -> None:
    x = spread(torch.randn(6, 70, generator=torch.Generator().manual_seed(0)).exp())
    assert_same(all_of(fmt, x), all_of(fmt, torch.zeros(6, 70).copy_(x)))


@pytest.mark.parametrize("act", ["fake_quantize", "quantize", "saturates"])
def test_what_has_no_rows_of_numbers_is_refused(act: str) -> None:
    run = getattr(MXFP4, act)
    with pytest.raises(ShapeError) as caught:
        run(torch.ones(4, 64).to_sparse())
    assert str(caught.value) == (
        "cannot quantize a tensor of layout torch.sparse_coo; expected torch.strided: call to_dense() first"
    )
    with pytest.raises(ShapeError, match="without dimensions"):
        run(torch.tensor(1.0))


# Transforms and modes


@pytest.mark.parametrize("act", ["fake_quantize", "quantize"])
def test_a_forward_derivative_is_refused_where_it_would_be_zero(act: str) -> None:
    x = torch.randn(4, 64)
    with pytest.raises(GradientError, match="fake quantization has no gradient of its own"):
        torch.func.jvp(lambda x: getattr(MXFP4, act)(x) * 1, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(GradientError, match="fake quantization has no gradient of its own"):
            getattr(MXFP4, act)(dual)
        assert torch.equal(MXFP4.fake_quantize(x), MXFP4.fake_quantize(x.clone()))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4.as_weight, INT8], ids=attrgetter("name"))
def test_vmap_maps_over_tensors(fmt: Format) -> None:
    x = torch.randn(3, 4, 70)
    for act in (fmt.fake_quantize, fmt.saturates, lambda x: fmt.quantize(x).data):
        assert torch.equal(torch.vmap(act)(x), torch.stack([act(one) for one in x]))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4.as_weight, INT8], ids=attrgetter("name"))
def test_inference_mode_and_parameters_change_nothing(fmt: Format) -> None:
    x = torch.randn(4, 70)
    with torch.inference_mode():
        inside = all_of(fmt, x.clone())
    with torch.no_grad():
        assert_same(all_of(fmt, torch.nn.Parameter(x)), inside)
    assert_same(all_of(fmt, x), inside)


@pytest.fixture
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "ceil"])
@pytest.mark.parametrize("element", ["e2m1", "int8/64"])
def test_native_threads_flush_as_the_thread_that_called(
    element: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = MXFP4.with_fields("mine", element=element, scale_rule=rule)
    tiny = torch.tensor([[0x00600000, 0x00400000, 0x007FFFFF, 1] * 8], dtype=torch.int32).view(torch.float32)
    x = torch.cat([tiny.expand(2000, 32), torch.ones(2000, 32)])  # two threads have work of both sorts
    found = {}
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found[threads] = all_of(fmt, x)
    for one, other in zip(found[1], found[4], strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_two_threads_that_need_the_same_new_kernels_at_once_each_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSURGEON_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_libraries", {})
    x, found, start = torch.randn(8, 70), {}, threading.Barrier(4)

    def work(place: int) -> None:
        start.wait()
        for fmt in ((MXFP4, INT8), (INT8, MXFP4))[place % 2]:
            found[place, fmt.name] = fmt.fake_quantize(x)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    expected = {fmt.name: fmt.fake_quantize(x) for fmt in (MXFP4, INT8)}
    assert len(found) == 8
    assert all(torch.equal(one, expected[name]) for (_, name), one in found.items())


# torch.compile around them


def compiled(act: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    torch._dynamo.reset()
    return torch.compile(act, fullgraph=True)


def test_one_graph_serves_rows_and_columns_of_any_number() -> None:
    fmt = NVFP4.as_input
    run = compiled(lambda x: all_of(fmt, x))
    for shape in ((6, 70), (9, 33), (2, 128)):
        x = torch.randn(shape)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert_same(run(x), all_of(fmt, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_changes_no_bit_of_a_compiled_kernel(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 70)
    expected = all_of(MXFP4, x)
    monkeypatch.setenv(kernels.VARIABLE, "compile")
    with torch.autocast("cpu", enabled=enabled):
        assert_same(all_of(MXFP4, x), expected)
