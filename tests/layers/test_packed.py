import copy
import gc
import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qsurgeon.errors import CheckpointError, FormatError, GradientError, NothingWrappedError, ShapeError, SurgeryError
from qsurgeon.formats import CATALOG, Quantized, get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, disabled, packed_layers
from qsurgeon.layers.codes import plain
from qsurgeon.layers.quantization import AS_IT_IS
from qsurgeon.storage.packed import stored_bytes, stored_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MX = get_format("mxfp4")
NV = get_format("nvfp4")
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
OWN = {
    "tiles": MX.with_fields("tiles", block=[16, 16]),
    "rotated": NV.with_fields("rotated", hadamard=16, seed=3),
    "random": MX.with_fields("random", rounding="stochastic", seed=5),
    "static": NV.with_fields("static", tensor_scale="static", static_scale=0.01),
    "one number": NV.with_fields(
        "one number", block="none", scale="none", scale_rule="none", tensor_scale="static", static_scale=0.01
    ),
}
FORMATS = {**CATALOG, **OWN}


def linear(inputs: int = 40, outputs: int = 24, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs, bias, dtype=dtype)


def both(how: Quantization, **fields: Any) -> tuple[QuantLinear, PackedLinear]:
    """Return a layer with a master weight, and one with the same weight packed."""
    layers = linear(**fields), linear(**fields)
    QuantLinear.wrap(layers[0], how)
    PackedLinear.wrap(layers[1], how)
    master, packed = layers
    assert isinstance(master, QuantLinear)
    assert isinstance(packed, PackedLinear)
    master.weight.requires_grad_(False)
    return master, packed


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what a layer makes of ``x``, and the gradients of the input and of the bias."""
    x = x.clone().requires_grad_()
    y: Tensor = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(grad)
    bias: Any = layer.bias
    return y.detach(), x.grad, bias.grad if isinstance(bias, Tensor) else None


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return all(
        (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one, other))
        for one, other in zip(found, expected, strict=True)
    )


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).mul(2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_it_computes_what_the_master_weight_computes_to_the_bit(name: str, dtype: torch.dtype) -> None:
    weight = FORMATS[name]
    inputs = 48 if weight.hadamard else 41  # which no block divides
    for input in (None, weight if not weight.is_two_dimensional else MX):
        master, packed = both(Quantization(weight, input), inputs=inputs, dtype=dtype)
        x = data(3, 5, inputs, dtype=dtype)
        expected = run(master, x)
        assert expected[1] is not None
        assert expected[1].abs().max() > 0
        assert same(run(packed, x), expected)
        with torch.no_grad():
            assert torch.equal(packed(x), master(x))


@pytest.mark.parametrize("gradient", ["ste", "clipped", "none"])
def test_each_gradient_of_the_input_is_the_masters(gradient: Any) -> None:
    even = NV.with_fields("even", tensor_scale="static", static_scale=1e-4)  # small enough to saturate
    master, packed = both(Quantization(NV, even, gradient))
    x = data(7, 40)
    expected = run(master, x)
    assert same(run(packed, x), expected)
    if gradient == "clipped":
        assert expected[1] is not None
        assert (expected[1] == 0).any()
        assert (expected[1] != 0).any()


def test_it_is_an_ordinary_linear_from_outside() -> None:
    layer = linear()
    bias = layer.bias
    PackedLinear.wrap(layer, Quantization(NV, None))
    assert isinstance(layer, QuantLinear)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (40, 24)
    assert layer.bias is bias
    shapes = {name: tuple(one.shape) for name, one in layer.named_parameters() if name != "bias"}
    assert shapes == stored_shapes(NV.as_weight, 24, 40)
    assert {(plain(one).dtype, one.requires_grad) for name, one in layer.named_parameters() if name != "bias"} == {
        (torch.uint8, False)
    }
    assert list(layer.buffers()) == []
    assert str(layer) == (
        "PackedLinear(in_features=40, out_features=24, bias=True, weight=nvfp4, input=-, gradient=ste, storage=packed)"
    )
    assert AS_IT_IS in str(layer)


def test_what_it_holds_is_what_the_layout_says() -> None:
    _, packed = both(Quantization(NV, None))
    assert sum(one.numel() for one in packed.stored.values()) == stored_bytes(NV.as_weight, 24, 40)
    expected = NV.as_weight.quantize(linear().weight.detach())
    assert torch.equal(packed.stored["weight"], expected.data)
    assert torch.equal(packed.opened(), expected.dequantize())
    assert packed.opened(torch.bfloat16).dtype == torch.bfloat16


def test_a_rotation_is_packed_too_so_that_nothing_is_turned_back() -> None:
    how = Quantization(OWN["rotated"], None)
    _, packed = both(how, inputs=48)
    assert how.rotation is not None
    turned = how.rotation(linear(inputs=48).weight.detach())
    assert torch.equal(packed.opened(torch.float32), OWN["rotated"].as_weight.without_rotation.fake_quantize(turned))


def test_repacking_takes_other_codes_in_place() -> None:
    _, packed = both(Quantization(NV, None))
    before, values = packed.stored["weight"], data(24, 40)
    packed.repack(values)
    assert packed.stored["weight"] is before
    assert torch.equal(packed.opened(), NV.as_weight.fake_quantize(values))
    with pytest.raises(ShapeError, match=re.escape("a weight is (24, 40), got (24, 39)")):
        packed.repack(data(24, 39))


# --- dtypes


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda one: one.to(torch.float64)])
def test_a_cast_changes_the_dtype_it_computes_in_and_no_code(cast: Callable[[nn.Module], nn.Module]) -> None:
    _, packed = both(Quantization(NV, NV))
    before = {name: one.clone() for name, one in packed.stored.items()}
    cast(packed)
    assert packed.compute_dtype == packed.bias.dtype != torch.float32
    assert all(torch.equal(one, before[name]) for name, one in packed.stored.items())
    assert packed(data(2, 40, dtype=packed.compute_dtype)).dtype == packed.compute_dtype
    assert copy.deepcopy(packed).compute_dtype == packed.compute_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_computes_what_the_master_does(dtype: torch.dtype) -> None:
    master, packed = both(Quantization(NV, MX))
    x = data(3, 40, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = run(master, x), run(packed, x)
    assert found[0].dtype == torch.bfloat16
    assert same(found, expected)


def test_an_input_of_another_dtype_than_the_model_decides() -> None:
    _, packed = both(Quantization(NV, None))
    x = data(3, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = nn.functional.linear(x, packed.opened(torch.bfloat16), packed.bias.bfloat16())
        assert torch.equal(packed(x), expected)


def test_an_input_that_was_cast_to_bytes_is_refused() -> None:
    _, packed = both(Quantization(NV, None))
    with pytest.raises(ShapeError) as caught:
        packed(data(2, 40).to(torch.uint8))
    assert str(caught.value) == (
        "a packed layer was called with torch.uint8; expected floating point. Its codes are torch.uint8; cast an "
        "input to the layer's compute_dtype"
    )


def test_an_input_of_another_length_is_refused_also_where_its_codes_take_as_many_bytes() -> None:
    _, packed = both(Quantization(NV, None))
    with pytest.raises(ShapeError, match=r"^the input has 39 values a row; expected 40$"):
        packed(data(2, 39))


# --- what it refuses


def test_a_layer_that_cannot_be_packed_is_left_alone() -> None:
    static = NV.with_fields("static", tensor_scale="static")
    with pytest.raises(FormatError) as caught:
        PackedLinear.wrap(layer := linear(), Quantization(static, None))
    assert str(caught.value) == (
        "format 'static' has a static tensor scale and no number for it: a weight that is packed cannot wait for one"
    )
    assert type(layer) is nn.Linear
    with pytest.raises(FormatError, match=r"^a weight without a format cannot be packed$"):
        PackedLinear.wrap(linear(), Quantization(None, NV))
    with pytest.raises(SurgeryError, match=r"^a packed weight is rounded in every phase, not in rollout only$"):
        PackedLinear.wrap(linear(), Quantization(NV, None, phases="rollout"))


def test_an_offloaded_weight_is_refused() -> None:
    import accelerate

    layer = linear()
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    with pytest.raises(SurgeryError, match=r"^its weight is offloaded, and its values are not here to be packed$"):
        PackedLinear.wrap(layer, Quantization(NV, None))


def test_a_sharded_weight_is_refused() -> None:
    layer = linear()
    vars(layer.weight)["device_mesh"] = object()  # as a DTensor has one
    with pytest.raises(SurgeryError, match=r"^its weight is sharded; pack the model before fully_shard$"):
        PackedLinear.wrap(layer, Quantization(NV, None))


def test_there_is_no_full_precision_to_return_to() -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    PackedLinear.wrap(model[0], Quantization(NV, None))
    with pytest.raises(SurgeryError) as caught, disabled(model):
        pass
    assert str(caught.value) == (
        "1 weights of Sequential are packed, such as that of 0: their full precision is gone. Load the checkpoint that "
        "they were packed from as a teacher or reference, or use storage: master"
    )
    with (
        pytest.raises(NothingWrappedError, match=r"^no module of Sequential is wrapped"),
        disabled(nn.Sequential(linear())),
    ):
        pass


def test_a_state_dict_of_values_is_not_taken_for_codes() -> None:
    _, packed = both(Quantization(NV, None))
    state = {**packed.state_dict(), "weight_scale": torch.ones(24, 4)}
    with pytest.raises(CheckpointError, match=r"^weight_scale is torch\.float32; a packed weight is torch\.uint8$"):
        packed.load_state_dict(state)
    fresh = both(Quantization(NV, None))[1]
    fresh.repack(data(24, 40))
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh.opened(), packed.opened())


def test_its_gradient_is_no_function_of_anything() -> None:
    _, packed = both(Quantization(NV, None))
    x = data(2, 40).requires_grad_()
    (grad,) = torch.autograd.grad(packed(x).sum(), x, create_graph=False)
    assert grad.shape == x.shape
    with pytest.raises(GradientError, match="cannot be differentiated again"):
        torch.autograd.grad(packed(x).sum(), x, create_graph=True)
    with pytest.raises(GradientError, match=r"cannot be transformed by torch\.func"):
        torch.func.vmap(packed)(data(2, 3, 40))


# --- memory


class Chain(nn.Module):
    """Layers of several sizes, each with an adapter beside it."""

    def __init__(self, sizes: tuple[int, ...] = (64, 192, 128, 64, 256, 64)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.layers = nn.ModuleList(linear(one, other) for one, other in pairs)
        self.adapters = nn.ModuleList(nn.Sequential(linear(a, 2, False), linear(2, b, False)) for a, b in pairs)
        for layer in self.layers:
            PackedLinear.wrap(layer, Quantization(NV, MX))
            layer.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            x = torch.tanh(layer(x) + adapter(x))
        return x


def weight_sizes(model: Chain) -> dict[tuple[int, ...], int]:
    sizes = [(layer.out_features, layer.in_features) for layer in model.layers if isinstance(layer, nn.Linear)]
    return {(outputs, inputs): outputs * inputs for outputs, inputs in sizes}


class Live(TorchDispatchMode):
    """Counts the values of tensors of some shapes that are alive at once, and the most that there were."""

    def __init__(self, sizes: dict[tuple[int, ...], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes, self.now, self.most, self.seen = sizes, 0, 0, 0
        self._known: set[int] = set()

    def take(self, one: Tensor) -> None:
        size = self.sizes.get(tuple(one.shape), 0)
        storage = one.untyped_storage()
        if not size or not one.is_floating_point() or storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now, self.seen = self.now + size, self.seen + 1
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.take(one)
        return out


def test_no_more_than_one_weight_is_open_at_a_time() -> None:
    model, x = Chain(), data(7, 64)
    sizes = weight_sizes(model)
    model(x).sum().backward()
    with Live(sizes) as live:
        model(x).sum().backward()
    gc.collect()
    assert live.seen >= 2 * len(model.layers) - 1  # forward, and backward but for the first layer, whose input is given
    assert live.most == max(sizes.values())


@COMPILES
def test_compiled_it_opens_one_at_a_time_too_and_keeps_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSURGEON_KERNELS", "eager")  # compiled code reads codes without the method counted below
    model, x = Chain(), data(7, 64)
    sizes = weight_sizes(model)
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True)
    compiled(x).sum().backward()
    model.zero_grad()
    live, kept = Live(sizes), []
    open_ = Quantized.dequantize

    def counted(self: Quantized) -> Tensor:
        values = open_(self)
        live.take(values)
        return values

    monkeypatch.setattr(Quantized, "dequantize", counted)

    def keep(one: Tensor) -> Tensor:
        kept.append((tuple(one.shape), one.dtype))
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        y = compiled(x)
    y.sum().backward()
    assert live.seen >= 2 * len(model.layers) - 1
    assert live.most == max(sizes.values())
    assert any(dtype == torch.uint8 for _, dtype in kept)
    assert [one for one in kept if one[0] in sizes or one[0][::-1] in sizes if one[1].is_floating_point] == []
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@COMPILES
def test_one_layer_compiled_is_the_layer_to_the_bit() -> None:
    for how in (Quantization(NV, MX), Quantization(MX, None, "clipped"), Quantization(OWN["rotated"], OWN["rotated"])):
        _, packed = both(how, inputs=48)
        expected = run(packed, x := data(3, 48))
        packed.zero_grad()
        compiled: Any = torch.compile(packed, fullgraph=True)
        assert same(run(compiled, x), expected)


def test_backward_keeps_the_codes_of_the_weight_and_nothing_of_the_input() -> None:
    _, packed = both(Quantization(NV, NV))
    kept: list[Tensor] = []

    def keep(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        packed(data(5, 40).requires_grad_())
    assert [id(one) for one in kept] == [id(one) for one in packed.stored.values()]


def test_a_packed_weight_takes_less_than_0_30_of_bfloat16() -> None:
    for name in ("mxfp4", "nvfp4"):
        assert stored_bytes(get_format(name).as_weight, 256, 256) < 0.30 * 2 * 256 * 256


def test_packing_keeps_no_weight() -> None:
    layer = linear(256, 256, bias=False)
    before = weakref.ref(layer.weight)
    PackedLinear.wrap(layer, Quantization(NV, None))
    gc.collect()
    assert before() is None
    assert len(packed_layers(nn.Sequential(layer))) == 1


def test_of_a_weight_on_the_meta_device_the_shapes_are_packed() -> None:
    with torch.device("meta"):
        layer = nn.Linear(40, 24)
    PackedLinear.wrap(layer, Quantization(NV, None))
    assert {one.device.type for one in layer.parameters()} == {"meta"}
    assert {name: tuple(one.shape) for name, one in layer.named_parameters() if name != "bias"} == stored_shapes(
        NV.as_weight, 24, 40
    )


@pytest.mark.parametrize("name", ["mxfp4", "tiles", "rotated", "by row", "int8"])
def test_some_rows_open_as_they_do_among_all(name: str) -> None:
    own = {"by row": NV.with_fields("by row", tensor_scale="row")}
    weight = {**FORMATS, **own}[name]
    _, packed = both(Quantization(weight, None), inputs=48, outputs=40)
    for rows in ([0, 1], [39], [*range(16, 40)]):
        if weight.is_two_dimensional and len(rows) < 16:
            continue
        assert torch.equal(packed.opened_rows(rows), packed.opened()[rows])
