"""When a layer rounds: by phase, by thread, and not at all for a teacher."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import qsurgeon
from qsurgeon.errors import NothingWrappedError, UsageError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear, rollout_unless_told

MXFP4 = get_format("mxfp4")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def make(phases: str = "both") -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    QuantLinear.wrap(linear, Quantization(MXFP4, MXFP4, phases=phases))  # type: ignore[arg-type]
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
    found = [x.grad, linear.weight.grad]
    x.grad = linear.weight.grad = None
    nn.functional.linear(x, linear.weight, linear.bias).square().sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(found, [x.grad, linear.weight.grad], strict=True))


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
            assert go.wait(30)
            found["rollout"] = rounds(linear)

    thread = threading.Thread(target=roll_out)
    thread.start()
    assert inside.wait(30)
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
    with qsurgeon.phase("rollout"):
        thread = threading.Thread(target=lambda: found.append(compiled(X)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], rounded)
    assert torch.equal(compiled(X), rounded)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointing_the_backward_pass_belongs_inside(reentrant: bool) -> None:
    linear = make("training")
    x = X.clone().requires_grad_()
    with qsurgeon.phase("rollout"):
        checkpoint(linear, x, use_reentrant=reentrant).square().sum().backward()
    y = nn.functional.linear(X, linear.weight, linear.bias)
    assert torch.equal(x.grad, (2 * y) @ linear.weight)  # type: ignore[arg-type]


def test_a_recomputation_in_another_phase_is_loud() -> None:
    linear = make("training")
    x = X.clone().requires_grad_()
    with qsurgeon.phase("rollout"):
        y = checkpoint(linear, x, use_reentrant=False)
    with pytest.raises(CheckpointError):
        y.sum().backward()
