"""An operand that is rounded in one call has the bits that the operations of arithmetic.py give it."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qsurgeon.errors import FormatError
from qsurgeon.formats import Format, get_format
from qsurgeon.formats.catalog import CATALOG
from qsurgeon.formats.kernels import choosing, native, operand
from qsurgeon.layers import Quantization, QuantLinear

SHAPES = [(64,), (1, 64), (5, 37), (3, 4, 96), (64, 64), (300, 130), (2, 3, 16, 33)]
SPECIAL: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "NaN": lambda x: x.view(-1)[3].fill_(torch.nan),
    "infinity": lambda x: x.view(-1)[5].fill_(-torch.inf),
    "zero": lambda x: x.zero_(),
    "tiny": lambda x: x.mul_(2.0**-120),
    "huge": lambda x: x.mul_(2.0**13),
}


def grids() -> dict[str, Format]:
    """Return what operands of layers are rounded to: of all formats, as weight and as input, and what recipes make."""
    nvfp4, mxfp4 = get_format("nvfp4"), get_format("mxfp4")
    made = [
        *CATALOG.values(),
        replace(nvfp4, name="square", block=(16, 16)),
        replace(nvfp4, name="four over six", four_over_six=True),
        replace(nvfp4, name="static", tensor_scale="static", static_scale=0.01),
        replace(get_format("fp8_e4m3"), name="static without blocks", tensor_scale="static", static_scale=0.01),
        replace(mxfp4, name="dither", rounding="stochastic", seed=3),
        replace(mxfp4, name="narrow", block=24),
    ]
    roles = {f"{one.name}, weight": one.as_weight.without_rotation for one in made}
    inputs = (one for one in made if not one.is_two_dimensional)
    return roles | {f"{one.name}, input": one.as_input.without_rotation for one in inputs}


GRIDS = grids()


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if found.dtype.is_floating_point and found.dtype.itemsize > 1:
        found, expected = found.nan_to_num(99, 98, 97), expected.nan_to_num(99, 98, 97)
    return torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", list(GRIDS))
def test_values_codes_and_scales_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = GRIDS[name]
    monkeypatch.setenv(choosing.VARIABLE, "eager")
    for dtype in (torch.float32, torch.bfloat16) if grid.name in CATALOG else (torch.bfloat16,):
        for shape in SHAPES:
            for kind, change in SPECIAL.items():
                torch.manual_seed(len(shape))
                x = torch.randn(shape)
                change(x)
                x = x.to(dtype)
                found = operand.written(x, grid)
                assert found is not None
                expected = grid.quantize(x)
                case = (dtype, shape, kind)
                assert same(operand.values(x, grid), grid.fake_quantize(x)), case
                assert same(found.values, expected.dequantize()), case
                assert same(found.data, expected.data), case
                parts = found.data, found.scale, found.tensor_scale
                with monkeypatch.context() as chosen:
                    chosen.setenv(choosing.VARIABLE, "")
                    assert same(operand.read(*parts, grid, shape[-1], dtype), found.values), case
                assert same(found.scale, expected.scale), case
                assert same(found.tensor_scale, expected.tensor_scale), case


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["nvfp4, weight", "nvfp4, input", "mxfp4, weight", "square, weight", "dither, weight"])
def test_threads_and_places_in_memory_change_nothing(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, before = GRIDS[name], torch.get_num_threads()
    x = torch.randn(200, 600)
    monkeypatch.setenv(choosing.VARIABLE, "eager")
    torch.set_num_threads(threads)
    try:
        for one in (x, x.T, x[:, 1:], x[::2], x.expand(2, 200, 600), torch.randn(200, 601)[:, 1:]):
            assert same(operand.values(one, grid), grid.fake_quantize(one))
    finally:
        torch.set_num_threads(before)


def test_what_is_unusual_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 32)
    monkeypatch.delenv(choosing.VARIABLE, raising=False)
    assert operand.is_usual(x)
    assert operand.is_usual(torch.nn.Parameter(x))

    class Own(Tensor):
        pass

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert not operand.is_usual(x)
    complex_part = torch.complex(x, x).conj().imag
    unusual = [fake, x.to("meta"), x.as_subclass(Own), x.to_sparse(), complex_part]
    assert [operand.is_usual(one) for one in unusual] == [False] * 5

    def inside(one: Tensor) -> Tensor:
        assert not operand.is_usual(one)
        return one

    torch.func.vmap(inside)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(inside, x, check_trace=False)
    for word, is_usual in (("", True), ("native", True), ("eager", False), ("compile", False), ("nativ", False)):
        monkeypatch.setenv(choosing.VARIABLE, word)
        assert operand.is_usual(x) is is_usual


def test_a_backend_that_is_asked_first_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "BACKENDS", choosing.BACKENDS[1:])
    assert not operand.is_usual(torch.randn(4, 32))


def test_a_word_that_is_no_choice_stays_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(32, 32)
    QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), get_format("mxfp4")))
    monkeypatch.setenv(choosing.VARIABLE, "nativ")
    with pytest.raises(FormatError) as caught:
        layer(torch.randn(2, 32))
    assert str(caught.value) == "QSURGEON_KERNELS is 'nativ'; did you mean 'native'?"


def test_what_has_no_kernel_no_number_or_no_values_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, x = GRIDS["mxfp4, weight"], torch.randn(4, 32)
    static = replace(get_format("nvfp4"), name="open", tensor_scale="static")
    freed = torch.randn(4, 32)
    freed.untyped_storage().resize_(0)
    zeros = torch._efficientzerotensor(4, 32)
    for one, format in (
        (x.double(), grid), (x.int(), grid), (x[:0], grid), (x[:, :0], grid), (torch.tensor(1.0), grid), (freed, grid),
        (zeros, grid), (x, static), (x, get_format("nvfp4")),
    ):  # fmt: skip
        assert operand.values(one, format) is None
        assert operand.written(one, format) is None
    monkeypatch.setattr(native, "library", lambda fields, dtype: None)
    monkeypatch.setattr(operand, "_calls", {})
    assert operand.values(x, grid) is None
