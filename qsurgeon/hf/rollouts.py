"""Generation runs in the phase ``rollout``, and rounds each weight once: ``generate`` and continuous batching.

Changed are methods of classes (``patching.py``), and only once a model has a layer that rounds.
"""

from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import nn

from qsurgeon.errors import UsageError
from qsurgeon.layers import Quantization, generation, quant_layers, rollout_unless_told
from qsurgeon.layers.phases.around import around
from qsurgeon.layers.phases.state import State, current, inside
from qsurgeon.patching import Method, patch

# generate_speech is SpeechT5's. A module's own loop under another name is told by ``qsurgeon.phase("rollout")``.
GENERATING = ("generate", "generate_batch", "generate_speech")

_started: WeakKeyDictionary[Any, State] = WeakKeyDictionary()  # managers of continuous batching


def follow_rollouts(model: nn.Module, quantizations: Iterable[Quantization]) -> None:
    """Let what generates be in the phase ``rollout``, and keep rounded weights, once a model has a layer that rounds.

    That is ``generate`` of each class of modules that is there by now or is defined later (a model's own, a wrapper's,
    that of code which comes with a checkpoint), and of the modules of ``model`` where an object has its own.
    """
    if not any(quantizations):
        return
    for owner in {transformers.GenerationMixin, *_classes(nn.Module)}:
        _follow(owner)
    if "__init_subclass__" not in vars(nn.Module):  # torch 2.13 has object's, which is not written in Python
        nn.Module.__init_subclass__ = classmethod(_inherited)  # type: ignore[assignment, arg-type]
    patch(nn.Module, "__init_subclass__", _following)
    for module in model.modules():
        for name in GENERATING:
            own = vars(module).get(name)
            if isinstance(own, MethodType):  # stays one: who copies the module gets the copy's method
                vars(module)[name] = MethodType(_in_rollout(own.__func__), own.__self__)
            elif callable(own):
                vars(module)[name] = _in_rollout(own)
    manager = transformers.ContinuousBatchingManager
    patch(manager, "warmup", _in_rollout)
    patch(manager, "start", _starting)
    patch(manager, "add_request", _adding)


def _follow(owner: type) -> None:
    for name in GENERATING:
        if isinstance(vars(owner).get(name), FunctionType | staticmethod | classmethod):
            patch(owner, name, _in_rollout)


def _following(initialize: Method) -> Method:
    """Let the classes that are defined from now on be followed too, with those that they inherit from."""

    def initialize_and_follow(cls: type, **kwargs: Any) -> None:
        initialize(cls, **kwargs)
        for owner in cls.__mro__:
            _follow(owner)

    return initialize_and_follow


def _inherited(cls: Any, **kwargs: Any) -> None:
    """Do what nn.Module does for a new class: what the classes behind it do."""
    super(nn.Module, cls).__init_subclass__(**kwargs)


def _classes(base: type) -> Iterator[type]:
    """Yield the classes from which the subclasses of ``base`` have their methods."""
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from subclass.__mro__
        yield from _classes(subclass)


def _in_rollout(generate: Method) -> Method:
    return around(generate, generation)


def _starting(start: Method) -> Method:
    """Let a manager's thread run in the state in which ``start`` is called, and in a rollout."""

    def start_in_rollout(self: Any) -> None:
        with rollout_unless_told():
            before, _started[self] = _started.get(self), current()
            if before is not None and not before.is_like(_started[self]):
                # What the manager kept of its last session is CUDA graphs of another state.
                self.batch_processor, self.warmed_up = None, False
            start(self)

    return start_in_rollout


def _adding(add: Method) -> Method:
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = _started.get(self)
        if started is not None:
            _check_alike(self.model, started)
        return add(self, *args, **kwargs)

    return add_request


def _check_alike(model: nn.Module, started: State) -> None:
    """Do nothing if a rollout here rounds as the manager's does. Raises: UsageError."""
    with rollout_unless_told():
        here = current()
    if here.is_like(started) or _acting(model, here) == _acting(model, started):
        return
    raise UsageError(
        f"a request was made {here}, of a manager that was started {started}, and computes all requests so: "
        "start the manager inside the block, or make the request outside of it"
    )


def _acting(model: nn.Module, state: State) -> set[str]:
    with inside(state):
        return {name for name, layer in quant_layers(model).items() if layer.rounds}
