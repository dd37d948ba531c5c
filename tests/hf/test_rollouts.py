"""All that generates is a rollout: generate of any class, continuous batching, threads that stream, TRL's trainers."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from versions import needs, recomputing

import qsurgeon
from qsurgeon.errors import UsageError
from qsurgeon.layers import QuantLinear, quant_layers
from qsurgeon.recipe import Recipe, Rule

TOKENIZER = Path(__file__).parents[2] / "examples" / "models" / "tiny-math"
IDS = torch.arange(1, 9).reshape(1, 8)
GREEDY = hf.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=95, pad_token_id=0)
SMALL: dict[str, Any] = {"num_blocks": 8, "max_batch_tokens": 32}  # as much of the memory as it can get is the default
BATCHED: dict[str, Any] = {
    "generation_config": GREEDY, "continuous_batching_config": hf.ContinuousBatchingConfig(**SMALL),
}  # fmt: skip
Seen = set[str]


def recipe(phases: str) -> Recipe:
    rule = Rule(name="decoder", target=("layers",), weight="mxfp4", input="mxfp4", phases=phases)
    return Recipe(version=1, rules=(rule,))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What layers were seen to do, by what they computed: ``rounded``, ``full``."""
    found: Seen = set()
    forward = QuantLinear.forward

    def watched(self: QuantLinear, input: Tensor) -> Tensor:
        output = forward(self, input)
        full = torch.equal(output, nn.functional.linear(input, self.weight, self.bias))
        found.add("full" if full else "rounded")
        return output

    monkeypatch.setattr(QuantLinear, "forward", watched)
    return found


# ---- what generates. The classes are there before a recipe is applied, as those of a program are.


