"""The product that reads codes: dequantize and linear, but for the order of a sum."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsurgeon.formats import Format, Quantized, get_format
from qsurgeon.formats.kernels import choosing, native
from qsurgeon.formats.kernels.few_rows import FEWEST_VALUES, MOST_ROWS, few_rows
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, rounding

FORMATS = {
    "mxfp4": get_format("mxfp4"),
    "nvfp4": get_format("nvfp4").as_weight,
    "rows": replace(get_format("nvfp4"), name="rows", tensor_scale="row"),
    "square": replace(get_format("nvfp4"), name="square", block=(16, 16), tensor_scale="tensor"),
    "int4": get_format("int4_b128"),
    "48": replace(get_format("mxfp4"), name="48", block=48),
}
STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(300, 1000), (1024, 80), (70, 1024), (1000, 77), (257, 256)]


def has_product(format: Format, dtype: torch.dtype = torch.bfloat16) -> bool:
    library = native.library(format, dtype)
    return library is not None and library.direct.has_product


pytestmark = pytest.mark.skipif(not has_product(FORMATS["mxfp4"]), reason="this processor has no product of codes")


def weight_of(format: Format, outputs: int, inputs: int, dtype: torch.dtype) -> Quantized:
    torch.manual_seed(outputs)
    return format.quantize((torch.randn(outputs, inputs) * torch.randn(outputs, 1).exp()).to(dtype))


def check(found: Tensor | None, x: Tensor, weight: Quantized, bias: Tensor | None) -> None:
    """Check ``found`` against exact products: one rounding to the dtype, and 1/2^21 of the magnitudes for the sum."""
    assert found is not None
    assert found.dtype == x.dtype
    values = weight.dequantize().double()
    added = torch.zeros(len(values), dtype=torch.float64) if bias is None else bias.double()
    exact = x.double() @ values.T + added
    magnitudes = x.double().abs() @ values.abs().T + added.abs()
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= magnitudes * 2.0**-21 + exact.abs() * STEP[x.dtype]).all()


CASES = [(name, dtype) for name in FORMATS for dtype in STEP if name in ("mxfp4", "nvfp4") or dtype == torch.bfloat16]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_product_is_that_of_the_dequantized_weight(name: str, dtype: torch.dtype) -> None:
    for outputs, inputs in SHAPES:
        weight = weight_of(FORMATS[name], outputs, inputs, dtype)
        bias = torch.randn(outputs).to(dtype)
        for rows in ((1,), (2,), (3,), (5,), (8,), (2, 3), ()):
            x = torch.randn(*rows, inputs).to(dtype)
            check(few_rows(x, weight, bias), x, weight, bias)
            check(few_rows(x, weight, None), x, weight, None)


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_row_is_what_it_is_alone(name: str) -> None:
    weight, x = weight_of(FORMATS[name], 300, 1000, torch.bfloat16), torch.randn(4, 1000).bfloat16()
    whole = few_rows(x, weight, None)
    assert whole is not None
    for i in range(4):
        alone = few_rows(x[i : i + 1], weight, None)
        assert alone is not None
        assert torch.equal(alone, whole[i : i + 1])


def test_a_product_is_the_same_each_time_and_on_several_threads() -> None:
    weight, x = weight_of(FORMATS["nvfp4"], 1000, 1000, torch.bfloat16), torch.randn(2, 1000).bfloat16()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(few_rows(x, weight, None))
    finally:
        torch.set_num_threads(before)
    assert all(one is not None and torch.equal(one, found[0]) for one in found if found[0] is not None)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_bytes_that_no_rounding_gives_are_read_as_dequantize_reads_them(name: str, dtype: torch.dtype) -> None:
    """Scales from elsewhere: the largest codes, NaN, negative ones, a tensor scale that takes blocks beyond a dtype."""
    torch.manual_seed(0)
    weight = weight_of(FORMATS[name], 128, 1024, dtype)
    assert weight.scale is not None
    weight.data.copy_(torch.randint(0, 256, weight.data.shape, dtype=torch.uint8))
    as_bytes = weight.scale.view(torch.uint8)
    as_bytes[::3] = torch.randint(0, 256, as_bytes[::3].shape, dtype=torch.uint8)
    if weight.tensor_scale is not None:
        weight.tensor_scale.fill_(1e36)
    # One value a row of x, so that a sum is one product, and infinity and NaN come from the weight alone.
    for place in (0, 5, 1023):
        x = torch.zeros(1, 1024, dtype=dtype)
        x[0, place] = 0.5
        found, values = few_rows(x, weight, None), weight.dequantize()
        assert found is not None
        expected = (values[:, place].float() * 0.5).to(dtype)[None]
        finite = values.isfinite().all(1)
        assert torch.equal(found[:, finite], expected[:, finite])
        assert found[:, ~finite].isnan().all() or torch.equal(found[:, ~finite].isnan(), expected[:, ~finite].isnan())


def test_sums_that_no_number_of_the_dtype_reaches_are_infinite() -> None:
    weight = weight_of(FORMATS["mxfp4"], 512, 256, torch.float16)
    x = torch.full((1, 256), 60000.0, dtype=torch.float16)
    found = few_rows(x, weight, None)
    assert found is not None
    exact = x.double() @ weight.dequantize().double().T
    beyond = exact.abs() > 66000
    assert beyond.any()
    assert torch.equal(found[beyond].double(), exact[beyond].sign() * torch.inf)
    assert found[exact.abs() < 65000].isfinite().all()


def test_what_is_unusual_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    format = FORMATS["mxfp4"]
    weight, x = weight_of(format, 300, 1000, torch.float32), torch.randn(2, 1000)
    assert few_rows(x, weight, None) is not None
    assert few_rows(torch.randn(MOST_ROWS + 1, 1000), weight, None) is None
    assert few_rows(x[:0], weight, None) is None
    assert few_rows(x.double(), weight, None) is None
    assert few_rows(x, weight, torch.randn(300).bfloat16()) is None
    assert few_rows(x.to("meta"), weight, None) is None
    small = weight_of(format, FEWEST_VALUES // 1024 - 1, 1024, torch.float32)
    assert few_rows(torch.randn(1, 1024), small, None) is None
    assert few_rows(x, replace(weight, data=weight.data.view(torch.int8)), None) is None
    strided = replace(weight, data=weight.data.T.contiguous().T)
    assert few_rows(x, strided, None) is None
    wide = weight_of(get_format("mxfp8"), 300, 1000, torch.float32)
    assert few_rows(x, wide, None) is None
    monkeypatch.setenv(choosing.VARIABLE, "eager")
    assert few_rows(x, weight, None) is None


# ---- in a layer


def layers_of(name: str, **said: Any) -> tuple[PackedLinear, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(512, 256, dtype=torch.bfloat16)
    PackedLinear.wrap(layer, Quantization(get_format(name), get_format(name), **said))
    assert isinstance(layer, PackedLinear)
    return layer, torch.randn(4, 512).bfloat16()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_layer_reads_codes_where_few_rows_want_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layers_of(name)
    calls: list[int] = []
    original = rounding.dequantized

    def counted(codes: Quantized) -> Tensor:
        calls.append(1)
        return original(codes)

    monkeypatch.setattr("qsurgeon.layers.dequantized.dequantized", counted)
    with torch.no_grad():
        few = layer(x)
        assert calls == []
        many = layer(x.repeat(4, 1))
        assert calls == [1]
    trained = layer(x.requires_grad_())
    assert len(calls) == 2
    for one in (many[:4], trained.detach()):
        assert (few.float() - one.float()).abs().max() <= one.float().abs().max() * 2.0**-7
    assert torch.equal(few, layer(x.detach()))


def test_master_and_packed_are_equal_to_the_bit_where_both_multiply_values() -> None:
    packed, x = layers_of("nvfp4")
    torch.manual_seed(0)
    master = nn.Linear(512, 256, dtype=torch.bfloat16)
    QuantLinear.wrap(master, Quantization(get_format("nvfp4"), get_format("nvfp4")))
    rows = x.repeat(3, 1)
    with torch.no_grad():
        assert torch.equal(packed(rows), master(rows))
    assert torch.equal(packed(x.requires_grad_()), master(x))


def test_autocast_and_a_compiled_layer_read_codes_too() -> None:
    layer, x = layers_of("mxfp4")
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)
        assert torch.equal(torch.compile(layer, backend="aot_eager")(x), expected)
