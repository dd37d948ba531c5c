"""Every implementation gives the same bits; which one runs, what it costs, and what happens without a compiler."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from variants import CASES, DTYPES

from qsurgeon.errors import FormatError
from qsurgeon.formats import CATALOG, Format, Quantized, get_format, kernels
from qsurgeon.formats.kernels import choosing, compiled, native, operand
from qsurgeon.formats.packing import pack
from qsurgeon.layers import Quantization, QuantLinear

MXFP4, NVFP4 = get_format("mxfp4"), get_format("nvfp4").as_weight
ROTATED = NVFP4.with_fields("hadamard", hadamard=16, seed=3)

each_case = pytest.mark.parametrize(("fmt", "dtype"), CASES, ids=lambda one: getattr(one, "name", str(one)))


def bits(x: Tensor) -> Tensor:
    """Return the bits of ``x``, the sign of a zero included, and one pattern for every NaN."""
    if not x.is_floating_point():
        return x
    return torch.where(x.isnan(), torch.nan, x).view({2: torch.int16, 4: torch.int32}[x.element_size()])


def wild(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return values of many magnitudes, with rows of zeros, of NaN, of infinity, of tiny and of huge values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * 3)
    rows = x.view(-1, shape[-1])
    for place, change in enumerate((0.0, 1e-30, 2.0**-120, 1e-45, 1e30, 3e38)):
        if place + 1 < len(rows):
            rows[place + 1] *= change
    if len(rows) > 10:
        rows[8, shape[-1] // 2], rows[9, -1], rows[10, 0] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


def both(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> tuple[Any, Any]:
    monkeypatch.setenv(kernels.VARIABLE, "native")
    compiled = act()
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    return compiled, act()


# The same bits


@each_case
def test_compiled_and_eager_agree_to_the_bit(fmt: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((64, 512), (16, 304), (3, 17, 48), (1, 9008), (80,)):
        x = wild(shape, dtype)
        compiled, eager = both(monkeypatch, partial(fmt.fake_quantize, x))
        assert torch.equal(bits(compiled), bits(eager))
        compiled, eager = both(monkeypatch, partial(fmt.quantize, x))
        assert torch.equal(compiled.data, eager.data)
        assert (compiled.scale is None) == (eager.scale is None)
        if compiled.scale is not None:
            torch.testing.assert_close(compiled.scale, eager.scale, rtol=0, atol=0, equal_nan=True)
        compiled, eager = both(monkeypatch, eager.dequantize)
        assert torch.equal(bits(compiled), bits(eager))


@each_case
def test_every_number_of_a_dtype_is_rounded_alike(
    fmt: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = patterns.view(dtype) if dtype != torch.float32 else (patterns.to(torch.int32) << 16 | 0x5A5A).view(dtype)
    x = x[x.isfinite()][:65024].view(-1, 64)[:, torch.arange(64) * 37 % 64]
    compiled, eager = both(monkeypatch, lambda: fmt.fake_quantize(x))
    assert torch.equal(bits(compiled), bits(eager))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [*CATALOG.values()], ids=attrgetter("name"))
def test_every_code_of_elements_and_scales_has_its_value(
    fmt: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Codes that no rounding gives are among them: infinity, NaN, an integer's most negative.
    codes = torch.arange(2**fmt.element.bits, dtype=torch.uint8).repeat(256, 8)
    height, width = fmt.block_shape
    scale = None
    if fmt.scale is not None:
        every = torch.arange(256, dtype=torch.uint8)
        if fmt.scale.bits > 8:
            every = (every.double() / 100 + 1e-3).to(fmt.scale.dtype)
        scale = every[:: height or 1, None].expand(-1, -(-codes.shape[-1] // width)).contiguous()
    above = torch.tensor(0.5) if fmt.tensor_scale != "none" else None
    quantized = Quantized(pack(codes, fmt.element.bits), scale, above, fmt, dtype, codes.shape[-1])
    compiled, eager = both(monkeypatch, quantized.dequantize)
    assert torch.equal(bits(compiled), bits(eager))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    seed=st.integers(0, 9),
)
def test_they_agree_at_one_to_a_hundred_columns(
    case: tuple[Format, torch.dtype], rows: int, columns: int, seed: int
) -> None:
    fmt, dtype = case
    x = wild((rows, columns if not fmt.hadamard else fmt.hadamard), dtype, seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        compiled, eager = both(monkeypatch, lambda: (fmt.fake_quantize(x), fmt.quantize(x).dequantize()))
    assert torch.equal(bits(compiled[0]), bits(eager[0]))
    assert torch.equal(bits(compiled[1]), bits(compiled[0]))
    assert torch.equal(bits(eager[1]), bits(eager[0]))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVFP4.as_input.with_fields("row", tensor_scale="row")], ids=str)
def test_the_number_of_threads_changes_no_bit(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    x = wild((256, 1000), torch.bfloat16)
    before = torch.get_num_threads()
    one = fmt.fake_quantize(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(bits(fmt.fake_quantize(x)), bits(one))
    assert before >= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports
@pytest.mark.parametrize(
    "fmt",
    [MXFP4, NVFP4.as_input.with_fields("row", tensor_scale="row"), get_format("mxfp6_e2m3")],
    ids=attrgetter("name"),
)
def test_torch_compile_of_the_same_operations_agrees_and_serves_all_shapes_with_one_graph(
    fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_of(x: Tensor) -> list[Any]:
        codes = fmt.quantize(x)
        return [fmt.fake_quantize(x), codes.data, codes.scale, codes.tensor_scale, codes.dequantize()]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for shape in ((3, 64), (17, 128), (2, 32, 32), (128, 256)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(torch.bfloat16)
        monkeypatch.setenv(kernels.VARIABLE, "eager")
        eager = all_of(x)
        monkeypatch.setenv(kernels.VARIABLE, "compile")
        for one, other in zip(all_of(x), eager, strict=True):
            assert one is other is None or (one.shape == other.shape and torch.equal(bits(one), bits(other)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_many_formats_in_one_process_compile_to_one_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setenv(kernels.VARIABLE, "compile")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compiled._kernel.cache_clear()
    x = torch.randn(8, 128)
    formats = {fmt.as_weight.key: fmt.as_weight for fmt in CATALOG.values()}.values()
    for place, fmt in enumerate(formats, 1):
        rounded, codes = fmt.fake_quantize(x), fmt.quantize(x)
        assert torch.equal(bits(rounded), bits(codes.dequantize()))
        assert counter.frame_count == 3 * place, fmt.name
    compiled._kernel.cache_clear()


@pytest.mark.parametrize("fmt", [NVFP4, ROTATED, get_format("int8")], ids=attrgetter("name"))
def test_a_compiled_model_sees_one_operator_with_the_same_bits(fmt: Format) -> None:
    x = wild((4, 96), torch.float32)
    run = torch.compile(lambda x: fmt.fake_quantize(x) * 1.0, fullgraph=True, backend="aot_eager")
    assert torch.equal(bits(run(x)), bits(fmt.fake_quantize(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces an autograd.Function
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, ROTATED], ids=attrgetter("name"))
def test_a_layer_compiles_to_one_graph_with_the_same_values_and_gradients(fmt: Format) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    QuantLinear.wrap(layer, Quantization(fmt, fmt))
    x = torch.randn(5, 64, requires_grad=True)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = run(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CATALOG)
def test_a_layer_compiles_before_it_ever_ran(name: str) -> None:
    torch._dynamo.reset()
    fresh = get_format(name).with_fields("fresh")
    layer = torch.nn.Linear(64, 48)
    QuantLinear.wrap(layer, Quantization(fresh, None if fresh.is_two_dimensional else fresh))
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_symbolic_shapes_compile_too() -> None:
    torch._dynamo.reset()
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    for place in (0, 2):
        QuantLinear.wrap(layers[place], Quantization(get_format("nvfp4"), get_format("nvfp4")))
    x = torch.randn(5, 64, requires_grad=True)
    y = torch.compile(layers, dynamic=True, backend="aot_eager")(x)
    y.sum().backward()
    assert torch.equal(y, layers(x))
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "through",
    [
        pytest.param(lambda act: torch.jit.trace(act, torch.ones(4, 64), check_trace=False), id="jit-trace"),
        pytest.param(lambda act: make_fx(lambda x: act(x), tracing_mode="real")(torch.ones(4, 64)), id="make-fx"),  # noqa: PLW0108  # make_fx counts its parameters
        pytest.param(torch.func.functionalize, id="functionalize"),
    ],
)
def test_a_tracer_is_never_shown_memory(through: Callable[[Callable[[Tensor], Tensor]], Any]) -> None:
    x = torch.randn(4, 64)
    assert torch.equal(through(MXFP4.fake_quantize)(x), MXFP4.fake_quantize(x))


def test_tensors_that_are_lazily_negative_or_zero_are_what_they_say() -> None:
    x = torch.randn(4, 64)
    negative = torch._neg_view(x)
    assert torch.equal(MXFP4.fake_quantize(negative), -MXFP4.fake_quantize(x))
    assert torch.equal(MXFP4.quantize(negative).dequantize(), -MXFP4.fake_quantize(x))
    assert torch.equal(MXFP4.fake_quantize(torch._efficientzerotensor((4, 64))), torch.zeros(4, 64))


# Which one runs


def test_a_word_that_names_no_implementation_is_an_error_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "nativ")
    with pytest.raises(FormatError) as caught:
        MXFP4.fake_quantize(torch.ones(32))
    assert str(caught.value) == "QSURGEON_KERNELS is 'nativ'; did you mean 'native'?"


def test_what_native_code_cannot_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.kind_for(torch.ones(2, 32), MXFP4) == "native"
    assert kernels.kind_for(torch.nn.Parameter(torch.ones(2, 32)), MXFP4) == "native"
    assert kernels.kind_for(torch.ones(2, 32, dtype=torch.float64), MXFP4) == "eager"
    assert kernels.kind_for(torch.ones(2, 32, device="meta"), MXFP4) == "eager"
    assert kernels.kind_for(torch.ones(2, 32).as_subclass(Own), MXFP4) == "eager"


class Own(Tensor):
    """A tensor whose memory may be anywhere."""


def test_a_meta_tensor_has_the_shape_and_no_values() -> None:
    rounded = NVFP4.fake_quantize(torch.empty(3, 64, dtype=torch.bfloat16, device="meta"))
    assert (rounded.shape, rounded.dtype, rounded.device.type) == ((3, 64), torch.bfloat16, "meta")


# One compilation


def test_a_format_is_compiled_once_for_each_dtype_whatever_the_shapes(
    make_qwen2: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qsurgeon

    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(operand, "_calls", {})
    monkeypatch.setattr(choosing, "_chosen", {})
    model = qsurgeon.apply("w4a4-nvfp4", make_qwen2(num_hidden_layers=28, tie_word_embeddings=False))
    ids = torch.arange(24).view(2, 12)
    for length in (12, 7, 3):
        model(input_ids=ids[:, :length], labels=ids[:, :length]).loss.backward()
    assert qsurgeon.inspect(model).wrapped == 28 * 7
    assert native.compiled() == 1  # weights and inputs, per tensor and per row, are one kernel


def run(code: str, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


ROUND = """
import torch
from qsurgeon.formats import get_format, kernels
x = torch.tensor([0.3, -2.6, 5.0, 0.0] * 8)
for name in ("mxfp4", "mxfp8"):
    print(get_format(name).fake_quantize(x)[:4].tolist(), kernels.kind_for(x, get_format(name)))
