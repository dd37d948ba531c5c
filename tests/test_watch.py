"""Watch and WatchCallback: their numbers beside ones that are computed here from whole tensors."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import Trainer, TrainerCallback, TrainingArguments

import qsurgeon
from qsurgeon.errors import NothingWrappedError, SurgeryError, UsageError
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.formats.quality import sqnr
from qsurgeon.layers import Quantization, QuantLinear, quant_linears
from qsurgeon.recipe import FormatSpec, Recipe, Rule
from qsurgeon.watch.sample import rows_of

IDS = torch.arange(24).view(2, 12)
ALL = 10**6  # rows: all of them
FORMATS = {
    "turned": FormatSpec(like="mxfp4", hadamard=32, seed=7),
    "turned-nvfp4": FormatSpec(like="nvfp4", hadamard=32, seed=7),
    "square": FormatSpec(like="nvfp4", block=[16, 16]),
    "dither": FormatSpec(like="mxfp8", rounding="stochastic"),
    "dither-nvfp4": FormatSpec(like="nvfp4", rounding="stochastic", seed=3),
    "dither-int8": FormatSpec(like="int8", rounding="stochastic"),
}


def recipe(**rule: Any) -> Recipe:
    return Recipe(version=1, formats=FORMATS, rules=(Rule(target=("layers",), **rule),))


@pytest.fixture
def model(make_qwen2: Callable[..., Any]) -> Any:
    made = make_qwen2(num_hidden_layers=2)
    return qsurgeon.apply(recipe(weight="nvfp4", input="mxfp4"), made).train()


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def train(model: Any, lr: float = 1e-2) -> None:
    """Take one step."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad.sign()
                parameter.grad = None


@torch.no_grad()
def codes(model: nn.Module) -> dict[str, Tensor]:
    """Return all codes of the whole weights."""
    return {
        name: layer.quantization.weight.as_weight.quantize(layer.weight).codes
        for name, layer in quant_linears(model).items()
        if layer.quantization.weight is not None
    }


