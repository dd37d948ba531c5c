"""Codes of packed weights: what moves bytes works, what would compute with them is refused by name."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils

from qsurgeon.errors import CodesError
from qsurgeon.formats import get_format
from qsurgeon.layers import PackedLinear, Quantization
from qsurgeon.layers.codes import Codes

NV = get_format("nvfp4")
NAME = "layers.3.proj"


def layer() -> PackedLinear:
    """Return a layer whose codes are square, so that no shape betrays what is turned around."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Linear(32, 16)
    PackedLinear.wrap(made, Quantization(NV, NV), NAME)
    assert isinstance(made, PackedLinear)
    return made


def stored(one: nn.Module) -> dict[str, Tensor]:
    assert isinstance(one, PackedLinear)
    return {name: codes.plain().detach().clone() for name, codes in one.stored.items() if isinstance(codes, Codes)}


def unchanged(one: nn.Module, before: dict[str, Tensor]) -> bool:
    after = stored(one)
    return after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


# --- what is refused


def operands(name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return arguments, some of which a method that is called ``name`` takes."""
    bytes_, numbers = torch.full((16, 16), 3, dtype=torch.uint8), torch.full((16, 16), 0.5)
    index = torch.arange(16).expand(16, 16).contiguous()
    mask = torch.ones(16, 16, dtype=torch.bool)
    return [
        ((), {}),
        ((2,), {}),
        ((0.5,), {}),
        ((numbers,), {}),
        ((bytes_,), {}),
        ((0, 1), {}),
        ((bytes_, 1), {}),
        ((numbers, 0.9), {}),
        ((bytes_, bytes_), {}),
        ((numbers, numbers), {}),
        ((0, index[0], bytes_), {}),
        ((0, index, bytes_), {}),
        ((0, index[0], 1), {}),
        ((0, index, bytes_, "sum"), {}),
        ((mask, 1), {}),
        ((mask, bytes_), {}),
        ((index, bytes_), {}),
        (((index[0], index[0]), bytes_[0]), {}),
        (((16, 16),), {}),
        (((16, 16), (16, 1)), {}),
        ((None,), {}),
        ((2, 0, 1.0), {}),
        (((16, 16), 2, 0), {}),
        ((lambda one: one,), {}),
        ((bytes_, lambda one, other: one), {}),
        ((bytes_, bytes_, lambda one, other, third: one), {}),
    ]


OPERATORS = {"__init__", "__init_subclass__", "__index__", "__int__", "__invert__", "__iter__"}
IN_PLACE = [
    name
    for name in dir(torch.Tensor)
    if callable(getattr(torch.Tensor, name))
    and re.search(r"^[^_].*[^_]_$|^t_$|^__i[a-z]+__$", name)
    and name not in OPERATORS
]
# Those that go through, since they change no byte; copy_ puts bytes in the place of bytes.
KEEP = {"copy_", "detach_", "requires_grad_", "share_memory_"}


def said(method: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return what a call raises; nothing if it goes through."""
    try:
        found = method(*args, **kwargs)
    except (CodesError, TypeError, RuntimeError, IndexError, ValueError, AttributeError) as error:
        return str(error)
    return "not implemented" if found is NotImplemented else ""


@pytest.mark.parametrize("name", IN_PLACE)
def test_no_method_in_place_makes_other_codes(name: str) -> None:
    one = layer()
    before, went, refused = stored(one), [], 0
    found: dict[str, list[Any]] = {
        "weight": [one.weight, one.weight.detach(), one.weight[:, :]],
        "weight_scale": [one.weight_scale.data],
    }
    for args, kwargs in operands(name):
        for key, codes in ((key, codes) for key, values in found.items() for codes in values):
            text = said(getattr(codes, name), *args, **kwargs)
            refused += text.startswith(f"{NAME}.{key} holds packed codes")
            went += [args] if not text else []
            if name == "copy_":
                one.load_state_dict({**before, "bias": one.bias})
            assert unchanged(one, before)
    assert refused or name in KEEP
    assert not went or name in KEEP


def test_there_are_methods_in_place_to_try() -> None:
    assert len(IN_PLACE) > 150
    assert {"mul_", "lerp_", "zero_", "normal_", "t_", "index_add_", "__iadd__"} <= set(IN_PLACE)


COMPUTES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda w: nn.functional.linear(torch.ones(2, 16), w),
    "matmul": lambda w: torch.ones(2, 16) @ w,
    "of a row": lambda w: torch.ones(2, 16) @ w[:, 0],
    "of its transpose": lambda w: torch.ones(2, 16).mm(w.t()),
    "of T": lambda w: torch.mm(torch.ones(2, 16), w.T),
    "mul": lambda w: 2 * w,
    "rsub": lambda w: 1 - w,
    "float": lambda w: w.float(),
    "to": lambda w: w.to(torch.bfloat16),
    "to another's": lambda w: w.to(torch.ones(2)),
    "type": lambda w: w.type("torch.FloatTensor"),
    "view": lambda w: w.view(torch.int32),
    "item": lambda w: w[0, 0].item(),
    "list": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy(),
    "sum": lambda w: w.sum(),
    "norm": torch.linalg.vector_norm,
    "svd": torch.linalg.svd,
    "einsum": lambda w: torch.einsum("ij,kj->ki", w, torch.ones(2, 16)),
    "greater": lambda w: w > 0,
    "equals a number": lambda w: w == 0,
    "foreach": lambda w: torch._foreach_mul([w, w], 0.9),
    "foreach in place": lambda w: torch._foreach_mul_([w], 2),
    "out": lambda w: torch.mul(torch.ones(16, 16, dtype=torch.uint8), 2, out=w),
    "into floats": lambda w: torch.ones(16, 16).copy_(w),
    "joined with floats": lambda w: torch.cat([w, torch.ones(1, 16)]),
    "an item": lambda w: w.__setitem__(0, 1),
    "from floats": lambda w: w.copy_(torch.ones(16, 16)),
    "its data": lambda w: setattr(w, "data", torch.ones(16, 16)),
    "a vector of parameters": lambda w: nn.utils.parameters_to_vector([w, torch.ones(2)]),
    "parameters of a vector": lambda w: nn.utils.vector_to_parameters(torch.ones(256), [w]),
    "zeros": nn.init.zeros_,
    "kaiming": nn.init.kaiming_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "trainable": lambda w: w.requires_grad_(),
    "trainable property": lambda w: setattr(w, "requires_grad", True),
    "trainable parameter": nn.Parameter,
    "embedding": lambda w: nn.functional.embedding(torch.tensor([1]), w),
}


