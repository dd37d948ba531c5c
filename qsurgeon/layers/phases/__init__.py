"""When a QuantLinear rounds: in training, in rollouts, or in both, and not at all inside ``disabled``.

Which phase it is is a matter of the work, not of the model: one thread may evaluate a model in rollouts while another
trains it. ``state.py`` says where that stands, ``carrying.py`` how it reaches what works for the caller.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, get_args

from torch import nn

from qsurgeon.errors import UsageError, nearest
from qsurgeon.layers.phases.around import around
from qsurgeon.layers.phases.carrying import carry
from qsurgeon.layers.phases.keeping import Keeping
from qsurgeon.layers.phases.marks import is_among, number_of, numbers_of
from qsurgeon.layers.phases.state import Block, Noising, entered
from qsurgeon.layers.phases.state import current as _state
from qsurgeon.words import Phase, Phases

_Function = TypeVar("_Function", bound=Callable[..., Any])

carry()


class During(AbstractContextManager[None]):
    """What holds inside a ``with`` block, or inside each call of a function that it decorates.

    A coroutine function or a generator function may be decorated too: then it holds where they work. A generator that
    yields inside of a ``with`` block lends the block to whoever iterates it, as with all of Python's contexts.
    """

    def __init__(self, make: Callable[[], Block]) -> None:
        self._make = make
        self._entered: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        if self._entered is not None:
            raise UsageError("this block is entered already, and was not left; make another one for a second `with`")
        self._entered = entered(self._make())
        self._entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        inside, self._entered = self._entered, None
        if inside is not None:
            inside.__exit__(None, None, None)

    def __call__(self, function: _Function) -> _Function:
        """Return ``function`` such that each call of it is inside."""
        decorated: Any = around(function, lambda: entered(self._make()))
        return decorated  # type: ignore[no-any-return]


def phase(name: Phase) -> During:
    """Say what the model is called for inside the block: ``training`` (the default outside) or ``rollout``.

    A rule with ``phases: training`` does not round in rollouts, and the other way round. Inside ``model.generate``
    and in continuous batching the phase is rollout by itself, unless a block says otherwise.

    The phase follows the work. It reaches the tasks and callbacks of asyncio, the threads that are started inside
    (to their end), what is submitted inside to a thread pool, and all that a compiled model or gradient checkpointing
    computes; where ``backward`` is called makes no difference. It does not reach what others do meanwhile, in threads
    or tasks of their own, other processes, nor a thread that takes its work from a queue: enter the block there.

    Raises: UsageError for another name.
    """
    if name not in get_args(Phase):
        raise UsageError(f"no phase '{name}'; {nearest(name, get_args(Phase))}")
    return During(lambda: Block(name))


def rollout_unless_told() -> During:
    """Enter the phase ``rollout``, where no block has said which phase it is."""
    return During(lambda: Block("rollout", unless_told=True))


@contextmanager
def generation() -> Iterator[None]:
    """Enter the phase ``rollout``, where no block has said which phase it is, and keep rounded weights inside.

    Raises: UsageError, where the block ends, for a weight that changed inside and could not be seen to.
    """
    with _keeping(Block("rollout", unless_told=True), None):
        yield


@contextmanager
def rounded_once(most: int | None = None) -> Iterator[None]:
    """Round each weight once inside the block, for a loop of your own that generates as ``generate`` does.

    No weight may be trained inside: what changes one in a way that torch counts (an optimizer, ``load_state_dict``) is
    seen and costs another rounding, and what writes into ``weight.data`` is an error where the block ends. The rounded
    weights, as many bytes as the weights of the wrapped layers, are given back there. The phase stays what it is.

    most: how many bytes may be kept; what has no room is rounded at each call. Without it: see ``keep_at_most``.

    Raises: UsageError, where the block ends, for a weight that changed inside and could not be seen to.
    """
    with _keeping(Block(), most):
        yield


@contextmanager
def _keeping(block: Block, most: int | None) -> Iterator[None]:
    around_this = _state().keeping
    keeping = None if around_this is not None and around_this.is_open else Keeping(most)
    block.keeping = keeping
    with entered(block):
        try:
            yield
        except BaseException:
            if keeping is not None:
                keeping.drop()
            raise
        if keeping is not None:
            keeping.close()


def without(layers: Iterable[nn.Module]) -> During:
    """Let ``layers`` not round inside the block, which reaches as far as that of ``phase``."""
    found = list(layers)
    return During(lambda: Block(off=(number_of(found),) if found else ()))


def is_active(layer: nn.Module, phases: Phases) -> bool:
    """Return whether ``layer``, which rounds in ``phases``, rounds now."""
    state = _state()
    # Not asked for nothing: dynamo guards on what it reads of a layer, and would compile a block once for each.
    return phases in ("both", state.named or "training") and is_enabled(layer)


def with_noises(choose: Callable[[], Iterable[tuple[Sequence[nn.Module], Any, bool]]]) -> During:
    """Let norms have noise inside the block: for each group of them the moment, and whether there is any then."""

    def block() -> Block:
        return Block(noises=tuple(Noising(number_of(norms), moment, on) for norms, moment, on in choose() if norms))

    return During(block)


def is_noisy(norm: nn.Module, phases: Phases) -> bool:
    """Return whether ``norm``, which has noise in ``phases``, has some now."""
    state = _state()
    return (
        bool(state.noisy)
        and is_among(norm, state.noisy)
        and phases in ("both", state.named or "training")
        and is_enabled(norm)
    )


def is_enabled(layer: nn.Module) -> bool:
    """Return whether no block around disables ``layer``."""
    state = _state()
    return not (state.off and is_among(layer, state.off))


def moment_of(norm: nn.Module) -> Any:
    """Return the moment whose noise ``norm`` is to have now; None where nobody has said one."""
    numbers = numbers_of(norm)
    return next((one.moment for one in reversed(_state().noises) if one.number in numbers), None)


def current_phase() -> Phase:
    """Return what a model is called for now."""
    return _state().named or "training"
