"""A packed weight as tensors of bytes."""

import pytest
import torch

from qsurgeon.errors import ShapeError
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.storage.packed import from_stored, stored_bytes, stored_shapes, to_stored

FORMATS = [
    *(format.as_weight for format in CATALOG.values()),
    get_format("nvfp4").with_fields("by-row", tensor_scale="row"),
    get_format("nvfp4").with_fields("static", tensor_scale="static", static_scale=0.01),
    get_format("fp8_e4m3").with_fields("static-rows", tensor_scale="static", static_scale=0.01),
    get_format("mxfp4").with_fields("rotated", hadamard=16),
    get_format("mxfp4").with_fields("square", block=[16, 16]),
    get_format("nvfp4").with_fields("static", tensor_scale="static", static_scale=0.01),
    get_format("nvfp4").with_fields(
        "one-number", block="none", scale="none", scale_rule="none", tensor_scale="static", static_scale=0.01
    ),
]


def named(format: Format) -> str:
    return format.name


def weight(rows: int = 48, columns: int = 80) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_what_was_stored_opens_to_what_fake_quantizing_gives(format: Format) -> None:
    stored = to_stored(format.quantize(weight()))
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint8}
    opened = from_stored(stored, format, 80, torch.float32).dequantize()
    assert torch.equal(opened, format.fake_quantize(weight()))


@pytest.mark.parametrize("shape", [(48, 80), (1, 33), (7, 1)], ids=str)
@pytest.mark.parametrize("format", [one for one in FORMATS if one.hadamard is None], ids=named)
def test_shapes_and_bytes_are_known_before_anything_is_quantized(format: Format, shape: tuple[int, int]) -> None:
    stored = to_stored(format.quantize(weight(*shape)))
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == stored_shapes(format, *shape)
    assert sum(tensor.nbytes for tensor in stored.values()) == stored_bytes(format, *shape)


def test_bytes_may_begin_anywhere() -> None:
    format = get_format("nvfp4").as_weight
    stored = to_stored(format.quantize(weight()))
    shifted = {
        name: torch.cat([torch.zeros(1, dtype=torch.uint8), tensor.flatten()])[1:].view(tensor.shape)
        for name, tensor in stored.items()
    }
    assert torch.equal(
        from_stored(shifted, format, 80, torch.float32).dequantize(),
        from_stored(stored, format, 80, torch.float32).dequantize(),
    )


def test_tensors_of_another_format_are_refused() -> None:
    stored = to_stored(get_format("nvfp4").as_weight.quantize(weight()))
    with pytest.raises(ShapeError, match="a weight in format 'mxfp4' is"):
        from_stored(stored, get_format("mxfp4"), 80, torch.float32)


@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_slabs_of_rows_have_the_codes_and_scales_of_the_whole(format: Format) -> None:
    height = max(16, format.block_shape[0])
    matrix = weight(2 * height + 5)
    whole, slabs = to_stored(format.quantize(matrix)), matrix.split(height)
    tops = [format.peak(slab) for slab in slabs]
    top = None if tops[0] is None else torch.stack([one for one in tops if one is not None]).max()
    stored = [to_stored(format.quantize(slab, top=top)) for slab in slabs]
    for name, tensor in whole.items():
        parts = [one[name] for one in stored]
        shared = len(tensor) == 1
        assert torch.equal(parts[0] if shared else torch.cat(parts), tensor)


def test_one_nan_is_the_peak_of_its_tensor() -> None:
    broken = weight()
    broken[3, 4] = torch.nan
    top = get_format("nvfp4").as_weight.peak(broken)
    assert top is not None
    assert top.isnan()
