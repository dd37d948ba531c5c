"""An operation is done as a whole or not at all, whatever stops it."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import qsurgeon
from qsurgeon.errors import SurgeryError
from qsurgeon.layers import PackedLinear, QuantLinear, packed_layers, quant_layers
from qsurgeon.layers import packed as packing
from qsurgeon.recipe import Recipe
from qsurgeon.surgery import uninterrupted

Maker = Callable[..., Any]

RULES = [
    {"target": ["mlp"], "weight": "mxfp4", "input": "mxfp4"},
    {"target": ["self_attn"], "input": "mxfp4"},
]
LAYERS = 6 + 8


@pytest.fixture(autouse=True)
def heard_as_usual() -> Iterator[None]:
    """A program that a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model(make_qwen2: Maker) -> Any:
    return make_qwen2(num_hidden_layers=2)


def recipe(storage: str, **fields: Any) -> Recipe:
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": RULES, **fields})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def untouched(model: Any, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return (
        quant_layers(model) == {}
        and getattr(model.config, "quantization_config", None) is None
        and after.keys() == before.keys()
        and all(torch.equal(value, before[name]) for name, value in after.items())
        and {type(one.weight) for one in model.modules() if type(one) is nn.Linear} == {nn.Parameter}
    )


def whole(model: Any) -> bool:
    return (
        len(quant_layers(model)) == LAYERS
        and len(packed_layers(model)) == 6
        and model.config.quantization_config.record.storage == "packed"
    )


WRONG = {
    torch.float8_e4m3fn: "expected float32, bfloat16, float16 or float64",
    torch.float8_e5m2: "expected float32, bfloat16, float16 or float64",
    torch.int8: "expected float32, bfloat16, float16 or float64",
    torch.uint8: "expected float32, bfloat16, float16 or float64",
    torch.int32: "expected float32, bfloat16, float16 or float64",
    torch.complex64: "expected float32, bfloat16, float16 or float64",
}


