"""Compiled whole, by block, by layer: as many graphs as nn.Linear has, and the numbers of an eager model."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig

import qsurgeon
from qsurgeon.formats import Format, get_format
from qsurgeon.formats.kernels import operations
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear
from qsurgeon.recipe import load_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it imports its compiler
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # and while it traces
]

Make = Callable[..., Any]
MXFP4, NVFP4, FP8 = (get_format(name) for name in ("mxfp4", "nvfp4", "fp8_e4m3"))
ROTATED = MXFP4.with_fields("rotated", hadamard=32, seed=7)
TOKENS = torch.arange(1, 9)[None]
LAYERS = 10  # more than dynamo compiles one piece of code for


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.down(self.up(x).relu_())
        return x + added


def blocks(kind: type[QuantLinear] | None, how: Callable[[int], Quantization]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS)))
    for number, block in enumerate(model):
        assert isinstance(block, Block)
        for layer in (block.up, block.down):
            if kind is not None:
                kind.wrap(layer, how(number))
    return model


def static(format: Format, number: int) -> Format:
    return format.with_fields("static", tensor_scale="static", static_scale=0.01 * (1 + number))


WAYS: dict[str, Callable[[int], Quantization]] = {
    "mxfp4": lambda _: Quantization(MXFP4, MXFP4),
    "weight": lambda _: Quantization(MXFP4, None),
    "clipped": lambda _: Quantization(MXFP4, MXFP4, "clipped"),
    "rotated": lambda _: Quantization(ROTATED, ROTATED),
    "training": lambda _: Quantization(MXFP4, MXFP4, phases="training"),
    "static": lambda number: Quantization(static(NVFP4, number), static(NVFP4, number + 3), "clipped"),
    "static without blocks": lambda number: Quantization(static(FP8, number), static(FP8, number + 3)),
}


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(one.grad for one in model.parameters())]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all((a is None) == (b is None) for a, b in pairs) and all(
        torch.equal(a, b) for a, b in pairs if a is not None and b is not None
    )


def compiled_each(modules: Iterable[nn.Module], through: str) -> Any:
    """Compile each module in place; return what counts the graphs."""
    backend = CompileCounterWithBackend(through)
    for module in modules:
        module.compile(backend=backend, fullgraph=True)
    return backend


@pytest.mark.parametrize("name", WAYS)
def test_alike_blocks_share_a_graph_as_those_of_nn_linear_do(name: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    plain = blocks(None, WAYS[name])
    limit = compiled_each(plain, "eager")
    step(plain, x)
    for kind in (QuantLinear, PackedLinear):
        if kind is PackedLinear and name == "training":
            continue  # a packed weight is rounded in every phase
        torch.compiler.reset()
        expected, model = step(blocks(kind, WAYS[name]), x), blocks(kind, WAYS[name])
        backend = compiled_each(model, "aot_eager" if name.startswith("static") else "eager")
        assert same(step(model, x), expected), kind
        assert 0 < backend.frame_count <= limit.frame_count, kind


@pytest.mark.parametrize("name", ["clipped", "static"])
def test_so_they_do_where_a_gpu_sees_the_operations_of_a_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "is_opaque", lambda rows: False)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected, model = step(blocks(QuantLinear, WAYS[name]), x), blocks(QuantLinear, WAYS[name])
    backend = compiled_each(model, "eager")
    assert same(step(model, x), expected)
    assert backend.frame_count == 1


@pytest.mark.parametrize("name", ["mxfp4", "static"])
def test_layers_that_are_compiled_one_by_one_share_a_graph_for_each_shape(name: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for kind in (QuantLinear, PackedLinear):
        torch.compiler.reset()
        expected, model = step(blocks(kind, WAYS[name]), x), blocks(kind, WAYS[name])
        backend = compiled_each((layer for block in model for layer in block.children()), "eager")
        assert same(step(model, x), expected), kind
        assert backend.frame_count == 2, kind


def test_without_gradients_and_inside_disabled_they_share_one_too() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    model, expected = (blocks(QuantLinear, WAYS["static"]) for _ in range(2))
    backend = compiled_each(model, "eager")
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
        assert backend.frame_count == 1
        assert torch.equal(model(x), expected(x))
    assert backend.frame_count == 1


@pytest.mark.parametrize("order", ["static, static", "none, static", "static, none"])
def test_models_with_other_static_scales_are_compiled_one_after_the_other(order: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for number, word in enumerate(order.split(", ")):
        how = Quantization(NVFP4, static(NVFP4, number) if word == "static" else NVFP4)
        model, expected = (blocks(QuantLinear, dict.fromkeys(range(LAYERS), how).__getitem__)[:1] for _ in range(2))
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert same(step(compiled, x), step(expected, x))


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_regions_of_a_model_are_compiled_once(storage: str, make_qwen2: Make) -> None:
    counts = []
    for recipe in (None, load_recipe("w4a4-nvfp4").model_copy(update={"storage": storage})):
        torch.compiler.reset()
        model, expected = (make_qwen2(num_hidden_layers=LAYERS, tie_word_embeddings=False) for _ in range(2))
        if recipe is not None:
            model, expected = (qsurgeon.apply(recipe, one) for one in (model, expected))
        backend = CompileCounterWithBackend("eager")
        regions = compile_regions(model, backend=backend)
        with torch.no_grad():
            assert torch.equal(regions(TOKENS, use_cache=False).logits, expected(TOKENS, use_cache=False).logits)
        counts.append(backend.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_generate_compiles_with_a_static_cache(storage: str, small_model: Make) -> None:
    model = qsurgeon.apply(load_recipe("w4a4-nvfp4").model_copy(update={"storage": storage}), small_model())
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(TOKENS, disable_compile=True, **options)
    counters.clear()
    config: Any = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # a CPU too
    assert torch.equal(model.generate(TOKENS, compile_config=config, **options), expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_inductor_gives_blocks_with_other_static_scales_their_own_numbers() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    how: Callable[[int], Quantization] = lambda number: Quantization(MXFP4, static(NVFP4, number))  # noqa: E731
    expected, model = step(blocks(QuantLinear, how), x), blocks(QuantLinear, how)
    backend = compiled_each(model, "inductor")
    found = step(model, x)
    assert backend.frame_count == 1
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.allclose(one, other, 1e-4, 1e-4)