@pytest.fixture
def inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """The whole inputs of the latest calls."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in quant_linears(model).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def of_group(numbers: dict[str, Any], group: str) -> list[Any]:
    return [value for name, value in numbers.items() if name.endswith(f".{group}")]


def mean_decibel(each: list[float]) -> float:
    return -10 * math.log10(sum(10 ** (-one / 10) for one in each) / len(each))


# --- the numbers


def test_of_all_rows_the_numbers_are_those_of_the_whole_tensors(model: Any, inputs: dict[str, Tensor]) -> None:
    watch = qsurgeon.Watch(model, every=1, rows=ALL)
    before = codes(model)
    train(model)
    after = codes(model)
    numbers = watch.step()

    assert numbers["qsurgeon/called"] == numbers["qsurgeon/active"] == 1.0
    flipped = {name: int((before[name] != after[name]).sum()) for name in before}
    count = sum(one.numel() for one in before.values())
    assert 0.01 < sum(flipped.values()) / count < 0.99
    assert numbers["qsurgeon/flip_rate"] == pytest.approx(sum(flipped.values()) / count)
    groups = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for group in groups:
        sizes = [one.numel() for one in of_group(before, group)]
        assert numbers[f"qsurgeon/flip_rate/{group}"] == pytest.approx(sum(of_group(flipped, group)) / sum(sizes))
        weights = of_group({name: layer.weight.detach() for name, layer in quant_linears(model).items()}, group)
        each = [sqnr(one, get_format("nvfp4").as_weight.fake_quantize(one)) for one in weights]
        assert numbers[f"qsurgeon/weight_sqnr_db/{group}"] == pytest.approx(mean_decibel(each), abs=1e-4)
        each = [sqnr(one, get_format("mxfp4").fake_quantize(one)) for one in of_group(inputs, group)]
        assert numbers[f"qsurgeon/input_sqnr_db/{group}"] == pytest.approx(mean_decibel(each), abs=1e-4)
    assert len(numbers) == 3 + 3 * len(groups)
    watch.close()


def test_flips_are_counted_from_the_last_step_measured(model: Any) -> None:
    with qsurgeon.Watch(model, every=2, rows=ALL) as watch:
        start = codes(model)
        train(model)
        assert watch.step() == {}
        train(model)
        middle = codes(model)
        first = watch.step()["qsurgeon/flip_rate"]
        train(model)
        assert watch.step() == {}
        train(model)
        second = watch.step()["qsurgeon/flip_rate"]
    end, count = codes(model), sum(one.numel() for one in start.values())
    assert first == pytest.approx(sum(int((start[name] != middle[name]).sum()) for name in start) / count)
    assert second == pytest.approx(sum(int((middle[name] != end[name]).sum()) for name in start) / count)


def test_without_a_change_nothing_flips(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        model(input_ids=IDS)
        numbers = watch.step()
    assert numbers["qsurgeon/flip_rate"] == 0.0
    assert numbers["qsurgeon/active"] == 1.0


def test_a_sample_is_of_whole_rows_of_the_tensor_with_the_scale_of_all_of_it() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 200, bias=False)
    with torch.no_grad():
        layer.weight[next(row for row in range(200) if row not in rows_of(200, 8, 1)), 3] = 50.0
    QuantLinear.wrap(layer, Quantization(get_format("nvfp4"), None))
    whole = get_format("nvfp4").as_weight.fake_quantize(layer.weight.detach())
    rows = list(rows_of(200, 8, 1))
    with qsurgeon.Watch(nn.ModuleDict({"one": layer}), every=1, rows=8) as watch:
        number = watch.step()["qsurgeon/weight_sqnr_db/one"]
    sampled = layer.weight.detach()[rows]
    assert number == pytest.approx(sqnr(sampled, whole[rows]), abs=1e-4)
    assert abs(number - sqnr(sampled, get_format("nvfp4").as_weight.fake_quantize(sampled))) > 0.01


def test_rows_are_drawn_in_whole_bands_and_always_the_same() -> None:
    assert rows_of(5, 16, 1) == (0, 1, 2, 3, 4)
    drawn = rows_of(1000, 16, 1)
    assert len(set(drawn)) == 16
    assert list(drawn) == sorted(drawn)
    assert len({one % 64 for one in drawn}) > 8
    rows_of.cache_clear()
    assert rows_of(1000, 16, 1) == drawn
    bands = rows_of(1000, 16, 12)
    assert len(bands) == 24
    assert {one // 12 for one in bands} == {one // 12 for one in bands if one % 12 == 11}
    assert rows_of(20, ALL, 16) == tuple(range(20))


def test_groups_are_what_a_callable_says(model: Any) -> None:
    with qsurgeon.Watch(model, every=1, groups=lambda name: name.split(".")[2]) as watch:
        train(model)
        assert {key.split("/")[2] for key in watch.step() if key.count("/") == 2} == {"0", "1"}


def test_a_tensor_without_a_format_has_no_number(make_qwen2: Callable[..., Any]) -> None:
    model = qsurgeon.apply(recipe(weight="nvfp4"), make_qwen2(num_hidden_layers=1)).train()
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        kinds = {key.split("/")[1] for key in watch.step()}
    assert kinds == {"called", "active", "flip_rate", "weight_sqnr_db"}
    vars(model.model.layers[0].mlp.up_proj)["quantization"] = Quantization(None, get_format("mxfp4"))
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        numbers = watch.step()
    assert numbers["qsurgeon/active"] == 1.0
    assert "qsurgeon/weight_sqnr_db/up_proj" not in numbers
    assert "qsurgeon/flip_rate/up_proj" not in numbers
    assert numbers["qsurgeon/input_sqnr_db/up_proj"] > 10


def test_frozen_weights_do_not_flip_and_all_frozen_have_no_rate(model: Any) -> None:
    attention = [layer for name, layer in quant_linears(model).items() if "self_attn" in name]
    for layer in attention:
        layer.weight.requires_grad_(False)
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        numbers = watch.step()
        assert numbers["qsurgeon/flip_rate/q_proj"] == 0.0
        assert 0 < numbers["qsurgeon/flip_rate"] < numbers["qsurgeon/flip_rate/up_proj"]
        for layer in attention:  # what was frozen so far has nothing to be compared with
            layer.weight.requires_grad_(True)
        train(model)
        assert "qsurgeon/flip_rate/q_proj" not in watch.step()
        train(model)
        assert watch.step()["qsurgeon/flip_rate/q_proj"] > 0
        model.requires_grad_(False)
        assert not [key for key in watch.step() if "flip_rate" in key]


def test_a_weight_in_another_format_is_compared_with_nothing(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    with qsurgeon.Watch(model, every=1, groups=lambda name: name) as watch:
        vars(layer)["quantization"] = Quantization(get_format("mxfp8"), None)
        assert "qsurgeon/flip_rate/model.layers.0.mlp.up_proj" not in watch.step()
        assert "qsurgeon/flip_rate/model.layers.0.mlp.up_proj" in watch.step()


def test_nothing_lost_is_infinite_and_one_layer_that_is_lost_shows() -> None:
    first, second = (nn.Linear(32, 32, bias=False) for _ in range(2))
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.copy_(get_format("mxfp4").fake_quantize(layer.weight))
    for layer in (first, second):
        QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), None))
    model = nn.ModuleList([first, second])
    with qsurgeon.Watch(model, every=1, groups=lambda _: "all") as watch:
        assert watch.step()["qsurgeon/weight_sqnr_db/all"] == math.inf
        with torch.no_grad():
            second.weight += 0.01
        lost = sqnr(second.weight.detach(), get_format("mxfp4").fake_quantize(second.weight.detach()))
        rows = ALL
        assert watch.step()["qsurgeon/weight_sqnr_db/all"] < math.inf
    with qsurgeon.Watch(model, every=1, rows=rows, groups=lambda _: "all") as watch:
        assert watch.step()["qsurgeon/weight_sqnr_db/all"] == pytest.approx(lost + 10 * math.log10(2), abs=1e-4)


# --- active


EVERY_FORMAT = [*CATALOG, *FORMATS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_format_is_seen_to_act_and_seen_to_be_off(
    name: str, dtype: torch.dtype, make_qwen2: Callable[..., Any]
) -> None:
    format = format_named(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer, x = nn.Linear(128, 96).to(dtype), torch.randn(3, 40, 128, dtype=dtype)
    QuantLinear.wrap(layer, Quantization(format, None if format.is_two_dimensional else format))
    model = nn.Sequential(layer)
    with qsurgeon.Watch(model, every=1) as watch, torch.no_grad():
        model(x)
        assert watch.step()["qsurgeon/active"] == 1.0
        layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
        model(x)
        numbers = watch.step()
    assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 0.0)


def format_named(name: str) -> Format:
    if name in CATALOG:
        return get_format(name)
    spec = FORMATS[name]
    fields = {key: value for key, value in spec.model_dump(exclude_none=True).items() if key != "like"}
    return get_format(spec.like).with_fields(name, **fields)


def test_layers_that_are_not_called_or_have_no_format_are_not_active(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        assert (watch.step()["qsurgeon/called"], watch.step()["qsurgeon/active"]) == (0.0, 0.0)
        model.model.layers[0](torch.randn(1, 4, 64), position_embeddings=(torch.ones(1, 4, 16), torch.zeros(1, 4, 16)))
        numbers = watch.step()
        assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (0.5, 0.5)
        for layer in quant_linears(model).values():
            vars(layer)["quantization"] = Quantization(None, None)
        model(input_ids=IDS)
        assert watch.step() == {"qsurgeon/called": 1.0, "qsurgeon/active": 0.0}


def test_a_layer_that_became_a_linear_again_is_not_active(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        for layer in quant_linears(model).values():
            layer.__class__ = nn.Linear
        model(input_ids=IDS)
        numbers = watch.step()
    assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 0.0)


def test_a_call_that_raised_is_not_the_one_that_counts() -> None:
    layer = nn.Linear(32, 32)
    QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), get_format("mxfp4")))
    with qsurgeon.Watch(nn.Sequential(layer), every=1) as watch:
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, 31))
        layer(input=torch.randn(4, 32))
        layer(torch.randn(0, 32))
        assert watch.step()["qsurgeon/active"] == 1.0


def test_an_evaluation_is_watched_by_itself(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        train(model)
        with watch.evaluation() as numbers:
            with torch.no_grad():
                model(input_ids=IDS)
            assert numbers == {}
        assert numbers == {"qsurgeon/called": 1.0, "qsurgeon/active": 1.0}
        with watch.evaluation() as numbers:
            pass
        assert numbers == {"qsurgeon/called": 0.0, "qsurgeon/active": 0.0}
        assert watch.step()["qsurgeon/active"] == 1.0
        with watch.evaluation():
            model(input_ids=IDS)
        assert watch.step()["qsurgeon/called"] == 0.0
    assert hooks(model) == 0


# --- with what else there is


def test_hooks_are_there_only_for_the_step_that_is_measured(model: Any) -> None:
    watch = qsurgeon.Watch(model, every=3)
    attached = []
    for _ in range(7):
        attached.append(hooks(model))
        watch.step()
    assert attached == [0, 0, 28, 0, 0, 28, 0]
    watch.step()
    assert hooks(model) == 28
    watch.close()
    watch.close()
    assert hooks(model) == 0
    for use in (watch.step, watch.evaluation().__enter__):
        with pytest.raises(UsageError) as caught:
            use()
        assert str(caught.value) == "this Watch is closed; make another"


def test_an_error_in_the_loop_leaves_no_hook(model: Any) -> None:
    def fail() -> None:
        with qsurgeon.Watch(model, every=1) as watch, watch.evaluation():
            assert hooks(model) == 28
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert hooks(model) == 0


def test_nothing_but_the_samples_codes_is_kept() -> None:
    layer = nn.Linear(64, 512)
    QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), get_format("mxfp4")))
    with qsurgeon.Watch(nn.Sequential(layer), every=1) as watch:
        x = torch.randn(256, 64)
        y = layer(x)
        alive = [weakref.ref(one) for one in (x, y, x.untyped_storage())]
        del x, y
        gc.collect()
        assert [ref() for ref in alive] == [None] * 3
        watch.step()
        gc.collect()
        sizes = [data.untyped_storage().nbytes() for _, data in watch._codes.values()]
        assert sizes == [16 * 32]
        assert watch._open is not None
        assert watch._open.calls == {}


def save_products(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.index.Tensor)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": False},
        {"use_reentrant": True},
        {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, save_products)},
    ],
    ids=["non-reentrant", "reentrant", "selective"],
)
def test_gradient_checkpointing_changes_no_number(model: Any, options: dict[str, Any]) -> None:
    def numbers() -> tuple[dict[str, float], Tensor]:
        with qsurgeon.Watch(model, every=1) as watch:
            model(input_ids=IDS, labels=IDS).loss.backward()
            grad = model.model.layers[0].mlp.up_proj.weight.grad.clone()
            model.zero_grad()
            return watch.step(), grad

    plain, grad = numbers()
    forwards = []
    for layer in model.model.layers:
        forward = layer.mlp.forward

        def counted(x: Tensor, forward: Any = forward) -> Tensor:
            forwards.append(x)
            return forward(x)

        layer.mlp.forward = partial(checkpoint, counted, **options)
    recomputed, same_grad = numbers()
    assert len(forwards) == 4
    assert recomputed == plain
    assert torch.equal(grad, same_grad)


def test_peft_adapters_train_over_frozen_layers_that_act(model: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with qsurgeon.Watch(adapted, every=1) as watch:
        train(adapted)
        numbers = watch.step()
    assert numbers["qsurgeon/active"] == 1.0
    assert "qsurgeon/weight_sqnr_db/q_proj" in numbers
    assert not [key for key in numbers if "flip_rate" in key or "base_layer" in key]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # so does nn.Linear
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("each_layer", [False, True])
def test_a_sharded_weight_is_watched_by_its_shard(make_qwen2: Callable[..., Any], each_layer: bool) -> None:
    def numbers(shard: bool) -> dict[str, float]:
        model = qsurgeon.apply(recipe(weight="nvfp4", input="mxfp4"), make_qwen2(num_hidden_layers=2)).train()
        if shard:
            mesh = init_device_mesh("cpu", (1,))
            for one in (*(quant_linears(model).values() if each_layer else ()), *model.model.layers, model):
                fully_shard(one, mesh=mesh)
            assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
        with qsurgeon.Watch(model, every=1) as watch:
            train(model)
            return watch.step()

    assert numbers(shard=True) == pytest.approx(numbers(shard=False), rel=1e-5)


def test_autocast_is_seen_through(model: Any) -> None:
    with qsurgeon.Watch(model, every=1) as watch:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS)
        assert watch.step()["qsurgeon/active"] == 1.0


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("how", ["outside", "in place", "said"])
def test_a_compiled_model_is_eager_for_the_step_that_is_measured_and_is_not_compiled_again(how: str) -> None:
    torch._dynamo.reset()
    layer = nn.Linear(32, 32)
    QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), get_format("mxfp4")))
    model: Any = nn.Sequential(layer, nn.ReLU())
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = model
    if how == "in place":
        model.compile(backend=backend, fullgraph=True)
    else:
        model = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 32)
    watched = plain if how == "said" else model
    results = []
    with torch.no_grad(), qsurgeon.Watch(watched, every=2, compiled=True if how == "said" else None) as watch:
        for _ in range(3):
            results.append(model(x))
            assert watch.step() == {}
            results.append(model(x))
            assert watch.step()["qsurgeon/active"] == 1.0
        watch.close()
        results.append(model(x))
        assert len(graphs) == 1
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_compiled_model_nobody_told_of_shows_no_calls_and_no_error() -> None:
    torch._dynamo.reset()
    layer = nn.Linear(32, 32)
    QuantLinear.wrap(layer, Quantization(get_format("mxfp4"), get_format("mxfp4")))
    plain = nn.Sequential(layer)
    run = torch.compile(plain, backend="eager", fullgraph=True)
    with torch.no_grad(), qsurgeon.Watch(plain, every=1) as watch:
        run(torch.randn(4, 32))
        assert watch.step()["qsurgeon/called"] == 0.0


# --- what is refused


def test_a_model_without_a_quant_linear_is_refused(make_qwen2: Callable[..., Any]) -> None:
    with pytest.raises(NothingWrappedError) as caught:
        qsurgeon.Watch(make_qwen2(num_hidden_layers=1))
    assert str(caught.value) == (
        "Qwen2ForCausalLM has no QuantLinear to watch: it computes in full precision. "
        "Wrap it first (qsurgeon.apply, or qsurgeon.load)"
    )


def test_a_weight_that_is_not_there_is_refused(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.Watch(model)
    assert str(caught.value) == (
        "the weight of model.layers.1.mlp.up_proj is on the meta device (offloaded, or not loaded yet)"
    )


@pytest.mark.parametrize("what", ["every", "rows"])
def test_counts_under_one_are_refused(what: str, model: Any) -> None:
    for make in (lambda **options: qsurgeon.Watch(model, **options), qsurgeon.WatchCallback):
        with pytest.raises(UsageError) as caught:
            make(**{what: 0})
        assert str(caught.value) == f"{what} is 0; expected at least 1"


# --- transformers' Trainer


class Reporter(TrainerCallback):
    """Keeps what a reporter gets."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.got.append(dict(logs))


