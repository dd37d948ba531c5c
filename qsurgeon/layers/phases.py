"""When a QuantLinear rounds: in training, in rollouts, or in both, and not at all inside ``without``.

torch's gradient checkpointing computes a forward pass again in the state that it was in the first time: importing this
module sees to it, as torch itself does for autocast and random numbers.

The state belongs to a thread. Dynamo guards on what it reads of a ``threading.local``, so that a compiled model
follows a change of phase by compiling once more; a ``contextvars.ContextVar`` it cannot read at all.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import nn
from torch.utils import checkpoint

from qsurgeon.errors import UsageError, nearest
from qsurgeon.formats import Phase, Phases
from qsurgeon.patching import Method, patch

_KEY = "qsurgeon.phase"  # of a copy that torch hands on to the threads that run a backward pass on a GPU


class _Here(threading.local):
    def __init__(self) -> None:
        # Dynamo needs attributes of the instance: those of the class are not guarded.
        self.phase: Phase | None = None
        self.disabled: frozenset[int] = frozenset()


_here = _Here()
_State = tuple[Phase | None, frozenset[int]]


def _state() -> _State:
    if not torch.compiler.is_compiling() and torch._C._is_key_in_tls(_KEY):
        state: _State = torch._C._get_obj_in_tls(_KEY)
        return state
    return _here.phase, _here.disabled


@contextmanager
def _entered(state: _State) -> Iterator[None]:
    # In a thread of a backward pass the two differ: what torch handed on is known to one of them alone.
    here, handed_on = (_here.phase, _here.disabled), _state()
    try:
        _set(state, state)
        yield
    finally:
        _set(here, handed_on)


def _set(here: _State, handed_on: _State) -> None:
    _here.phase, _here.disabled = here
    torch._C._stash_obj_in_tls(_KEY, handed_on)


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Say what the model is called for inside the block: ``training`` (the default outside) or ``rollout``.

    A rule with ``phases: training`` does not round in rollouts, and the other way round. Inside
    ``model.generate`` the phase is rollout by itself, unless a block says otherwise. Only the thread that enters the
    block is in the phase. Where ``backward`` is called makes no difference, with torch's gradient checkpointing too.

    Raises: UsageError for another name.
    """
    if name not in get_args(Phase):
        raise UsageError(f"no phase '{name}'; {nearest(name, get_args(Phase))}")
    with _entered((name, _state()[1])):
        yield


@contextmanager
def rollout_unless_told() -> Iterator[None]:
    """Enter the phase ``rollout``, where no block has said which phase it is."""
    named, disabled = _state()
    with _entered((named or "rollout", disabled)):
        yield


@contextmanager
def without(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``layers`` not round inside the block."""
    named, before = _state()
    with _entered((named, before | {id(layer) for layer in layers})):
        yield


def is_active(layer: nn.Module, phases: Phases) -> bool:
    """Return whether ``layer``, which rounds in ``phases``, rounds now."""
    named, off = _state()
    # Not asked for nothing: dynamo guards on an id that it reads, and would compile a block once for each layer.
    return (phases in ("both", named or "training")) and not (off and id(layer) in off)


def _computing_again_alike(begin: Method) -> Method:
    """Let ``begin(itself, function, ...)``, with which checkpointing begins, keep the state for ``function``."""

    def begin_in_state(itself: Any, function: Method, *args: Any, **kwargs: Any) -> Any:
        state = _state()

        def in_state(*inputs: Any) -> Any:
            with _entered(state):
                return function(*inputs)

        return begin(itself, in_state, *args, **kwargs)

    return begin_in_state


patch(checkpoint.CheckpointFunction, "forward", _computing_again_alike)  # reentrant
patch(checkpoint._CheckpointFrame, "__init__", _computing_again_alike)  # not reentrant