@pytest.mark.parametrize("how", COMPUTES)
@pytest.mark.parametrize("value", [lambda w: w, torch.clone, Tensor.detach], ids=["itself", "clone", "detached"])
def test_arithmetic_is_refused_by_name(how: str, value: Callable[[Any], Any]) -> None:
    one = layer()
    before = stored(one)
    with pytest.raises(CodesError, match=f"^{re.escape(NAME)}.weight holds packed codes"):
        COMPUTES[how](value(one.weight))
    assert unchanged(one, before)


def test_the_refusal_says_what_to_do() -> None:
    one = layer()
    with pytest.raises(CodesError) as caught:
        one.weight.mul_(2)
    assert str(caught.value) == (
        "layers.3.proj.weight holds packed codes, not numbers, and 'mul_' would compute with them. The layer's "
        "opened() returns its values; train or average parameters with requires_grad alone, or use storage: master"
    )
    with pytest.raises(CodesError) as caught:
        one.requires_grad_(True)
    assert str(caught.value) == (
        "layers.3.proj.weight holds packed codes, which cannot be trained. Train an adapter on the layer, or use "
        "storage: master"
    )
    with pytest.raises(CodesError) as caught:
        one.weight = nn.Parameter(torch.ones(16, 32))
    assert str(caught.value) == "layers.3.proj.weight is to be torch.float32; packed codes are torch.uint8"


# --- torch.nn.utils


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


