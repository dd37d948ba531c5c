"""The state in which code runs: its phase, and the models that do not round in it.

The state stands in a ``contextvars.ContextVar``: asyncio hands it to tasks, to callbacks and to ``asyncio.to_thread``,
and two coroutines of one thread do not see each other's. What Python hands on to nobody is in ``carrying.py``.

Each block that is open is an object of its own. Leaving a block removes that block, and does not put back what was
there before it: blocks may be left in any order, and none is left behind.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, Token
from typing import Any, NamedTuple
from weakref import WeakSet

import torch

from qsurgeon.layers.phases.keeping import Keeping
from qsurgeon.torch_private import hand_on, hand_on_no_more, handed_on, is_handed_on
from qsurgeon.words import Phase

_current: ContextVar["State"] = ContextVar("qsurgeon.state")
_changing = threading.RLock()  # not a Lock: the garbage collector may close a generator, and leave its block, anywhere

# torch hands what lies under these keys on to the threads of a GPU that run a backward pass, where the context is
# empty. The first is its own: a copy of the caller's context, until the first backward pass ends that lies
# inside of this one. The second is ours, and there as long as a block is open.
_CONTEXT, _STATE = "context", "qsurgeon.state"


class Noising(NamedTuple):
    """That some norms (by their number) have the noise of a moment, or none at that moment if it is not ``on``."""

    number: int
    moment: Any  # a layers.noise.Moment
    on: bool


class Block:
    """What one ``with`` asks for: a phase, or that some layers do not round (by their numbers, see ``marks.py``).

    unless_told: the phase holds only where no block around has named one. keeping: where rounded weights are kept.
    noises: which norms have noise.
    """

    __slots__ = ("keeping", "named", "noises", "off", "states", "unless_told")

    def __init__(
        self,
        named: Phase | None = None,
        off: tuple[int, ...] = (),
        *,
        unless_told: bool = False,
        keeping: Keeping | None = None,
        noises: tuple[Noising, ...] = (),
    ) -> None:
        self.named, self.off, self.unless_told, self.keeping = named, off, unless_told, keeping
        self.noises = noises
        self.states: WeakSet[State] = WeakSet()  # those that it is a part of


class State:
    """What all open blocks come to: the phase that was named, if one was, and the numbers of what does not round.

    noises: of norms, the last that was said of each number; noisy: the numbers of those that have noise.

    Dynamo cannot trace a ContextVar. But it takes a property whose getter is written in C for a field: it guards on
    what the property returns, and asks it again at each call (torch 2.13, UserDefinedObjectVariable). So a compiled
    model follows the state of whoever calls it, and compiles once for each value of what it has read.
    """

    __slots__ = ("__weakref__", "blocks", "keeping", "named", "noises", "noisy", "off")

    blocks: tuple[Block, ...]
    named: Phase | None
    off: tuple[int, ...]
    noises: tuple[Noising, ...]
    noisy: tuple[int, ...]
    keeping: Keeping | None
    now = property(_current.get)  # the state here; where none was set, the object that was asked itself

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self._become(blocks)
        with _changing:
            for block in blocks:
                block.states.add(self)

    def __repr__(self) -> str:
        return f"State(named={self.named!r}, off={self.off})"

    def __str__(self) -> str:
        return f"in phase '{self.named or 'training'}'" + (
            (" with a model disabled" if self.off else "")
            + "".join(f" with the noise of step {one.moment.step}" for one in self.noises if one.on)
        )

    def is_like(self, other: "State") -> bool:
        """Return whether all layers do the same in both."""
        mine, its = ({one for one in state.noises if one.on} for state in (self, other))
        return (self.named or "training", self.off, mine) == (other.named or "training", other.off, its)

    def with_(self, block: Block) -> "State":
        """Return the state inside of one more block."""
        return State((*self.blocks, block))

    def without(self, block: Block) -> "State":
        """Return the state in which ``block`` was left."""
        return State(tuple(one for one in self.blocks if one is not block))

    def forget(self, block: Block) -> None:
        """Leave ``block``, for all who have this state."""
        self._become(tuple(one for one in self.blocks if one is not block))

    def _become(self, blocks: tuple[Block, ...]) -> None:
        named: Phase | None = None
        for block in blocks:
            if block.named is not None and not (block.unless_told and named):
                named = block.named
        self.blocks, self.named = blocks, named
        self.off = tuple(sorted({number for block in blocks for number in block.off}))
        noises = {one.number: one for block in blocks for one in block.noises}
        self.noises = tuple(noises[number] for number in sorted(noises))
        self.noisy = tuple(one.number for one in self.noises if one.on)
        self.keeping = next((block.keeping for block in reversed(blocks) if block.keeping is not None), None)


NOTHING = State(())  # outside of all blocks
_asked = State(())  # returns itself where nobody has set a state yet


def current() -> State:
    """Return the state of the work at hand."""
    state: State = _asked.now
    return _handed_on() if state is _asked and not torch.compiler.is_compiling() else state


def _handed_on() -> State:
    """Return the state of a thread that Python did not start: in a backward pass, that of whoever called it."""
    if is_handed_on(_CONTEXT):
        context: Context = handed_on(_CONTEXT)
        if _current in context:
            return context[_current]
    found: State = handed_on(_STATE) if is_handed_on(_STATE) else NOTHING
    return found


def _hand_on(state: State) -> None:
    if state.blocks:
        hand_on(_STATE, state)
    elif is_handed_on(_STATE):
        hand_on_no_more(_STATE)  # a thread that ended with an object there would hang


@contextmanager
def inside(state: State) -> Iterator[None]:
    """Run the block in ``state``, whatever the state is around it. It must not be suspended meanwhile."""
    before, token = current(), _current.set(state)
    _hand_on(state)
    try:
        yield
    finally:
        _current.reset(token)
        _hand_on(before)


@contextmanager
def entered(block: Block) -> Iterator[None]:
    """Run what is inside the ``with`` inside ``block`` too."""
    state = current().with_(block)
    token = _current.set(state)
    _hand_on(state)
    try:
        yield
    finally:
        _leave(block, state, token)
        _hand_on(current())


def _leave(block: Block, state: State, token: Token[State]) -> None:
    now = current()
    try:
        _current.reset(token)
    except ValueError:
        # The block is left in another context than it was entered in: an asynchronous generator that the event loop
        # closes, or any that the garbage collector does. Nobody will come back to leave it where it was entered.
        _forget(block)
        return
    if now is not state:  # another block was entered since, and is still open
        _current.set(now.without(block))
        if block not in now.blocks:
            _forget(block)


def _forget(block: Block) -> None:
    with _changing:
        for state in list(block.states):
            state.forget(block)


_current.set(NOTHING)  # here, and so in all contexts that are copied from this one