def trainer(model: Any, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(8, 12)]
    given = {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3} | options
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, save_strategy="no", **given
    )
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)


def test_the_trainers_logs_have_the_numbers_for_reporters_and_in_the_history(model: Any, tmp_path: Path) -> None:
    reporter = Reporter()
    running = trainer(model, tmp_path, [reporter], gradient_accumulation_steps=2)
    callback = qsurgeon.WatchCallback(every=2).attach(running)
    running.train()
    assert callback in running.callback_handler.callbacks
    history = running.state.log_history
    logs = [one for one in history if "loss" in one]
    assert [one["step"] for one in logs] == [2, 4, 6]
    for one in logs:
        assert (one["qsurgeon/called"], one["qsurgeon/active"]) == (1.0, 1.0)
        assert 0 <= one["qsurgeon/flip_rate"] <= 1
        assert one["qsurgeon/weight_sqnr_db/q_proj"] > 10
        assert one["qsurgeon/input_sqnr_db/down_proj"] > 10
    evaluations = [one for one in history if "eval_loss" in one]
    assert [one["step"] for one in evaluations] == [3, 6]
    for one in evaluations:
        assert (one["eval_qsurgeon/called"], one["eval_qsurgeon/active"]) == (1.0, 1.0)
    assert not [key for key in history[-1] if "qsurgeon" in key]
    assert reporter.got == [{key: value for key, value in one.items() if key != "step"} for one in history]
    assert hooks(model) == 0