@pytest.mark.parametrize("storage", ["master", "packed"])
@pytest.mark.parametrize("dtype", WRONG, ids=str)
@pytest.mark.parametrize("path", ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"])
def test_a_weight_of_a_dtype_that_cannot_be_rounded_is_found_before_anything_is_changed(
    model: Any, storage: str, dtype: torch.dtype, path: str
) -> None:
    last = model.get_submodule(path)
    last.weight = nn.Parameter(last.weight.detach().to(dtype), requires_grad=False)
    before = state(model)
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply(recipe(storage), model)
    assert str(caught.value).startswith(f"{path} cannot be wrapped: ")
    assert str(caught.value).endswith(f"{dtype}; {WRONG[dtype]}")
    assert untouched(model, before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "how",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda one: prune.l1_unstructured(one, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_a_weight_that_a_hook_computes_is_not_packed_and_master_rounds_what_it_computes(
    how: Callable[[nn.Module], Any],
) -> None:
    fields: Any = {"version": 1, "rules": [{"target": ["**"], "weight": "mxfp4", "input": "mxfp4"}]}
    model = nn.Sequential(nn.Linear(32, 16))
    how(model[0])
    keys = list(model.state_dict())
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply(Recipe.model_validate({**fields, "storage": "packed"}), model)
    assert str(caught.value) == (
        "0 cannot be wrapped: its weight is not a parameter: a hook computes it before each call (weight_norm, "
        "spectral_norm or prune of torch.nn.utils). Make it permanent with remove_weight_norm, remove_spectral_norm or "
        "prune.remove, and pack it then"
    )
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == keys
    qsurgeon.apply(Recipe.model_validate(fields), model)
    x = torch.linspace(-1, 1, 64).reshape(2, 32).requires_grad_()
    model.eval()(x).sum().backward()
    mxfp4 = qsurgeon.get_format("mxfp4")
    with torch.no_grad():
        expected = nn.functional.linear(mxfp4.fake_quantize(x), mxfp4.fake_quantize(model[0].weight), model[0].bias)
    assert torch.equal(model(x), expected)


# --- what stops it on the way


class Stop:
    """Raises ``error`` at the calls of a function that ``when`` names, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], when: set[int]) -> None:
        self.calls = itertools.count()
        pack = packing.pack

        def stopping(weight: Tensor, how: Any) -> Any:
            if weight.shape[0] and next(self.calls) in when:  # without rows it is but a check
                raise error()
            return pack(weight, how)

        monkeypatch.setattr(packing, "pack", stopping)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "Ctrl-C": KeyboardInterrupt,
    "exit": SystemExit,
    "memory": lambda: torch.OutOfMemoryError("no memory"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_stops_the_first_weight_leaves_all_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = state(model)
    Stop(monkeypatch, ERRORS[name], {0})
    with pytest.raises(type(ERRORS[name]())):
        qsurgeon.apply(recipe("packed"), model)
    assert untouched(model, before)
    monkeypatch.undo()
    assert whole(qsurgeon.apply(recipe("packed"), model))


@pytest.mark.parametrize("place", range(1, 6))
@pytest.mark.parametrize("name", ["Ctrl-C", "exit"])
def test_an_interruption_of_another_waits_until_all_are_packed(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str, place: int
) -> None:
    Stop(monkeypatch, ERRORS[name], {place})
    with pytest.raises(type(ERRORS[name]())):
        qsurgeon.apply(recipe("packed"), model)
    assert whole(model)


def test_memory_that_is_missing_for_a_moment_is_waited_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Stop(monkeypatch, ERRORS["memory"], {1, 3})
    assert whole(qsurgeon.apply(recipe("packed"), model))


def test_what_cannot_be_gone_on_with_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Stop(monkeypatch, ERRORS["memory"], {3, 6})
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply(recipe("packed"), model)
    assert str(caught.value) == (
        "model.layers.1.mlp.gate_proj could not be packed, after 5 other weights were: OutOfMemoryError: no memory. "
        "The model is half packed, and cannot be used: load it again"
    )
    with pytest.raises(SurgeryError, match="already; apply"):
        qsurgeon.apply(recipe("packed"), model)


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_signal_at_any_point_leaves_it_whole_or_untouched(
    make_qwen2: Maker, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    """Send the signal at each call of what wraps, and of what is done after the last."""
    handler = signal.getsignal(signal.SIGINT)
    for place in range(LAYERS):
        model, calls = make_qwen2(num_hidden_layers=2), itertools.count()
        wrap = QuantLinear.wrap.__func__  # type: ignore[attr-defined]

        def interrupted(
            cls: Any, linear: nn.Module, how: Any, name: str, wrap: Any = wrap, calls: Any = calls, at: int = place
        ) -> None:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            wrap(cls, linear, how, name)

        with monkeypatch.context() as patched:
            patched.setattr(QuantLinear, "wrap", classmethod(interrupted))
            with pytest.raises(KeyboardInterrupt):
                qsurgeon.apply(recipe(storage), model)
        assert len(quant_layers(model)) == LAYERS
        assert model.config.quantization_config.record.storage == storage
        assert signal.getsignal(signal.SIGINT) is handler


def test_untying_that_lacks_memory_leaves_all_as_it_was(make_qwen2: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_qwen2(num_hidden_layers=1, tie_word_embeddings=True)
    before, clone = state(model), Tensor.clone

    def failing(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.shape == model.lm_head.weight.shape:
            raise torch.OutOfMemoryError("no memory")
        return clone(self, *args, **kwargs)

    rules = [{"target": ["**"], "weight": "mxfp4"}]
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "clone", failing)
        with pytest.raises(torch.OutOfMemoryError):
            qsurgeon.apply(recipe("master", rules=rules, untie=True), model)
    assert quant_layers(model) == {}
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the block itself


def test_an_interruption_is_said_at_once_and_raised_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012  # what comes after it is the point
        for _ in range(2):
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
        done = True
    assert done
    assert capsys.readouterr().err == (
        "qsurgeon: interrupted; the model is changed as a whole first, since packed weights have no way back\n"
    )


def test_another_thread_has_no_signals_to_wait_with() -> None:
    seen: list[Any] = []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_who_ignores_the_signal_is_not_told_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert capsys.readouterr().err == ""


def test_an_error_in_the_block_comes_through() -> None:
    with pytest.raises(ValueError, match="mine"), uninterrupted():
        raise ValueError("mine")
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_codes_on_one_device_and_scales_on_another_are_refused() -> None:
    how = qsurgeon.layers.Quantization(qsurgeon.get_format("mxfp4"), None)
    here = nn.Linear(64, 64)
    PackedLinear.wrap(here, how)
    partial = {name: one for name, one in here.state_dict().items() if name != "weight_scale"}
    there = nn.Linear(64, 64, device="meta")
    PackedLinear.wrap(there, how)
    there.load_state_dict(partial, strict=False, assign=True)
    with pytest.raises(qsurgeon.errors.ShapeError) as caught:
        there(torch.randn(2, 64))
    assert str(caught.value) == (
        "the parts of a quantized tensor lie on different devices, {'codes': 'cpu', 'scale': 'meta'}: one was not "
        "loaded, or not moved"
    )
