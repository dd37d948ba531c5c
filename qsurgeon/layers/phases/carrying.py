"""The state of a piece of work follows it into threads and pools, where Python does not carry it itself.

Changed is, for all who run in a state (``state.py``):

- ``threading.Thread.start``: a thread runs in the state in which it was started, to its end.
- ``ThreadPoolExecutor.submit`` and the methods of ``multiprocessing.pool.ThreadPool``: a task runs in the state in
  which it was submitted, whenever the thread was made that runs it.
- torch's gradient checkpointing: a forward pass is computed again in the state that it was in the first time, as torch
  itself sees to it for autocast and random numbers.

Nothing reaches other processes, nor a thread that was there before and takes its work from a queue of its own.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

from torch.utils import checkpoint

from qsurgeon.layers.phases.state import State, current, inside
from qsurgeon.patching import Method, patch
from qsurgeon.torch_private import CheckpointFrame

_POOLED = ("apply", "apply_async", "imap", "imap_unordered", "map", "map_async", "starmap", "starmap_async")


def carry() -> None:
    """See to all that; a second call does nothing."""
    patch(threading.Thread, "start", _starting)
    patch(ThreadPoolExecutor, "submit", _submitting)
    for name in _POOLED:
        patch(ThreadPool, name, _pooling)
    patch(checkpoint.CheckpointFunction, "forward", _computing_again_alike)  # reentrant
    patch(CheckpointFrame, "__init__", _computing_again_alike)  # not reentrant


def _starting(start: Method) -> Method:
    def start_in_state(self: threading.Thread) -> None:
        state, own, run = current(), vars(self).get("run"), self.run

        def run_in_state() -> None:
            del vars(self)["run"]
            if own is not None:
                vars(self)["run"] = own
            with inside(state):
                run()

        vars(self)["run"] = run_in_state
        start(self)

    return start_in_state


def _submitting(submit: Method) -> Method:
    def submit_in_state(self: Any, fn: Method, /, *args: Any, **kwargs: Any) -> Any:
        return submit(self, _in_state(fn, current()), *args, **kwargs)

    return submit_in_state


def _pooling(method: Method) -> Method:
    def method_in_state(self: Any, func: Method, *args: Any, **kwargs: Any) -> Any:
        return method(self, _in_state(func, current()), *args, **kwargs)

    return method_in_state


def _in_state(function: Method, state: State) -> Method:
    def in_state(*args: Any, **kwargs: Any) -> Any:
        with inside(state):
            return function(*args, **kwargs)

    return in_state


def _computing_again_alike(begin_checkpoint: Method) -> Method:
    """Let ``begin_checkpoint(itself, function, ...)`` keep the state for ``function``."""

    def begin_in_state(itself: Any, function: Method, *args: Any, **kwargs: Any) -> Any:
        return begin_checkpoint(itself, _in_state(function, current()), *args, **kwargs)

    return begin_in_state
