"""Watch with what else there is in a training loop, and what it refuses."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import qsurgeon
from qsurgeon.errors import NothingWrappedError, SurgeryError, UsageError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear, quant_layers
from qsurgeon.recipe import Recipe

IDS = torch.arange(24).view(2, 12)
Train = Callable[[Any], None]
Hooks = Callable[[nn.Module], int]
MakeRecipe = Callable[..., Recipe]


def test_hooks_are_there_only_for_the_step_that_is_measured(model: Any, hooks: Hooks) -> None:
    watch = qsurgeon.Watch(model, every=3)
    attached = []
    for _ in range(7):
        attached.append(hooks(model))
        watch.step()
    assert attached == [0, 0, 14, 0, 0, 14, 0]
    watch.step()
    assert hooks(model) == 14
    watch.close()
    watch.close()
    assert hooks(model) == 0
    for use in (watch.step, watch.evaluation().__enter__):
        with pytest.raises(UsageError) as caught:
            use()
        assert str(caught.value) == "this Watch is closed; make another"


def test_an_error_in_the_loop_leaves_no_hook(model: Any, hooks: Hooks) -> None:
    def fail() -> None:
        with qsurgeon.Watch(model, every=1) as watch, watch.evaluation():
            assert hooks(model) == 14
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
        sizes = [data.untyped_storage().nbytes() for *_, data in watch._weights._codes.values()]
        assert sizes == [16 * 32]
        assert watch._open is not None
        assert watch._open.calls == {}


def save_products(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    aten = torch.ops.aten  # of those that are not products, watching has some of its own
    saved = (aten.mm.default, aten.index.Tensor, aten.index_select.default, aten.mul.Tensor, aten.add.Tensor)
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


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

        def counted(x: Tensor, forward: Any = forward) -> Any:
            forwards.append(x)
            return forward(x)

        layer.mlp.forward = partial(checkpoint, counted, **options)
    recomputed, same_grad = numbers()
    assert len(forwards) == 4
    assert recomputed == plain
    assert torch.equal(grad, same_grad)


def test_peft_adapters_train_over_frozen_layers_that_act(model: Any, train: Train) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with qsurgeon.Watch(adapted, every=1) as watch:
        train(adapted)
        numbers = watch.step()
    assert numbers["qsurgeon/active"] == 1.0
    assert "qsurgeon/weight_sqnr_db/q_proj" in numbers
    assert not [key for key in numbers if "flip_rate" in key or "base_layer" in key]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # so does nn.Linear
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("each_layer", [False, True])
def test_a_sharded_weight_is_watched_by_its_shard(
    make_qwen2: Callable[..., Any], each_layer: bool, train: Train, recipe: MakeRecipe
) -> None:
    def numbers(shard: bool) -> dict[str, float]:
        model = qsurgeon.apply(recipe(weight="nvfp4", input="mxfp4"), make_qwen2(num_hidden_layers=2)).train()
        if shard:
            mesh = init_device_mesh("cpu", (1,))
            for one in (*(quant_layers(model).values() if each_layer else ()), *model.model.layers, model):
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
    options: dict[str, Any] = {what: 0}
    for make in (partial(qsurgeon.Watch, model), qsurgeon.WatchCallback):
        with pytest.raises(UsageError) as caught:
            make(**options)
        assert str(caught.value) == f"{what} is 0; expected at least 1"