"""
VALUES = "[0.5, -3.0, 4.0, 0.0] {kind}\n[0.3125, -2.5, 5.0, 0.0] {kind}\n"


def test_the_first_use_says_what_it_waits_for_and_the_next_process_finds_it(tmp_path: Path) -> None:
    environment = {"QSURGEON_CACHE": str(tmp_path / "cache"), kernels.VARIABLE: ""}
    out, err = run(ROUND, **environment)
    assert out == VALUES.format(kind="native")
    assert err.splitlines() == [
        f"qsurgeon: compiling the CPU kernel of {name}, float32: some seconds, once; kept in {tmp_path / 'cache'}"
        for name in ("mxfp4", "mxfp8")
    ]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2
    assert run(ROUND, **environment) == (VALUES.format(kind="native"), "")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/bin/false"], ids=["none", "broken"])
def test_a_machine_without_a_compiler_computes_the_same_and_says_so_once(compiler: str, tmp_path: Path) -> None:
    out, err = run(ROUND, QSURGEON_CACHE=str(tmp_path), CXX=compiler, **{kernels.VARIABLE: ""})
    assert out == VALUES.format(kind="eager")
    (line,) = err.splitlines()
    start = "qsurgeon: the CPU kernels cannot be compiled, so that slower torch operations compute the same values: "
    assert line.startswith(start)
    reason = line.removeprefix(start)
    assert reason == (
        "no C++ compiler is there (no-such-compiler)"
        if compiler == "no-such-compiler"
        else reason.split(" returned")[0] + " returned non-zero exit status 1."
    )


def test_where_torch_compile_fails_it_says_so_once_and_computes_the_same(tmp_path: Path) -> None:
    environment = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), kernels.VARIABLE: "compile"}
    out, err = run(ROUND.replace("* 8)", "* 16)"), **environment)
    assert out == VALUES.format(kind="compile")
    said = [line for line in err.splitlines() if line.startswith("qsurgeon: ")]
    assert len(said) == 1
    start = "qsurgeon: torch.compile fails here, so that slower torch operations compute the same values: "
    assert said[0].startswith(start)


def test_modules_with_static_scales_of_their_own_share_what_is_compiled() -> None:
    one, other = (NVFP4.with_fields("mine", tensor_scale="static", static_scale=number) for number in (0.1, 0.2))
    assert one.without_number.key == other.without_number.key
    assert one.kernel_key == other.kernel_key


def test_a_cache_that_cannot_be_written_is_said_once_and_nothing_is_lost(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    out, err = run(ROUND, QSURGEON_CACHE=str(in_the_way / "cache"), **{kernels.VARIABLE: ""})
    assert out == VALUES.format(kind="eager")
    assert len(err.splitlines()) == 1
    assert "Not a directory" in err


@pytest.mark.parametrize("length", [0, 1000, -100])
def test_a_kernel_that_was_cut_short_is_compiled_anew(length: int, tmp_path: Path) -> None:
    environment = {"QSURGEON_CACHE": str(tmp_path), kernels.VARIABLE: ""}
    run(ROUND, **environment)
    for file in tmp_path.glob("*.so"):
        file.write_bytes(file.read_bytes()[:length])
    out, err = run(ROUND, **environment)
    assert out == VALUES.format(kind="native")
    assert len(err.splitlines()) == 2


def test_a_checksum_that_is_no_text_is_written_anew(tmp_path: Path) -> None:
    environment = {"QSURGEON_CACHE": str(tmp_path), kernels.VARIABLE: ""}
    run(ROUND, **environment)
    for file in tmp_path.glob("*.sha256"):
        file.write_bytes(b"\xff\xfe\x80")
    assert run(ROUND, **environment)[0] == VALUES.format(kind="native")


def test_a_compiler_may_be_a_command_of_several_words(tmp_path: Path) -> None:
    out, _ = run(ROUND, QSURGEON_CACHE=str(tmp_path), CXX="env g++", **{kernels.VARIABLE: ""})
    assert out == VALUES.format(kind="native")


def test_a_compiler_that_hangs_is_given_up(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho error: still thinking >&2\nexec sleep infinity\n")
    slow.chmod(0o755)
    hurried = "from qsurgeon.formats.kernels import native\nnative._COMPILE_SECONDS = 0.5\n" + ROUND
    out, err = run(hurried, QSURGEON_CACHE=str(tmp_path), CXX=str(slow), **{kernels.VARIABLE: ""})
    assert out == VALUES.format(kind="eager")
    said = "error: still thinking", "timed out after 0.5 seconds"  # where it had no time to say anything
    assert err.splitlines()[-1].endswith(said)
    assert "compute the same values: " in err.splitlines()[-1]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QSURGEON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="Set QSURGEON_CACHE to a folder that can be written"):
        native.cache_folder()


def test_constants_are_written_exactly() -> None:
    assert native._float(0.1) == "0x1.999999999999ap-4f"
    with pytest.raises(ValueError, match="no constant for inf"):
        native._float(float("inf"))


# Memory


def peak_bytes(act: Callable[[], object]) -> int:
    """Return how many bytes more were allocated at a time while ``act`` ran."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as told:
        act()
    events = [event for event in told.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("shape", [(256, 256), (64, 9000), (2048, 1024), (1, 2**20), (8, 3, 5000)], ids=str)
@pytest.mark.parametrize(
    "fmt",
    [MXFP4, NVFP4, NVFP4.as_input, get_format("int8"), NVFP4.with_fields("16x16", block=[16, 16])],
    ids=attrgetter("name"),
)
def test_without_a_compiler_it_takes_at_most_six_bytes_a_value(
    fmt: Format, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    x = torch.randn(shape).to(torch.bfloat16)
    fmt.fake_quantize(x)
    assert peak_bytes(lambda: fmt.fake_quantize(x)) <= (2 + 6) * x.numel()  # the result itself is two


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, get_format("mxfp8")], ids=attrgetter("name"))
def test_compiled_it_takes_the_result_and_a_few_scales(fmt: Format) -> None:
    x = torch.randn(512, 4096).to(torch.bfloat16)
    fmt.fake_quantize(x)
    assert peak_bytes(lambda: fmt.fake_quantize(x)) <= 2 * x.numel() + 4096
