"""What a backend supports it computes to the bit, what it does not runs by another; and entries of the registries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from variants import DTYPES, covering, scales_with_rules

import qsurgeon
from qsurgeon.errors import FormatError
from qsurgeon.formats import CATALOG, Format, get_format, kernels
from qsurgeon.formats.element import E2M1, ELEMENTS, INT4, FloatElement, IntegerElement
from qsurgeon.formats.fields import NONE, Fields
from qsurgeon.formats.kernels import Backend, Coded, Operation, arithmetic, choosing, native
from qsurgeon.formats.kernels.backend import Above
from qsurgeon.formats.kernels.pieces import EAGER, Eager
from qsurgeon.formats.packing import pack, unpack
from qsurgeon.formats.scale import RULES, SCALES, ElementScale, PowerRule, ScaleRule, WideScale
from qsurgeon.layers import Quantization, QuantLinear
from qsurgeon.recipe.schema import FormatSpec
from qsurgeon.words import SavedInputs

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4").as_weight
OPERATIONS: tuple[Operation, ...] = ("fake_quantize", "quantize", "dequantize", "saturates")
E3M1 = FloatElement("e3m1", exponent=3, mantissa=1)


def values(rows: int = 21, columns: int = 41, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values of many magnitudes; a row of zeros, one of tiny, one of huge values, and one with NaN."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(
        3 * torch.randn(rows, columns, generator=generator)
    )
    for row, factor in enumerate((0.0, 2.0**-126, 1e30)):
        x[row] *= factor
    x[3, 0] = torch.nan
    return x.to(dtype)


def bits(x: Tensor | None) -> list[Any] | None:
    """Return what tells ``x`` from other tensors, the sign of a zero among it, and not one NaN from another."""
    if x is None:
        return None
    if not x.is_floating_point():
        return [x.shape, x.dtype, *x.flatten().tolist()]
    return [x.shape, x.dtype, *torch.where(x.isnan(), 7e37, x).double().view(torch.int64).flatten().tolist()]


def defined(fmt: Format, x: Tensor) -> dict[Operation, Any]:
    """Return what arithmetic.py says of each operation."""
    above = arithmetic.tensor_scale(x, fmt)
    codes, scale = arithmetic.quantize(x, above, fmt)
    return {
        "fake_quantize": bits(arithmetic.fake_quantize(x, above, fmt)),
        "quantize": [bits(pack(codes, fmt.element.bits)), bits(scale)],
        "dequantize": bits(arithmetic.dequantize(codes, scale, above, fmt, x.dtype)),
        "saturates": bits(arithmetic.saturates(x, above, fmt)),
    }


def computed(
    backend: Backend, fmt: Format, x: Tensor, operations: tuple[Operation, ...] | None = None
) -> dict[Operation, Any]:
    """Return what a backend makes of each operation, or of these, that it claims."""
    above = arithmetic.tensor_scale(x, fmt)
    codes, scale = arithmetic.quantize(x, above, fmt)
    data = pack(codes, fmt.element.bits)
    acts: dict[Operation, Callable[[], Any]] = {
        "fake_quantize": lambda: bits(backend.fake_quantize(x, above, fmt)),
        "quantize": lambda: [*map(bits, backend.quantize(x, above, fmt))],
        "dequantize": lambda: bits(backend.dequantize(data, scale, above, fmt, x.shape[-1], x.dtype)),
        "saturates": lambda: bits(backend.saturates(x, above, fmt)),
    }
    wanted = OPERATIONS if operations is None else operations
    return {name: acts[name]() for name in wanted if backend.supports(fmt, x.dtype, "cpu", name)}


def assert_all_agree(formats: list[Format], claimed_by: set[str]) -> None:
    """Compare each backend with arithmetic.py; torch.compile, which takes seconds, in the codes of one format."""
    claims = set()
    for place, (fmt, dtype) in enumerate(zip(formats, cycle(DTYPES), strict=False)):
        x = values(dtype=dtype)
        expected = defined(fmt, x)
        for backend in choosing.BACKENDS:
            if backend.name == "compile" and place:
                continue
            only: tuple[Operation, ...] | None = ("quantize",) if backend.name == "compile" else None
            for operation, found in computed(backend, fmt, x, only).items():
                assert found == expected[operation], (backend.name, operation, fmt.name, dtype)
                claims.add(backend.name)
    assert claims == claimed_by


def made_of(**axes: list[Any]) -> list[Format]:
    """Return formats that have each of these values, and of the other fields those of mxfp4, or some of each kind."""
    others: dict[str, Sequence[Any]] = {
        "element": ["e2m1"],
        "block": [NONE, 7, 32, [16, 16]],
        "scale": scales_with_rules(),
        "tensor_scale": ["none", "tensor", "row"],
        "rounding": ["nearest", "stochastic"],
        "four_over_six": [False],
    }
    found: list[Format] = covering({**others, **axes}, 1)
    return found


@pytest.fixture
def e3m1(monkeypatch: pytest.MonkeyPatch) -> FloatElement:
    """An element of five bits, entered where elements are entered, for one test."""
    monkeypatch.setitem(ELEMENTS, E3M1.name, E3M1)
    return E3M1


# Entries of registries


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports
def test_an_element_is_entered_in_one_place_and_all_backends_agree(e3m1: FloatElement) -> None:
    formats = made_of(element=[e3m1.name])
    assert {fmt.scale and fmt.scale.name for fmt in formats} == {None, *SCALES}
    assert_all_agree(formats, {"native", "compile", "eager"})


@pytest.mark.parametrize(
    "element",
    [
        FloatElement("e2m0", 2, 0),
        IntegerElement("int3", 3),
        FloatElement("e4m1", 4, 1, special="nan"),
        IntegerElement("int7/2", 7, fraction=2),
        FloatElement("e5m1", 5, 1, special="ieee"),
        IntegerElement("int2", 2),
    ],
    ids=lambda one: one.name,
)
def test_elements_of_every_width_agree(element: FloatElement | IntegerElement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELEMENTS, element.name, element)
    fmt = (MXFP4 if element.bits % 2 else NVFP4).with_fields("mine", element=element.name)
    x = values(dtype=DTYPES[element.bits % 3])
    for backend in (native.NATIVE, EAGER):
        assert computed(backend, fmt, x) == defined(fmt, x), backend.name


def test_the_widths_from_two_to_eight_bits_have_all_been_tried(e3m1: FloatElement) -> None:
    tried = {2, 3, 5, 6, 7, 8} | {element.bits for element in ELEMENTS.values()}
    assert tried == set(range(2, 9))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_rule_of_powers_is_entered_in_one_place_and_all_backends_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "geometric", PowerRule("geometric", lambda element: 0x4AFB0C))  # up from √2 · 2^k
    formats = made_of(element=["e2m1", "int8/64"], scale=[("e8m0", "geometric")])
    assert_all_agree(formats, {"native", "compile", "eager"})
    amax = torch.tensor([[1.41, *[0.0] * 31], [1.42, *[0.0] * 31]])
    scale = formats[0].with_fields("mine", element="e2m1", block=32, scale_rule="geometric").quantize(amax).scale
    assert scale is not None
    assert scale.flatten().tolist() == [125, 126]


@dataclass(frozen=True)
class Above128th(ScaleRule):
    """Round amax / max up to the next value of a wide scale that is a multiple of a 128th of its power of two."""

    def fits(self, scale: Any) -> bool:
        return isinstance(scale, WideScale)

    def find(self, amax: Tensor, element: Any, scale: Any) -> Tensor:
        up: Tensor = ((amax / element.max).view(torch.int32) + 0xFFFF).bitwise_and(-1 << 16).view(torch.float32)
        return up


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_rule_of_a_kind_that_native_code_does_not_know_runs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "up", Above128th("up"))
    formats = made_of(element=["int4"], scale=[("bf16", "up"), ("fp32", "up")], tensor_scale=["none"])
    assert_all_agree(formats, {"compile", "eager"})
    x = values()
    for fmt in formats:
        assert kernels.kind_for(x, fmt) == "eager"
        assert bits(fmt.fake_quantize(x)) == defined(fmt, x)["fake_quantize"]
        assert not fmt.saturates(x[4:]).any()


class Odd(FloatElement):
    """An element that says that it rounds as others, and does not."""

    def round_(self, x: Tensor) -> Tensor:
        return super().round_(x).neg_()


@dataclass(frozen=True)
class Doubled(PowerRule):
    """A rule of powers that finds others."""

    def find(self, amax: Tensor, element: Any, scale: Any) -> Tensor:
        return super().find(amax, element, scale) * 2


def test_kinds_derived_from_those_that_native_code_knows_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELEMENTS, "odd", Odd("odd", 2, 1))
    monkeypatch.setitem(RULES, "double", Doubled("double", lambda element: 0))
    monkeypatch.setitem(SCALES, "fp16", WideScale("fp16", torch.float16))
    x = torch.tensor([[1.0, 6.0, *[0.5] * 30]])
    for fmt, expected in (
        (MXFP4.with_fields("mine", element="odd"), [-1.0, -6.0]),
        (MXFP4.with_fields("mine", scale_rule="double"), [1.0, 6.0]),
        (get_format("int4_b32").with_fields("mine", scale="fp16"), [0.8569, 6.0]),
    ):
        assert kernels.kind_for(x, fmt) == "eager"
        torch.testing.assert_close(fmt.fake_quantize(x)[0, :2].tolist(), expected, rtol=1e-3, atol=0)


def test_a_field_that_native_code_was_not_told_of_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FIELDS", native._FIELDS - {"four_over_six"})  # as if it were a new one
    fmt = NVFP4.with_fields("mine", four_over_six=True)
    assert not native.NATIVE.supports(fmt, torch.float32, "cpu", "quantize")
    assert native.NATIVE.supports(NVFP4, torch.float32, "cpu", "quantize")
    assert native.library(fmt.with_fields("mine", block=9), torch.float32) is None


def test_recipes_and_their_schema_have_the_words_of_the_registries(
    e3m1: FloatElement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "geometric", PowerRule("geometric", lambda element: 0x4AFB0C))
    fields = FormatSpec.model_json_schema()["properties"]
    assert fields["element"]["enum"] == [*ELEMENTS]
    assert fields["scale"]["enum"] == [*SCALES, "none"]
    assert fields["scale_rule"]["enum"] == [*RULES, "none"]
    assert {"e3m1", "geometric"} <= {*fields["element"]["enum"], *fields["scale_rule"]["enum"]}
    with pytest.raises(FormatError) as caught:
        MXFP4.with_fields("mine", scale_rule="geometri")
    assert str(caught.value) == "no scale rule 'geometri'; did you mean 'geometric'?"


def test_a_name_that_is_entered_again_means_what_it_means_now(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[1.0, 7.0, *[0.3] * 30]])
    found = []
    specials: tuple[Literal["none", "nan"], ...] = ("none", "nan")
    for special in specials:
        monkeypatch.setitem(ELEMENTS, "e2m2", FloatElement("e2m2", 2, 2, special=special))
        fmt = MXFP4.with_fields("mine", element="e2m2")
        assert Format.from_key("mine", fmt.key) == fmt
        compiled = torch.compile(fmt.fake_quantize, backend="aot_eager", fullgraph=True)
        torch._dynamo.reset()
        assert bits(compiled(x)) == bits(fmt.fake_quantize(x)) == defined(fmt, x)["fake_quantize"]
        found.append(fmt.fake_quantize(x)[0, 1].item())
    assert found == [7.0, 6.0]


def test_what_is_not_entered_is_no_part_of_a_format() -> None:
    with pytest.raises(FormatError) as caught:
        Format("mine", FloatElement("e4m3", 4, 3), 32, SCALES["e8m0"], "floor")
    assert str(caught.value) == (
        "element 'e4m3' is not the one that ELEMENTS has under this name: enter it there, where checkpoints and "
        "compiled models look it up"
    )


def test_a_scale_must_be_able_to_say_that_a_block_has_none() -> None:
    with pytest.raises(FormatError) as caught:
        ElementScale(E2M1)
    assert str(caught.value) == "element e2m1 has no NaN: as a scale it could not say that a block is one"


def test_a_rule_of_powers_adds_to_a_mantissa_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "wide", PowerRule("wide", lambda element: 1 << 23))
    with pytest.raises(FormatError) as caught:
        MXFP4.with_fields("mine", scale_rule="wide")
    assert str(caught.value) == (
        "scale rule 'wide' adds 8388608 for element e2m1; expected -8388607 to 8388607, the bits of a mantissa"
    )


# A layer's training step


@pytest.mark.parametrize("saved_inputs", get_args(SavedInputs))
def test_a_layer_of_five_bits_trains(e3m1: FloatElement, saved_inputs: Any) -> None:
    fmt = MXFP4.with_fields("mine", element=e3m1.name)
    torch.manual_seed(0)
    linear = nn.Linear(72, 40)
    qw = fmt.fake_quantize(linear.weight.detach())
    QuantLinear.wrap(linear, Quantization(fmt, fmt, saved_inputs=saved_inputs))
    x, grad = torch.randn(9, 72, requires_grad=True), torch.randn(9, 40)
    qx = fmt.fake_quantize(x.detach())
    y = linear(x)
    y.backward(grad)
    assert linear.weight.grad is not None
    assert torch.equal(y, nn.functional.linear(qx, qw, linear.bias))
    assert torch.equal(linear.weight.grad, grad.T @ qx)
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ qw)


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_model_of_five_bits_is_saved_and_read_again(
    e3m1: FloatElement, storage: str, small_model: Callable[..., Any], tmp_path: Any
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nstorage: {storage}\nformats:\n  mine: {{like: mxfp4, element: e3m1}}\n"
        "rules:\n  - {target: [layers], weight: mine, input: mine}\n"
    )
    model = qsurgeon.apply(str(recipe), small_model())
    ids = torch.arange(12)[None]
    model.save_pretrained(tmp_path / "saved")
    again = qsurgeon.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


# Which one runs


class Narrow(Eager):
    """A backend of four and eight bits: for others it has no answer, and says so."""

    name = "narrow"

    def __init__(self) -> None:
        self.ran: list[str] = []

    def supports(self, fields: Fields, dtype: torch.dtype, device: str, operation: Operation) -> bool:
        return fields.element.bits in (4, 8) and operation != "saturates"

    def fake_quantize(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        assert self.supports(fields, rows.dtype, rows.device.type, "fake_quantize")
        self.ran.append(fields.name)
        return super().fake_quantize(rows, above, fields)

    def saturates(self, rows: Tensor, above: Above, fields: Fields) -> Tensor:
        raise AssertionError("it does not claim this")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Narrow:
    """A backend that is asked first, for one test."""
    backend = Narrow()
    monkeypatch.setattr(choosing, "BACKENDS", [backend, *choosing.BACKENDS])
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    return backend


def test_what_a_backend_does_not_support_runs_by_another(narrow: Narrow, e3m1: FloatElement) -> None:
    x = values()
    for element in ("e2m1", "e2m3", "e4m3", e3m1.name):
        fmt = MXFP4.with_fields(element, element=element)
        assert bits(fmt.fake_quantize(x)) == defined(fmt, x)["fake_quantize"]
        assert bits(fmt.saturates(x)) == defined(fmt, x)["saturates"]
    assert narrow.ran == ["e2m1", "e4m3"]


def test_a_backend_is_chosen_by_its_name(narrow: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    x = values()
    for word, kind in (("narrow", "narrow"), ("eager", "eager"), ("native", "native"), ("", "narrow")):
        monkeypatch.setenv(kernels.VARIABLE, word)
        assert kernels.kind_for(x, MXFP4) == kind
    monkeypatch.setenv(kernels.VARIABLE, "narow")
    with pytest.raises(FormatError) as caught:
        kernels.kind_for(x, MXFP4)
    assert str(caught.value) == "QSURGEON_KERNELS is 'narow'; did you mean 'narrow'?"


def test_a_choice_is_made_once_for_each_format_dtype_and_operation(
    narrow: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    supports = narrow.supports

    def ask(*given: Any) -> bool:
        asked.append(given)
        return supports(*given)

    monkeypatch.setattr(narrow, "supports", ask)
    for _, dtype in product(range(3), DTYPES):
        MXFP4.quantize(values(dtype=dtype))
        get_format("int8").quantize(values(dtype=dtype))
    assert len(asked) == 2 * len(DTYPES)


def test_what_no_backend_supports_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "BACKENDS", [Narrow()])
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    with pytest.raises(FormatError) as caught:
        get_format("mxfp6_e2m3").quantize(values())
    assert str(caught.value) == "no backend computes quantize of format 'mxfp6_e2m3' in torch.float32 on cpu"


def test_every_backend_answers_for_every_operation_of_the_catalogue() -> None:
    for backend, fmt, dtype, operation in product(choosing.BACKENDS, CATALOG.values(), DTYPES, OPERATIONS):
        assert backend.supports(fmt, dtype, "cpu", operation) is True, (backend.name, fmt.name)
    assert not native.NATIVE.supports(MXFP4, torch.float64, "cpu", "quantize")
    assert not native.NATIVE.supports(MXFP4, torch.float32, "cuda", "quantize")


# A product of codes


def coded(fmt: Format, x: Tensor) -> Coded:
    data, scale, above = kernels.quantize(x, fmt)
    return Coded(data, scale, above, fmt, x.shape[-1])


class Multiplies(Narrow):
    """A backend that multiplies codes of four bits: here by looking up the products of two codes."""

    def supports_product(self, input: Fields | None, weight: Fields, dtype: torch.dtype, device: str) -> bool:
        return input is not None and input.element.bits == weight.element.bits == 4

    def product(self, input: Tensor | Coded, weight: Coded, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        assert isinstance(input, Coded)
        if len(input.data) == 1:
            return None  # too little for it
        self.ran.append("product")
        one, other = (unpack(each.data, 4, each.length).long() for each in (input, weight))
        numbers = [torch.tensor(each.fields.element.values) for each in (input, weight)]
        table = numbers[0][:, None] * numbers[1]
        scales = [_spread(each) for each in (input, weight)]
        sums = (table[one[:, None], other] * scales[0][:, None] * scales[1]).sum(-1)
        return (sums if bias is None else sums + bias).to(dtype)


def _spread(one: Coded) -> Tensor:
    assert one.scale is not None
    assert one.fields.scale is not None
    scale = one.fields.scale.decode(one.scale).repeat_interleave(one.fields.block_shape[1], -1)[:, : one.length]
    return scale if one.above is None else scale * one.above


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("names", [("mxfp4", "mxfp4"), ("nvfp4", "mxfp4"), (None, "mxfp4"), ("mxfp4", "mxfp6_e2m3")])
def test_a_product_of_codes_runs_where_a_backend_claims_it(
    names: tuple[str | None, str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Multiplies()
    monkeypatch.setattr(choosing, "BACKENDS", [backend, *choosing.BACKENDS])
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    x, w, bias = torch.randn(rows, 64), torch.randn(9, 64), torch.randn(9)
    fmt, weight = names[0] and get_format(names[0]).as_input, get_format(names[1]).as_weight
    found = kernels.product(coded(fmt, x) if fmt else x, coded(weight, w), bias, torch.float32)
    expected = (fmt.fake_quantize(x) if fmt else x).double() @ weight.fake_quantize(w).double().T + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert ("product" in backend.ran) == (names[0] is not None and names[1] == "mxfp4" and rows > 1)


def test_a_backend_that_claims_no_product_says_so_when_asked() -> None:
    weight = coded(MXFP4, torch.ones(2, 32))
    assert not EAGER.supports_product(None, MXFP4, torch.float32, "cpu")
    with pytest.raises(NotImplementedError) as caught:
        EAGER.product(torch.ones(1, 32), weight, None, torch.float32)
    assert str(caught.value) == "backend eager multiplies no codes"


def test_an_integer_of_four_bits_is_not_an_element_of_e2m1() -> None:
    assert MXFP4.kernel_key != MXFP4.with_fields("mine", element=INT4.name).kernel_key
