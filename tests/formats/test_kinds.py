"""Every kind of kernel, for real, over all formats, row lengths, roles, acts and dtypes: the bits of the eager one.

The formats are generated from the registries, so that a new element, scale or rule is here at once. A kernel of
torch.compile takes seconds to make: there each format has one act and one dtype, in turn, so that each act meets each
dtype, each kind of scale and each layout of blocks.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain, cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import CASES, DTYPES, axes, covering, roles

from qsurgeon.formats import CATALOG, Format, Quantized, get_format, kernels
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.scale import SCALES


def lengths(fmt: Format) -> tuple[int, ...]:
    """Return row lengths: one that the block divides, one that it does not, one shorter than it, and 1."""
    if fmt.hadamard:
        return fmt.hadamard, 3 * fmt.hadamard
    width = fmt.block_shape[1] or 32
    return 2 * width, 2 * width + max(width // 2 + 1, 1), max(width - 3, 1), 1


def wild(columns: int, dtype: torch.dtype, rows: int = 21) -> Tensor:
    """Return values of many magnitudes, with rows of zeros, of NaN, of infinity, of tiny and of huge values."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randn(rows, columns, generator=generator) * 3
    )
    for row, factor in enumerate((0.0, -0.0, 1e-30, 2.0**-120, 2.0**-126, 1e-45, 1e30, 3e38)):
        x[row + 1] *= factor
    x[10, columns // 2], x[11, -1], x[12, 0] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


def tame(columns: int, dtype: torch.dtype) -> Tensor:
    """Return values of which none makes all others NaN."""
    return wild(columns, torch.float32).nan_to_num(1.0, 2.0, -2.0).clamp(-1e4, 1e4).to(dtype)


def bits(x: Tensor) -> Tensor:
    """Return the bits of ``x``, the sign of a zero included, and one pattern for every NaN."""
    if not x.is_floating_point():
        return x
    return torch.where(x.isnan(), torch.nan, x).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def codes(fmt: Format, x: Tensor) -> list[Tensor]:
    found = fmt.quantize(x)
    return [one for one in (found.data, found.scale, found.tensor_scale) if one is not None]


def values(fmt: Format, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "eager")
        found: Quantized = fmt.quantize(x)
    return [found.dequantize()]


def saturates(fmt: Format, x: Tensor) -> list[Tensor]:
    return [fmt.without_rotation.saturates(x)]


Act = Callable[[Format, Tensor], list[Tensor]]


def acts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Act]:
    return {
        "fake_quantize": lambda fmt, x: [fmt.fake_quantize(x)],
        "quantize": codes,
        "dequantize": partial(values, monkeypatch=monkeypatch),
        "saturates": saturates,
    }


ACTS = tuple(acts(pytest.MonkeyPatch()))


def assert_alike(kind: str, act: str, fmt: Format, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for one in (kind, "eager"):
        monkeypatch.setenv(kernels.VARIABLE, one)
        found[one] = acts(monkeypatch)[act](fmt, x)
    for ours, other in zip(found[kind], found["eager"], strict=True):
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype), (act, x.shape)
        differ = (bits(ours) != bits(other)).sum().item()
        assert not differ, f"{kind} {act} of {tuple(x.shape)}: {differ} of {ours.numel()} differ"


def check(kind: str, act: str, fmt: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in lengths(fmt):
        for x in (wild(columns, dtype), tame(columns, dtype)):
            assert_alike(kind, act, fmt, x, monkeypatch)
    assert_alike(kind, act, fmt, tame(lengths(fmt)[-2], dtype).view(3, 7, -1), monkeypatch)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [(role, dtype) for fmt, dtype in CASES for role in roles(fmt)],
    ids=lambda one: f"{one.name}-{one.tensor_scale}" if isinstance(one, Format) else str(one),
)
def test_native_code_is_eager_to_the_bit(fmt: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for act in ACTS:
        check("native", act, fmt, dtype, monkeypatch)


def selection() -> list[Any]:
    """Return (act, dtype, format): acts and dtypes in turn, one format of each make.

    The catalogue's, and some that have each value of each field once.
    """
    kinds: dict[Any, Format] = {}
    for fmt in chain.from_iterable(map(roles, [*covering(axes(), 1), *CATALOG.values()])):
        if fmt.four_over_six and fmt.is_two_dimensional:
            continue  # inductor takes minutes for it on a CPU, where nothing but this test asks it
        (height, width), element = fmt.block_shape, fmt.element
        layout = height > 1, width * element.bits % 8
        kinds.setdefault((type(element), element.bits, fmt.scale, fmt.scale_rule, layout, fmt.rounding), fmt)
    cases = zip(cycle(ACTS), cycle(DTYPES), kinds.values(), strict=False)
    return [pytest.param(*one, id=f"{one[2].name}-{one[2].tensor_scale}-{one[0]}-{one[1]}") for one in cases]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports
@pytest.mark.parametrize(("act", "dtype", "fmt"), selection())
def test_what_torch_compile_makes_is_eager_to_the_bit(
    act: str, dtype: torch.dtype, fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    check("compile", act, fmt, dtype, monkeypatch)


def test_the_selection_has_each_act_with_each_dtype_each_layout_and_each_kind_of_scale() -> None:
    seen = [case.values for case in selection()]
    for act in ACTS:
        assert {dtype for one, dtype, _ in seen if one == act} == set(DTYPES)
    assert {fmt.is_two_dimensional for _, _, fmt in seen} == {True, False}
    assert {type(fmt.scale) for _, _, fmt in seen} == {type(scale) for scale in (*SCALES.values(), None)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["int4_b32", "mxfp4"])
def test_what_a_compiler_would_fuse_or_cut_is_kept(name: str) -> None:
    # The round trip of a bf16 scale, in operations that a compiler sees; a short block is kept from it on a CPU.
    fmt = get_format(name)
    x = tame(2 * fmt.block_shape[1], torch.float32)
    torch._dynamo.reset()
    run = torch.compile(lambda x: arithmetic.fake_quantize(x, None, fmt) * 2)
    assert torch.equal(bits(run(x)), bits(arithmetic.fake_quantize(x, None, fmt) * 2))
