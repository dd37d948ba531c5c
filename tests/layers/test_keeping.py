"""Rounded weights that are kept while something generates: never one of a weight that is another by now."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import UsageError
from qsurgeon.formats import get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, generation, product, quant_layers
from qsurgeon.layers.phases.state import current
from qsurgeon.layers.product import quantized_linear
from qsurgeon.recipe import Recipe, Rule

FORMAT = get_format("nvfp4")
CHANGED = (
    "the weight of layer changed while a generation ran, through .data, a fused optimizer or memory that torch does "
    "not watch, and tokens were computed with its values from before. Change weights between generations; "
    "qsurgeon.keep_at_most(0) rounds them at each call"
)
Rounded = list[int]


def layer_of(dtype: torch.dtype = torch.float32, size: int = 32, **said: Any) -> QuantLinear:
    torch.manual_seed(1)
    layer = nn.Linear(size, size, dtype=dtype)
    QuantLinear.wrap(layer, Quantization(FORMAT, FORMAT, **said), "layer")
    assert isinstance(layer, QuantLinear)
    return layer


def fresh(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what the layer computes where nothing is kept, of the weight that it has now."""
    other = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)  # type: ignore[arg-type]
    other.load_state_dict({name: value.detach().clone() for name, value in layer.state_dict().items()})
    QuantLinear.wrap(other, Quantization(FORMAT, FORMAT))
    found: list[Tensor] = []

    def compute() -> None:  # in a thread that is not inside
        with torch.no_grad():
            found.append(other(x))

    pool = threading.Thread(target=compute)
    pool.start()
    pool.join()
    return found[0]


def error_of(run: Callable[[], Any]) -> str:
    """Return what ``run`` says is wrong; nothing if it ends."""
    try:
        run()
    except UsageError as error:
        return str(error)
    return ""


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> Rounded:
    """The sizes of the weights that were rounded."""
    found: Rounded = []
    original = product.rounded_weight

    def counted(weight: Tensor, *args: Any) -> Tensor:
        found.append(weight.numel())
        return original(weight, *args)

    monkeypatch.setattr(product, "rounded_weight", counted)
    return found


@pytest.fixture(autouse=True)
def _limit_is_put_back() -> Iterator[None]:
    qsurgeon.keep_at_most(2**30)
    yield
    qsurgeon.keep_at_most(None)


# ---- ways to change a weight


def _optimize(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[QuantLinear, Tensor], None]:
    def change(layer: QuantLinear, other: Tensor) -> None:
        with torch.enable_grad():
            layer(torch.randn(3, layer.in_features, dtype=layer.weight.dtype)).square().sum().backward()
        make(list(layer.parameters())).step()

    return change