class OwnLoop(hf.Qwen2ForCausalLM):
    """Generates by itself, as many of transformers' models do, and what comes with a checkpoint."""

    @torch.no_grad()
    def generate(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        for _ in range(2):
            ids = torch.cat([ids, self(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        return ids


class Wrapper(nn.Module):
    """No model of transformers, around one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def generate(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=ids).logits  # type: ignore[no-any-return]


class Streaming(Wrapper):
    def generate(self, ids: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        for _ in range(2):
            yield super().generate(ids)


class Asynchronous(Wrapper):
    async def generate(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().generate(ids)


class Static(Wrapper):
    @staticmethod
    def generate(model: Any, ids: Tensor) -> Tensor:  # type: ignore[override]
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


class Speech(Wrapper):
    def generate_speech(self, ids: Tensor) -> Tensor:
        return Wrapper.generate(self, ids)


def own_method(model: Any) -> Any:
    """A model whose object has a ``generate`` of its own, as accelerated ones do."""
    model.generate = OwnLoop.generate.__get__(model)
    return model


def own_function(model: Any) -> Any:
    model.generate = lambda ids: model(input_ids=ids)
    return model


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def as_it_is(model: Any) -> Any:
    return model


def generate(model: Any) -> None:
    model.generate(input_ids=IDS, generation_config=GREEDY)


def stream(model: Any) -> None:
    streamer = hf.TextIteratorStreamer(hf.AutoTokenizer.from_pretrained(TOKENIZER))
    options = {"input_ids": IDS, "generation_config": GREEDY, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    assert list(streamer)
    thread.join()


def in_a_pool(model: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(generate, model).result()


def generate_batch(model: Any) -> None:
    (output,) = model.generate_batch([IDS[0].tolist()], **BATCHED).values()
    assert len(output.generated_tokens) == 2


def with_a_manager(model: Any) -> None:
    with model.continuous_batching_context_manager(**BATCHED) as manager:
        manager.add_request(IDS[0].tolist())
        finish(manager)


def finish(manager: Any) -> None:
    while (result := manager.get_result(timeout=1)) is None or not result.is_finished():
        assert manager.is_running()


def started_by_hand(model: Any) -> None:
    manager = model.init_continuous_batching(**BATCHED)
    manager.start()
    manager.add_request(IDS[0].tolist())
    finish(manager)
    manager.stop()


Make = Callable[[Any], Any]
KINDS: dict[str, tuple[Make, Make, Callable[[Any], Any]]] = {  # before the recipe, after it, and what is called
    "generate": (as_it_is, as_it_is, generate),
    "peft": (as_it_is, adapted, generate),
    "a stream": (as_it_is, as_it_is, stream),
    "a pool": (as_it_is, as_it_is, in_a_pool),
    "to_thread": (as_it_is, as_it_is, lambda model: asyncio.run(asyncio.to_thread(generate, model))),
    "assisted": (
        as_it_is,
        as_it_is,
        lambda model: model.generate(IDS, generation_config=GREEDY, assistant_model=model),
    ),
    "its own": (lambda model: OwnLoop(model.config), as_it_is, lambda model: model.generate(IDS)),
    "a module": (Wrapper, as_it_is, lambda model: model.generate(IDS)),
    "a module around": (as_it_is, Wrapper, lambda model: model.generate(IDS)),
    "a generator": (Streaming, as_it_is, lambda model: list(model.generate(IDS))),
    "a coroutine": (Asynchronous, as_it_is, lambda model: asyncio.run(model.generate(IDS))),
    "static": (Static, as_it_is, lambda model: model.generate(model.model, IDS)),
    "speech": (Speech, as_it_is, lambda model: model.generate_speech(IDS)),
    "an object's method": (own_method, as_it_is, lambda model: model.generate(IDS)),
    "a copy's method": (own_method, deepcopy, lambda model: model.generate(IDS)),
    "an object's function": (own_function, as_it_is, lambda model: model.generate(IDS)),
    "generate_batch": (as_it_is, as_it_is, generate_batch),
    "a manager": (as_it_is, as_it_is, with_a_manager),
    "started by hand": (as_it_is, as_it_is, started_by_hand),
}
SLOW = "generate_batch", "a manager", "started by hand"
BLOCKS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "no block": lambda model: nullcontext(),
    "rollout": lambda model: qsurgeon.phase("rollout"),
    "training": lambda model: qsurgeon.phase("training"),
    "disabled": qsurgeon.disabled,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_generates_is_in_a_rollout_unless_told_otherwise(
    kind: str, make_qwen2: Callable[..., Any], seen: Seen
) -> None:
    before, after, call = KINDS[kind]
    for phases in ("training",) if kind in SLOW else ("training", "rollout"):
        model = after(qsurgeon.apply(recipe(phases), before(make_qwen2(num_hidden_layers=2)).eval()))
        for name, block in BLOCKS.items():
            phase = "training" if name == "training" else "rollout"
            with block(model):
                call(model)
            rounds = phases == phase and name != "disabled"
            assert (phases, name, seen) == (phases, name, {"rounded" if rounds else "full"})
            seen.clear()
        (model.model if isinstance(model, Wrapper) else model)(input_ids=IDS)
        assert seen == {"rounded" if phases == "training" else "full"}
        seen.clear()


class Mixin:
    """No module, and defined before a recipe is applied; a class that is defined later takes its method."""

    model: Any

    def generate(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits  # type: ignore[no-any-return]


def _later_wrapper() -> type[Wrapper]:
    class Later(Wrapper):
        def generate(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits  # type: ignore[no-any-return]

    return Later


def _later_mixin() -> type[Any]:
    class Later(Mixin, nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

    return Later


def _later_made() -> type[Any]:
    class Named:
        """What a class keeps of its keywords, as nn.Module lets it."""

        name = ""

        def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.name = name

    class Later(Wrapper, Named, name="later"):
        generate_batch = Mixin.generate

    assert Later.name == "later"
    return type("Made", (Later,), {"generate": lambda self, ids: self.generate_batch(ids)})


@pytest.mark.parametrize("define", [_later_wrapper, _later_mixin, _later_made])
@pytest.mark.parametrize(("phases", "expected"), [("training", {"full"}), ("rollout", {"rounded"})])
def test_generate_of_a_class_that_is_defined_later_is_a_rollout(
    tiny_qwen2: Any, seen: Seen, define: Callable[[], Any], phases: str, expected: set[str]
) -> None:
    model = qsurgeon.apply(recipe(phases), tiny_qwen2)
    later = define()(model)
    later.generate(IDS)
    assert seen == expected
    seen.clear()
    with qsurgeon.phase("training"):
        later.generate(IDS)
    assert seen == {"full", "rounded"} - expected


def test_generate_of_a_model_that_is_loaded_is_a_rollout(
    make_qwen2: Callable[..., Any], tmp_path: Path, seen: Seen
) -> None:
    qsurgeon.apply(recipe("training"), make_qwen2()).save_pretrained(tmp_path)
    model = OwnLoop.from_pretrained(tmp_path)
    assert quant_layers(model)
    seen.clear()
    model.generate(IDS)
    assert seen == {"full"}
    generate_batch(model)
    assert seen == {"full"}


# ---- continuous batching


def test_requests_that_ask_for_another_state_than_their_managers_are_refused(tiny_qwen2: Any, seen: Seen) -> None:
    model = qsurgeon.apply(recipe("rollout"), tiny_qwen2)
    other = qsurgeon.apply(recipe("rollout"), _other())
    manager = model.init_continuous_batching(**BATCHED)
    manager.start()
    try:
        for block, state in (
            (qsurgeon.phase("training"), "in phase 'training'"),
            (qsurgeon.disabled(model), "in phase 'rollout' with a model disabled"),
        ):
            with block, pytest.raises(UsageError) as caught:
                manager.add_requests([IDS[0].tolist()])
            assert str(caught.value) == (
                f"a request was made {state}, of a manager that was started in phase 'rollout', and computes all "
                "requests so: start the manager inside the block, or make the request outside of it"
            )
        with qsurgeon.phase("rollout"), qsurgeon.disabled(other):
            manager.add_request(IDS[0].tolist())
        finish(manager)
    finally:
        manager.stop()
    assert seen == {"rounded"}


def _other() -> Any:
    config = hf.Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return hf.Qwen2ForCausalLM(config)


def test_a_manager_that_is_kept_follows_the_next_sessions_state(tiny_qwen2: Any, seen: Seen) -> None:
    """What it keeps on a GPU are graphs of kernels, of the state that they were recorded in."""
    model = qsurgeon.apply(recipe("rollout"), tiny_qwen2)

    def session() -> Any:
        seen.clear()
        model.generate_batch([IDS[0].tolist()], **BATCHED, persistent_manager=True)
        return model._cached_continuous_batching_manager.batch_processor

    first = session()
    assert seen == {"rounded"}
    assert session() is first
    with qsurgeon.phase("training"):
        second = session()
    assert seen == {"full"}
    assert second is not first
    model.destroy_cached_continuous_batching_manager()


@needs("trl", "1.8", "does not know use_transformers_continuous_batching")
@pytest.mark.parametrize("phases", ["training", "rollout"])
def test_grpo_with_continuous_batching_rolls_out_in_the_phase(
    phases: str, make_qwen2: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = qsurgeon.apply(recipe(phases), make_qwen2(vocab_size=384, num_hidden_layers=2))
    seen: set[tuple[bool, str]] = set()
    forward = QuantLinear.forward

    def watched(self: QuantLinear, input: Tensor) -> Tensor:
        output = forward(self, input)
        full = torch.equal(output, nn.functional.linear(input, self.weight, self.bias))
        seen.add((torch.is_grad_enabled(), "full" if full else "rounded"))
        return output

    monkeypatch.setattr(QuantLinear, "forward", watched)
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, **recomputing(False), max_steps=1, report_to=[],
        save_strategy="no", per_device_train_batch_size=4, num_generations=4, disable_tqdm=True, beta=0.0,
        logging_strategy="no", max_completion_length=3, use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=SMALL,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model,
        lambda completion_ids, **_: [float(sum(ids) % 17) for ids in completion_ids],
        arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"Ava has {n} pens."} for n in range(4)]),
        processing_class=hf.AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left"),
    )
    trainer.train()
    rollout, training = ("full", "rounded") if phases == "training" else ("rounded", "full")
    assert seen == {(False, rollout), (True, training)}
