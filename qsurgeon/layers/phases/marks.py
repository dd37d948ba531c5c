"""Numbers by which a state refers to layers, so that dynamo guards on what many layers have in common.

Guarding on a layer's ``id`` would compile a block once for each layer, and stop at dynamo's limit of recompilations.
All layers of a model have the same number.
"""

import threading
from collections.abc import Sequence
from itertools import count

from torch import nn

_MARKS = "_marks_of_qsurgeon"
_numbers = count(1)
_sizes: dict[int, int] = {}  # how many layers have a number
_marking = threading.Lock()


class _Marks:
    """The numbers of one layer. A replica has those of its original, a copy or a pickle none: it is another model."""

    __slots__ = ("numbers",)

    def __init__(self, numbers: tuple[int, ...] = ()) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[type["_Marks"], tuple[()]]:
        return _Marks, ()


def number_of(layers: Sequence[nn.Module]) -> int:
    """Return the number that exactly these layers share; they get one, if they have none yet."""
    with _marking:
        shared = set.intersection(*(set(numbers_of(layer)) for layer in layers))
        for number in sorted(shared):
            if _sizes[number] == len(layers):
                return number
        new = next(_numbers)
        _sizes[new] = len(layers)
        for layer in layers:
            vars(layer)[_MARKS] = _Marks((*numbers_of(layer), new))
        return new


def is_among(layer: nn.Module, numbers: tuple[int, ...]) -> bool:
    """Return whether one of ``numbers`` is the layer's."""
    return any(number in numbers for number in numbers_of(layer))


def numbers_of(layer: nn.Module) -> tuple[int, ...]:
    """Return all numbers of a layer."""
    marks: _Marks | None = getattr(layer, _MARKS, None)
    return () if marks is None else marks.numbers