def test_an_evaluation_in_full_precision_shows(model: Any, tmp_path: Path) -> None:
    class Sabotage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if control.should_evaluate:
                for layer in quant_linears(model).values():
                    layer.__class__ = nn.Linear

    running = trainer(model, tmp_path, [Sabotage(), qsurgeon.WatchCallback(every=1)], max_steps=3)
    running.train()
    (log,) = (one for one in running.state.log_history if "eval_loss" in one)
    assert (log["eval_qsurgeon/called"], log["eval_qsurgeon/active"]) == (1.0, 0.0)


def test_a_callback_behind_reporters_is_refused_before_training(model: Any, tmp_path: Path) -> None:
    running = trainer(model, tmp_path, [qsurgeon.WatchCallback()])
    running.args.report_to = ["wandb"]
    with pytest.raises(UsageError) as caught:
        running.train()
    assert str(caught.value) == (
        "wandb reports before a callback that was given to the Trainer, and would not get its numbers: "
        "use WatchCallback(...).attach(trainer)"
    )


def test_a_run_that_failed_is_closed_by_the_next_one_or_by_hand(model: Any, tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyError("mine")

    callback, fail = qsurgeon.WatchCallback(every=1), Fail()
    running = trainer(model, tmp_path, [callback, fail])
    with pytest.raises(KeyError):
        running.train()
    assert hooks(model) == 28
    callback.close()
    assert hooks(model) == 0
    running.evaluate()
    with pytest.raises(KeyError):
        running.train()
    running.remove_callback(fail)
    running.train()
    assert hooks(model) == 0


def test_a_trainer_of_a_model_that_is_not_wrapped_is_refused(make_qwen2: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(NothingWrappedError):
        trainer(make_qwen2(num_hidden_layers=1), tmp_path, [qsurgeon.WatchCallback()]).train()
