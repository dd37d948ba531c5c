"""When a layer rounds: by phase, by thread, and not at all for a teacher."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qsurgeon
from qsurgeon.errors import NothingWrappedError, UsageError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear, rollout_unless_told

MXFP4 = get_format("mxfp4")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def make(phases: str = "both") -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    QuantLinear.wrap(linear, Quantization(MXFP4, MXFP4, phases=phases))
    return linear


def plain(linear: nn.Linear) -> Tensor:
    return nn.functional.linear(X, linear.weight, linear.bias)


def rounds(linear: nn.Linear) -> bool:
    """Return whether the layer rounds now; it must give one of the two outputs, to the bit."""
    y = linear(X)
    rounded = nn.functional.linear(MXFP4.fake_quantize(X), MXFP4.fake_quantize(linear.weight.detach()), linear.bias)
    assert torch.equal(y, plain(linear)) != torch.equal(y, rounded)
    return torch.equal(y, rounded)


@pytest.mark.parametrize(
    ("phases", "training", "rollout"), [("both", True, True), ("training", True, False), ("rollout", False, True)]
)
def test_a_layer_rounds_in_its_phases(phases: str, training: bool, rollout: bool) -> None:
    linear = make(phases)
    assert rounds(linear) is training
    with qsurgeon.phase("training"):
        assert rounds(linear) is training
    with qsurgeon.phase("rollout"):
        assert rounds(linear) is rollout
        with qsurgeon.phase("training"):
            assert rounds(linear) is training
        assert rounds(linear) is rollout
    assert rounds(linear) is training


def test_a_phase_that_is_named_wins_over_what_generate_says() -> None:
    linear = make("training")
    with rollout_unless_told():
        assert not rounds(linear)
    with qsurgeon.phase("training"), rollout_unless_told():
        assert rounds(linear)


def test_an_exception_leaves_the_phase() -> None:
    linear = make("training")
    with pytest.raises(ZeroDivisionError), qsurgeon.phase("rollout"):
        raise ZeroDivisionError
    assert rounds(linear)
    with pytest.raises(ZeroDivisionError), qsurgeon.disabled(linear):
        raise ZeroDivisionError
    assert rounds(linear)


def test_another_name_is_refused() -> None:
    with pytest.raises(UsageError) as caught, qsurgeon.phase("rolout"):  # type: ignore[arg-type]
        pass
    assert str(caught.value) == "no phase 'rolout'; did you mean 'rollout'?"


def test_disabled_is_full_precision_for_that_model_alone() -> None:
    student, teacher = make(), make()
    with qsurgeon.disabled(nn.Sequential(teacher)):
        assert rounds(student)
        assert not rounds(teacher)
        with qsurgeon.disabled(student), qsurgeon.phase("rollout"):
            assert not rounds(student)
            assert not rounds(teacher)
        assert rounds(student)
    assert rounds(teacher)


def test_disabled_gives_the_gradients_of_nn_linear() -> None:
    linear = make()
    x = X.clone().requires_grad_()
    with qsurgeon.disabled(linear):
        linear(x).square().sum().backward()
    found: list[Any] = [x.grad, linear.weight.grad]
    x.grad = linear.weight.grad = None
    nn.functional.linear(x, linear.weight, linear.bias).square().sum().backward()
    expected: list[Any] = [x.grad, linear.weight.grad]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_there_is_nothing_to_disable_in_a_model_that_is_not_wrapped() -> None:
    with pytest.raises(NothingWrappedError) as caught, qsurgeon.disabled(nn.Sequential(nn.Linear(2, 2))):
        pass
    assert str(caught.value) == "no module of Sequential is wrapped: there is nothing to disable"


def test_a_phase_belongs_to_the_thread_that_entered_it() -> None:
    linear, found = make("training"), {}
    inside, go = threading.Event(), threading.Event()

    def roll_out() -> None:
        with qsurgeon.phase("rollout"), qsurgeon.disabled(linear):
            inside.set()
            go.wait()
            found["rollout"] = rounds(linear)

    thread = threading.Thread(target=roll_out)
    thread.start()
    inside.wait()
    found["training"] = rounds(linear)
    go.set()
    thread.join()
    assert found == {"rollout": False, "training": True}


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
def test_a_compiled_model_follows_the_phase_and_the_thread() -> None:
    linear = make("training")
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    rounded, full = linear(X), plain(linear)
    assert torch.equal(compiled(X), rounded)
    with qsurgeon.phase("rollout"):
        assert torch.equal(compiled(X), full)
    with qsurgeon.disabled(linear):
        assert torch.equal(compiled(X), full)
    found = []
    thread = threading.Thread(target=lambda: found.append(compiled(X)))
    with qsurgeon.phase("rollout"):
        thread.start()
        thread.join()
    assert torch.equal(found[0], full)
    assert torch.equal(compiled(X), rounded)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("saved_inputs", ["packed", "full"])
@pytest.mark.parametrize("rounded", ["both", "weight", "input"])
def test_what_is_recomputed_is_what_was_computed_wherever_backward_is_called(
    rounded: str, saved_inputs: Any, reentrant: bool, inside: bool
) -> None:
    linear = nn.Linear(64, 64)
    weight, input = MXFP4 if rounded != "input" else None, MXFP4 if rounded != "weight" else None
    how = Quantization(weight, input, phases="training", saved_inputs=saved_inputs)
    QuantLinear.wrap(linear, how)
    x = X.clone().requires_grad_()
    with qsurgeon.phase("rollout"):
        y = checkpoint(linear, x, use_reentrant=reentrant)
        if inside:
            y.square().sum().backward()
    if not inside:
        y.square().sum().backward()
    assert torch.equal(x.grad, (2 * plain(linear)) @ linear.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_student_is_recomputed_rounded_inside_of_its_teachers_block(reentrant: bool) -> None:
    def gradient(checkpointed: bool) -> Tensor:
        linear, x = make(), X.clone().requires_grad_()
        y = checkpoint(linear, x, use_reentrant=reentrant) if checkpointed else linear(x)
        with qsurgeon.disabled(linear):
            (y - linear(X).detach()).square().sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(checkpointed=True), gradient(checkpointed=False))


def test_the_state_is_what_it_was_after_a_recomputation_that_stopped_early_or_failed() -> None:
    linear = make("training")

    def failing(x: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("out of memory")
        return torch.sin(linear(x))

    x = X.clone().requires_grad_()
    with qsurgeon.phase("rollout"):
        y = checkpoint(failing, x, use_reentrant=False)
        assert not rounds(linear)
    with pytest.raises(RuntimeError, match="out of memory"):
        y.sum().backward()
    assert rounds(linear)