PRUNE: dict[str, Callable[[nn.Module], Any]] = {
    "identity": lambda one: prune.identity(one, "weight"),
    "random_unstructured": lambda one: prune.random_unstructured(one, "weight", 0.5),
    "l1_unstructured": lambda one: prune.l1_unstructured(one, "weight", 0.5),
    "random_structured": lambda one: prune.random_structured(one, "weight", 0.5, dim=0),
    "ln_structured": lambda one: prune.ln_structured(one, "weight", 0.5, n=2, dim=0),
    "global_unstructured": lambda one: prune.global_unstructured([(one, "weight")], prune.L1Unstructured, amount=0.5),
    "custom_from_mask": lambda one: prune.custom_from_mask(one, "weight", torch.ones(16, 16)),
}
UTILS: dict[str, Callable[[nn.Module], Any]] = {
    **PRUNE,
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "register_parametrization": lambda one: parametrize.register_parametrization(one, "weight", Double()),
    "register_parametrization of nothing": lambda one: parametrize.register_parametrization(
        one, "weight", nn.Identity()
    ),
    "register_parameter": lambda one: one.register_parameter("other", nn.Parameter(torch.ones(2))),
    "delattr": lambda one: delattr(one, "weight"),
}


def test_every_way_to_prune_is_tried() -> None:
    ways = {name for name, one in vars(prune).items() if getattr(one, "__module__", "") == prune.__name__}
    ways = {name for name in ways if name.islower() and not name.startswith("_")}
    assert ways == {*PRUNE, "is_pruned", "remove"}
    made = {name for name in vars(parametrizations) if name in parametrizations.__all__}
    assert {f"parametrizations.{name}" for name in made} - set(UTILS) == {"parametrizations.orthogonal"}


def test_the_orthogonal_parametrization_asks_for_a_float_and_changes_nothing() -> None:
    one = layer()
    before = stored(one)
    with pytest.raises(TypeError, match=r"finfo\(\) requires a floating point"):  # of the weight's dtype
        parametrizations.orthogonal(one)
    assert type(one) is PackedLinear
    assert unchanged(one, before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", UTILS)
def test_utilities_that_replace_the_weight_are_refused_and_leave_the_layer_as_it_was(how: str) -> None:
    one, x = layer(), torch.linspace(-1, 1, 64).reshape(2, 32)
    before, expected, keys = stored(one), one(x), list(one.state_dict())
    with pytest.raises(CodesError, match=f"^{re.escape(NAME)}.weight holds packed codes"):
        UTILS[how](one)
    assert type(one) is PackedLinear
    assert unchanged(one, before)
    assert list(one.state_dict()) == keys
    assert torch.equal(one(x), expected)
    assert not one._forward_pre_hooks


def test_a_parameter_of_another_name_is_refused() -> None:
    with pytest.raises(CodesError) as caught:
        layer().register_parameter("weight_orig", nn.Parameter(torch.ones(2)))
    assert str(caught.value) == (
        "layers.3.proj.weight holds packed codes, and a layer with packed codes takes no parameter 'weight_orig'. Use "
        "storage: master for a weight that is pruned, normalized or parametrized"
    )
    with pytest.raises(CodesError) as caught:
        del layer().weight_scale
    assert str(caught.value) == (
        "layers.3.proj.weight_scale holds packed codes, which nothing else can stand for. Use storage: master for a "
        "weight that is pruned, normalized or parametrized"
    )


# --- averages

AVERAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "multi ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "multi swa": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    "swa": {"avg_fn": swa_utils.get_swa_avg_fn()},
    "own": {"avg_fn": lambda averaged, new, count: averaged + (new - averaged) * 0.25},
}


def test_every_average_of_torch_is_tried() -> None:
    assert {name for name in dir(swa_utils) if name.startswith("get_")} == {
        "get_ema_avg_fn",
        "get_ema_multi_avg_fn",
        "get_swa_avg_fn",
        "get_swa_multi_avg_fn",
    }


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_keeps_the_codes_of_a_base_and_averages_what_is_trained(how: str, use_buffers: bool) -> None:
    model: Any = nn.Sequential(layer(), nn.Linear(16, 16))
    if how != "multi swa":  # which divides, and torch does not divide integers in place
        model.register_buffer("count", torch.tensor([7], dtype=torch.uint8))
    before = stored(model[0])
    averaged: Any = swa_utils.AveragedModel(model, use_buffers=use_buffers, **AVERAGES[how])
    for value in (1.0, 2.0, 4.0):
        nn.init.constant_(model[1].weight, value)
        averaged.update_parameters(model)
    assert unchanged(averaged.module[0], before)
    assert 1 < averaged.module[1].weight[0, 0] < 4
    assert torch.equal(averaged.module[0].opened(), model[0].opened())


