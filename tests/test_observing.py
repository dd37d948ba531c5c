"""Whoever runs a model only to look at it leaves it as it was, whether the run ends or fails."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qsurgeon
from qsurgeon.layers import quant_layers
from qsurgeon.observing import Seen, observed, undisturbed
from qsurgeon.recipe import FormatSpec, Recipe, Rule

STATIC = {"e4m3-static": FormatSpec(like="fp8_e4m3", tensor_scale="static")}
MXFP4 = Recipe(version=1, rules=[Rule(target=["**"], weight="mxfp4", input="mxfp4")])
FP8 = Recipe(version=1, formats=STATIC, rules=[Rule(target=["**"], weight="e4m3-static", input="e4m3-static")])


class Noisy(nn.Module):
    """A model with all that a run can change: dropout, running statistics, a buffer that grows, and random numbers."""

    longest: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.second = nn.Linear(32, 32)
        self.register_buffer("longest", torch.zeros(()), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.fails = False

    def forward(self, x: Tensor) -> Any:
        self.longest = torch.maximum(self.longest, torch.tensor(float(len(x))))
        self.calls += 1
        y = self.drop(self.norm(self.first(x))) + torch.rand(32)
        if self.fails:
            raise RuntimeError("it fails")
        return self.second(y)


def looks(model: nn.Module) -> None:
    qsurgeon.inspect(model, {"x": torch.ones(4, 32)})


def calibrates(model: nn.Module) -> None:
    qsurgeon.calibrate(model, [{"x": torch.ones(4, 32)}])


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    buffers = dict(model.named_buffers())
    return modes, hooks, list(buffers), list(map(id, buffers.values())), [one.tolist() for one in buffers.values()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("recipe", "ask"), [(MXFP4, looks), (FP8, calibrates)])
def test_a_model_is_as_it_was_after_it_was_looked_at(
    recipe: Recipe, ask: Callable[[nn.Module], None], fails: bool
) -> None:
    model = qsurgeon.apply(recipe, Noisy())
    model.train()
    model.norm.eval()  # one part frozen, as people do
    model.fails = fails
    before, drawn = snapshot(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="it fails") if fails else nullcontext():
        ask(model)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)


def test_an_example_draws_no_random_number_of_a_training() -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        attention_dropout=0.5,
    )  # fmt: skip
    model = qsurgeon.apply(MXFP4, hf.LlamaForCausalLM(config)).train()
    ids = torch.arange(8)[None]
    torch.manual_seed(1)
    alone = model(ids).logits
    torch.manual_seed(1)
    qsurgeon.inspect(model, {"input_ids": ids})
    assert torch.equal(model(ids).logits, alone)


def test_frequencies_that_grow_with_the_length_are_restored() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=8, rope_parameters=rope,
    )  # fmt: skip
    model = qsurgeon.apply(MXFP4, hf.LlamaForCausalLM(config)).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with undisturbed(model):
        model(torch.arange(16)[None])
        grown = dict(model.named_buffers())
        assert any(not torch.equal(grown[name], values) for name, values in before.items())
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_each_call_is_seen_with_its_values_and_whether_it_trains() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    calls: list[Seen[nn.Module]] = []
    x = torch.randn(3, 4)
    with observed(dict(model.named_children()), calls.append):
        y = model(x)
        with torch.no_grad():
            model[1](input=torch.zeros(1, 8))
    model(x)
    assert [(call.name, call.trains) for call in calls] == [("0", True), ("1", True), ("1", False)]
    assert calls[0].input is x
    assert torch.equal(calls[1].output, y)
    assert calls[0].layer is model[0]


def test_what_looks_records_no_gradient() -> None:
    model = nn.Linear(4, 4)
    made: list[Tensor] = []
    with observed({"it": model}, lambda call: made.append(call.output * 2)):
        model(torch.randn(1, 4))
    assert not made[0].requires_grad


def test_a_call_without_values_is_not_seen() -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 4)
        calls: list[Seen[nn.Linear]] = []
        with observed({"it": model}, calls.append):
            model(torch.randn(1, 4))
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo of torch 2.13 does
def test_a_compiled_model_is_seen_too() -> None:
    plain = qsurgeon.apply(MXFP4, nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    model: Any = torch.compile(plain, backend="eager")
    model(torch.randn(1, 32))
    calls: list[Seen[Any]] = []
    with observed(quant_layers(model), calls.append), undisturbed(model):
        model(torch.randn(1, 32))
    assert len(calls) == 2


def test_a_failure_while_hooks_are_put_on_leaves_none() -> None:
    layers: dict[str, nn.Module] = {"good": nn.Linear(2, 2), "bad": deepcopy(nn.Linear(2, 2))}
    vars(layers["bad"])["register_forward_hook"] = lambda *_, **__: random.choice([])
    with pytest.raises(IndexError), observed(layers, print):
        pass
    assert not layers["good"]._forward_hooks
