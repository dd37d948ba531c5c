"""Run a model and see what goes into its layers and what comes out, and leave the model as it was.

``observed`` is the one place that puts hooks on layers. ``undisturbed`` is the one place that prepares a model for a
run whose only purpose is to look: calibration, ``inspect`` with an example, and each later question of that kind.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from qsurgeon.layers.added import Added
from qsurgeon.layers.compiling import eagerly
from qsurgeon.layers.kinds import kind_of
from qsurgeon.torch_private import is_fake, own_buffers, without_tensor_modes

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Seen(Generic[Layer]):
    """One call of a layer: its input (..., inputs), its output (..., outputs), and whether it computed gradients.

    added: what was added to its weight in this call, if something was.
    """

    name: str
    layer: Layer
    input: Tensor
    output: Tensor
    trains: bool
    added: Added | None = None


@contextmanager
def observed(layers: Mapping[str, Layer], see: Callable[[Seen[Layer]], None]) -> Iterator[None]:
    """Call ``see`` after each call of one of ``layers`` inside the block. The hooks are removed at its end.

    ``see`` runs without gradients, and outside of modes that count or record operations (selective checkpointing).
    It is not called while torch.compile or a fake tensor traces a layer, because such a call has no values. Compiled
    code does not call hooks that are newer than itself: run the model in ``undisturbed`` or ``eagerly``.

    The hook is the first of its layer: FSDP has assembled the whole weight by then, and takes it away in a hook of its
    own.
    """
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(_hook(name, see), with_kwargs=True, prepend=True)
            hooks.callback(hook.remove)
        yield


def _hook(
    name: str, see: Callable[[Seen[Layer]], None]
) -> Callable[[Layer, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def hook(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        kind = kind_of(layer)
        x = (*args, *kwargs.values())[0] if kind is None else kind.input(args, kwargs)
        if torch.compiler.is_compiling() or is_fake(x):
            return
        trains = torch.is_grad_enabled()
        with torch.no_grad(), without_tensor_modes():
            see(Seen(name, layer, x, output, trains, kwargs.get("added")))

    return hook


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model be called inside the block, and be afterwards as it was before.

    It is called in evaluation mode (no dropout, no running statistics), eagerly, and without gradients. Each module's
    mode, the values of its buffers, and the states of torch's random number generators are restored, also after an
    error.
    """
    devices = {one.device for one in model.parameters() if one.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        for kind in sorted({device.type for device in devices}):
            ours = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(ours, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(_evaluating(model))
        stack.enter_context(_with_its_buffers(model))
        stack.enter_context(eagerly(model))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _with_its_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers, whether they were written to or replaced (rotary frequencies that grow with the length)."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in own_buffers(module).items()
        if buffer is not None and not buffer.is_meta
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in kept:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
                own_buffers(module)[name] = buffer