@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_of_codes_that_differ_is_refused(how: str) -> None:
    one = layer()
    averaged: Any = swa_utils.AveragedModel(one, **AVERAGES[how])
    averaged.update_parameters(one)
    before = stored(averaged.module)
    one.repack(torch.linspace(-1, 1, 512).reshape(16, 32))
    with pytest.raises(CodesError) as caught:
        averaged.update_parameters(one)
    assert str(caught.value) == (
        "layers.3.proj.weight holds packed codes, which differ between the model and its average: codes cannot be "
        "averaged. Use storage: master"
    )
    assert unchanged(averaged.module, before)
    with pytest.raises(CodesError, match="'mul' would compute with them"):  # outside of an average
        _ = one.weight * 1


# --- what moves bytes


def through_torch_save(one: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(one, buffer)
    buffer.seek(0)
    made: nn.Module = torch.load(buffer, weights_only=False)
    return made


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "torch.save": through_torch_save,
    "to": lambda one: one.to("cpu"),
    "cast": lambda one: one.double(),
    "to_empty and load": lambda one: loaded(copy.deepcopy(one).to_empty(device="cpu"), one, False),
    "from meta": lambda one: loaded(copy.deepcopy(one).to("meta"), one, True),
    "load": lambda one: loaded(emptied(copy.deepcopy(one)), one, False),
    "assign": lambda one: loaded(emptied(copy.deepcopy(one)), one, True),
    "share": nn.Module.share_memory,
}


def loaded(one: nn.Module, other: nn.Module, assign: bool) -> nn.Module:
    state = {name: torch.clone(tensor) for name, tensor in other.state_dict().items()}
    one.load_state_dict(state, assign=assign)
    return one


def emptied(one: Any) -> nn.Module:
    one.repack(torch.zeros(16, 32))
    return one  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", MOVES)
def test_what_moves_bytes_keeps_them_and_keeps_them_codes(how: str) -> None:
    one, x = layer(), torch.linspace(-1, 1, 64).reshape(2, 32)
    before, expected = stored(one), one(x)
    moved = MOVES[how](one)
    assert isinstance(moved, PackedLinear)
    assert unchanged(moved, before)
    if how != "cast":
        assert torch.equal(moved(x), expected)
    for name, codes in moved.stored.items():
        assert type(codes) is Codes
        assert isinstance(codes, nn.Parameter)
        assert (codes.label, codes.requires_grad) == (f"{NAME}.{name}", False)


def test_a_state_dict_is_read_without_this_package(tmp_path: Any) -> None:
    one = layer()
    torch.save(one.state_dict(), tmp_path / "state.pt")
    save_file(one.state_dict(), tmp_path / "state.safetensors")
    for found in (torch.load(tmp_path / "state.pt", weights_only=True), load_file(tmp_path / "state.safetensors")):
        assert {type(tensor) for tensor in found.values()} == {Tensor}
        assert all(torch.equal(found[name], value) for name, value in stored(one).items())
        other = layer()
        other.repack(torch.zeros(16, 32))
        other.load_state_dict(found)
        assert unchanged(other, stored(one))


def test_pieces_are_codes_too_and_can_be_put_together() -> None:
    weight = layer().weight
    pieces = [*weight.split(4), *weight.chunk(2), weight.view(-1), weight[2:3], weight.t(), *weight.unbind()]
    assert {type(one) for one in pieces} == {Codes}
    assert torch.equal(torch.cat(weight.split(4)), weight)
    assert torch.stack([weight, weight]).shape == (2, 16, 16)
    taken = torch.empty(16, 16, dtype=torch.uint8)
    taken.copy_(weight)
    taken[:4] = weight[4:8]
    assert type(taken) is Tensor
    assert bool((weight == weight.clone()).all())


def test_codes_say_what_they_are() -> None:
    weight = layer().weight
    assert repr(weight).startswith("Parameter containing:")
    assert weight.numel() == 256
    assert len({weight, weight}) == 1
    assert weight.is_contiguous()
    assert not weight.is_floating_point()