def _in_place(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.add_(other)


def _copied(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.copy_(other)


def _loaded(layer: QuantLinear, other: Tensor) -> None:
    layer.load_state_dict({"weight": other, "bias": layer.bias.clone()})


def _assigned(layer: QuantLinear, other: Tensor) -> None:
    layer.load_state_dict({"weight": other, "bias": layer.bias.clone()}, assign=True)


def _foreach(layer: QuantLinear, other: Tensor) -> None:
    torch._foreach_add_([layer.weight], [other])


def _one_element(layer: QuantLinear, other: Tensor) -> None:
    layer.weight[3, 4] = 1000


def _row_of_a_view(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.detach()[5].mul_(9)


def _replaced(layer: QuantLinear, other: Tensor) -> None:
    layer.weight = nn.Parameter(other)


def _data_swapped(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.data = other.clone()


def _cast(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.data = (layer.weight.data + other).to(torch.bfloat16)
    layer.bias.data = layer.bias.data.to(torch.bfloat16)


def _functional(layer: QuantLinear, other: Tensor) -> None:
    for name, value in {"weight": other}.items():
        layer._parameters[name] = nn.Parameter(value)


def _averaged(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.lerp_(other, 0.5)


def _set(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.set_(other.clone())


SEEN: dict[str, Callable[[QuantLinear, Tensor], None]] = {
    "add_": _in_place,
    "copy_": _copied,
    "load_state_dict": _loaded,
    "load_state_dict assign": _assigned,
    "foreach": _foreach,
    "an element": _one_element,
    "a row of a view": _row_of_a_view,
    "SGD": _optimize(lambda parameters: torch.optim.SGD(parameters, lr=1.0)),
    "AdamW": _optimize(lambda parameters: torch.optim.AdamW(parameters, lr=1.0)),
    "AdamW foreach": _optimize(lambda parameters: torch.optim.AdamW(parameters, lr=1.0, foreach=True)),
    "another Parameter": _replaced,
    "another Parameter, past setattr": _functional,
    "data swapped": _data_swapped,
    "data cast": _cast,
    "set_": _set,
    "average": _averaged,
}


def _data_added(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.data.add_(other)  # as an adapter is merged, and as engines take weights


def _data_assigned_in_place(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.data += other  # as peft merges


def _data_copied(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.data.copy_(other)


def _data_of_one_element(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.data[7, 7] = 50


def _rows_exchanged(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0))


def _numpy(layer: QuantLinear, other: Tensor) -> None:
    layer.weight.detach().numpy()[:] = other.numpy()


def _memory_again(layer: QuantLinear, other: Tensor) -> None:
    """As FSDP frees a whole weight and gathers it again, by chance in the same place."""
    storage = layer.weight.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    layer.weight.data.copy_(other)


UNSEEN: dict[str, Callable[[QuantLinear, Tensor], None]] = {
    "data add_": _data_added,
    "data +=": _data_assigned_in_place,
    "data copy_": _data_copied,
    "one value": _data_of_one_element,
    "rows exchanged": _rows_exchanged,
    "numpy": _numpy,
    "memory given back and filled": _memory_again,
    "SGD fused": _optimize(lambda parameters: torch.optim.SGD(parameters, lr=1.0, fused=True)),
    "AdamW fused": _optimize(lambda parameters: torch.optim.AdamW(parameters, lr=1.0, fused=True)),
}


@pytest.mark.parametrize("way", list(SEEN))
def test_a_change_that_torch_counts_is_seen_at_once(way: str) -> None:
    layer, x, other = layer_of(), torch.randn(2, 32), torch.randn(32, 32)
    with torch.no_grad(), qsurgeon.rounded_once():
        layer(x)
        before = layer(x)
        SEEN[way](layer, other)
        x = x.to(layer.weight.dtype)
        for _ in range(2):
            assert torch.equal(layer(x), fresh(layer, x))
            assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("way", list(UNSEEN))
def test_a_change_that_nothing_counts_is_an_error_or_is_seen(way: str) -> None:
    layer, x, other = layer_of(), torch.randn(2, 32), torch.randn(32, 32)
    found: list[bool] = []

    def run() -> None:
        with torch.no_grad(), qsurgeon.rounded_once():
            layer(x)
            layer(x)
            UNSEEN[way](layer, other)
            found.append(torch.equal(layer(x), fresh(layer, x)))

    error = error_of(run)
    assert (error, found) in ((CHANGED, [False]), ("", [True]))
    assert torch.equal(layer(x), fresh(layer, x))


@pytest.mark.parametrize("way", [*SEEN, *UNSEEN])
def test_between_two_generations_any_change_is_seen(way: str) -> None:
    layer, x, other = layer_of(), torch.randn(2, 32), torch.randn(32, 32)
    for _ in range(2):
        with torch.no_grad(), qsurgeon.rounded_once():
            layer(x)
            assert torch.equal(layer(x), fresh(layer, x))
        with torch.no_grad():
            (SEEN | UNSEEN)[way](layer, other.to(layer.weight.dtype))
        x = x.to(layer.weight.dtype)


def test_swapping_tensors_is_refused_by_torch_inside_and_works_outside() -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    with torch.no_grad(), qsurgeon.rounded_once():
        layer(x)
        with pytest.raises(RuntimeError, match="weakref"):
            torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(32, 32)))
    with torch.no_grad():
        torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(32, 32)))
        assert torch.equal(layer(x), fresh(layer, x))


def test_memory_that_is_gone_when_it_is_to_be_compared_is_said_and_not_kept_again(
    rounded: Rounded, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    kept, storage = layer.weight.detach().clone(), layer.weight.untyped_storage()
    with torch.no_grad(), qsurgeon.rounded_once():
        layer(x)
        layer(x)
        size = storage.size()
        storage.resize_(0)
    assert capsys.readouterr().err == (
        "qsurgeon: the weight of layer was freed while a generation ran, and could not be compared with what it was "
        "rounded from; it is rounded at each call from now on\n"
    )
    storage.resize_(size)
    layer.weight.data.copy_(kept)
    rounded.clear()
    with torch.no_grad(), qsurgeon.rounded_once():
        assert all(torch.equal(layer(x), fresh(layer, x)) for _ in range(3))
    assert len(rounded) == 2 * 3  # those of fresh, too


# ---- what is kept, and for how long


def test_a_weight_is_rounded_once_and_compared_once(rounded: Rounded) -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    with torch.no_grad():
        with qsurgeon.rounded_once():
            for _ in range(5):
                layer(x)
            assert len(rounded) == 1
        assert len(rounded) == 2
        layer(x)
        layer(x)
    assert len(rounded) == 4


def test_what_is_used_once_is_not_compared(rounded: Rounded) -> None:
    with torch.no_grad(), qsurgeon.rounded_once():
        layer_of()(torch.randn(2, 32))
    assert len(rounded) == 1


def test_rounded_weights_are_given_back_where_the_block_ends_or_breaks() -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    for breaks in (False, True):
        found: list[weakref.ref[Tensor]] = []
        with suppress(KeyboardInterrupt), torch.no_grad(), qsurgeon.rounded_once():
            layer(x)
            keeping = current().keeping
            assert keeping is not None
            assert keeping.size == 32 * 32 * 4
            found += [weakref.ref(one.values) for one in keeping._kept.values()]
            if breaks:
                raise KeyboardInterrupt
        gc.collect()
        assert [one() for one in found] == [None]
        assert keeping is not None
        assert (keeping.size, keeping.is_open) == (0, False)


def test_a_weight_that_is_gone_takes_its_rounded_values_along() -> None:
    """As accelerate brings a weight that is offloaded for one call, and lets it go."""
    layer, x = layer_of(), torch.randn(2, 32)
    with torch.no_grad(), qsurgeon.rounded_once():
        keeping = current().keeping
        assert keeping is not None
        for _ in range(3):
            layer.weight = nn.Parameter(torch.randn(32, 32))
            assert torch.equal(layer(x), fresh(layer, x))
            gc.collect()
            assert keeping.size == 32 * 32 * 4


def test_no_more_is_kept_than_is_allowed(rounded: Rounded) -> None:
    layers, x = [layer_of() for _ in range(3)], torch.randn(2, 32)

    def run() -> int:
        rounded.clear()
        for _ in range(4):
            for layer in layers:
                layer(x)
        return len(rounded)

    with torch.no_grad():
        for most, expected in ((2**30, 3), (2 * 4096, 2 + 4), (4095, 12), (0, 12)):
            with qsurgeon.rounded_once(most):
                assert run() == expected
            qsurgeon.keep_at_most(most)
            with generation():
                assert run() == expected
        qsurgeon.keep_at_most(None)
        with generation():
            assert run() == 3


def test_less_than_nothing_cannot_be_kept() -> None:
    with pytest.raises(UsageError) as caught:
        qsurgeon.keep_at_most(-1)
    assert str(caught.value) == "a generation cannot keep -1 bytes; expected 0 or more, or None"


def test_what_a_model_keeps_is_said() -> None:
    plain, wrapped, packed, shared = nn.Linear(32, 32), layer_of(), nn.Linear(32, 32), layer_of(torch.bfloat16)
    PackedLinear.wrap(packed, Quantization(FORMAT, FORMAT))
    inputs = nn.Linear(32, 32)
    QuantLinear.wrap(inputs, Quantization(None, FORMAT))
    other = layer_of(torch.bfloat16)
    other.weight = shared.weight
    assert qsurgeon.kept_bytes(nn.ModuleList([plain, wrapped, packed, shared, other, inputs])) == 32 * 32 * (4 + 2)


def test_nothing_of_it_is_copied_or_saved() -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    keys, attributes = list(layer.state_dict()), set(vars(layer))
    with torch.no_grad(), qsurgeon.rounded_once():
        layer(x)
        before = layer(x)
        for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            made.weight.add_(1.0)
            assert torch.equal(made(x), fresh(made, x))
        file = io.BytesIO()
        torch.save(layer, file)
        assert file.getbuffer().nbytes < 32 * 32 * 4 * 1.9 + 2**13
        assert (list(layer.state_dict()), set(vars(layer))) == (keys, attributes)
        assert vars(layer.weight) == {}
        assert torch.equal(layer(x), before)


def test_a_forward_pass_that_trains_keeps_nothing(rounded: Rounded) -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    with qsurgeon.rounded_once():
        keeping = current().keeping
        for _ in range(2):
            layer(x).sum().backward()
        assert keeping is not None
        assert keeping.size == 0
    assert rounded == []  # its own way of rounding


def test_weights_of_inference_mode_have_no_version(rounded: Rounded) -> None:
    with torch.inference_mode():
        layer, x = layer_of(), torch.randn(2, 32)
        assert layer.weight.is_inference()
        with qsurgeon.rounded_once():
            assert torch.equal(layer(x), layer(x))

    def change() -> None:
        with torch.inference_mode(), qsurgeon.rounded_once():
            layer(x)
            layer.weight.add_(1.0)
            layer(x)

    assert error_of(change) == CHANGED


def test_views_of_a_weight_are_kept_as_their_weight_is(rounded: Rounded) -> None:
    """As a layer that holds its weight transposed multiplies with it."""
    weight, x, how = nn.Parameter(torch.randn(32, 64)), torch.randn(2, 32), Quantization(FORMAT, FORMAT)
    with torch.no_grad():
        expected = quantized_linear(x, weight.T, None, how)
        straight = quantized_linear(x, weight.reshape(64, 32), None, how)
        rounded.clear()
        with qsurgeon.rounded_once():
            for _ in range(3):
                assert torch.equal(quantized_linear(x, weight.T, None, how), expected)
            assert len(rounded) == 1
            assert torch.equal(quantized_linear(x, weight.reshape(64, 32), None, how), straight)
            weight.mul_(2)
            assert torch.equal(quantized_linear(x, weight.T, None, how), expected * 2)

    def change() -> None:
        with torch.no_grad(), qsurgeon.rounded_once():
            for _ in range(2):
                quantized_linear(x, weight.T, None, how)
            weight.data.mul_(2)
            quantized_linear(x, weight.T, None, how)

    assert error_of(change) == CHANGED.replace("layer", "a layer", 1)


def test_two_layers_of_one_weight_in_two_formats_have_their_own() -> None:
    first, x = layer_of(), torch.randn(2, 32)
    second = nn.Linear(32, 32)
    second.weight, second.bias = first.weight, first.bias
    QuantLinear.wrap(second, Quantization(get_format("mxfp4"), FORMAT))
    with torch.no_grad():
        expected = first(x), second(x)
        with qsurgeon.rounded_once():
            for _ in range(2):
                assert torch.equal(first(x), expected[0])
                assert torch.equal(second(x), expected[1])


def test_threads_share_what_is_kept_and_others_see_nothing_of_it(rounded: Rounded) -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    with torch.no_grad():
        expected = layer(x)
    found: list[bool] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(torch.equal(layer(x), expected) for _ in range(20))

    start, outside_ran = threading.Event(), []

    def outside() -> None:
        start.wait()
        outside_ran.append(current().keeping)

    stranger = threading.Thread(target=outside)
    stranger.start()
    rounded.clear()
    with qsurgeon.rounded_once():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        start.set()
        stranger.join()
    assert len(found) == 80
    assert all(found)
    assert outside_ran == [None]
    assert len(rounded) <= 4 + 1


def test_a_thread_that_goes_on_after_the_block_keeps_nothing(rounded: Rounded) -> None:
    layer, x, go = layer_of(), torch.randn(2, 32), threading.Event()

    def work() -> None:
        go.wait()
        with torch.no_grad():
            layer(x)
            layer(x)

    with qsurgeon.rounded_once():
        thread = threading.Thread(target=work)
        thread.start()
    go.set()
    thread.join()
    assert len(rounded) == 2


def test_a_block_inside_another_is_part_of_it(rounded: Rounded) -> None:
    layer, x = layer_of(), torch.randn(2, 32)
    with torch.no_grad(), qsurgeon.rounded_once():
        layer(x)
        with generation(), qsurgeon.rounded_once():
            layer(x)
        layer(x)
        assert len(rounded) == 1


# ---- generate


def model_of(make_qwen2: Callable[..., Any]) -> Any:
    rule = Rule(name="decoder", target=("layers",), weight="nvfp4", input="nvfp4")
    return qsurgeon.apply(Recipe(version=1, rules=(rule,)), make_qwen2().eval())


def generated(model: Any, count: int = 6, **said: Any) -> list[int]:
    ids = torch.arange(1, 9).reshape(1, 8)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **options, **said)[0].tolist()  # type: ignore[no-any-return]


def test_generate_rounds_each_weight_once_and_gives_the_same_tokens(
    make_qwen2: Callable[..., Any], rounded: Rounded
) -> None:
    model = model_of(make_qwen2)
    layers = len(quant_layers(model))
    qsurgeon.keep_at_most(0)
    expected = generated(model)
    assert len(rounded) == 6 * layers
    qsurgeon.keep_at_most(None)
    rounded.clear()
    assert generated(model) == expected
    assert len(rounded) == 2 * layers


def test_training_between_two_generations_is_seen(make_qwen2: Callable[..., Any]) -> None:
    model = model_of(make_qwen2)
    ids = torch.arange(1, 9).reshape(1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = generated(model)
        qsurgeon.keep_at_most(0)
        assert kept == generated(model)
        qsurgeon.keep_at_most(None)


def test_an_adapter_that_is_merged_between_two_generations_is_seen(make_qwen2: Callable[..., Any]) -> None:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = get_peft_model(model_of(make_qwen2), config)
    for act in (lambda: None, model.merge_adapter, model.unmerge_adapter):
        act()
        kept = generated(model)
        qsurgeon.keep_at_most(0)
        assert kept == generated(model)
        qsurgeon.keep_at_most(None)


def test_generate_that_changes_a_weight_unseen_is_an_error(make_qwen2: Callable[..., Any]) -> None:
    model = model_of(make_qwen2)
    name, layer = next(iter(quant_layers(model).items()))

    def meddle(ids: Tensor, scores: Tensor) -> Tensor:
        layer.weight.data.mul_(1.5)
        return scores

    with pytest.raises(UsageError) as caught:
        generated(model, logits_processor=[meddle])
    assert str(caught.value) == CHANGED.replace("layer", name, 1)
