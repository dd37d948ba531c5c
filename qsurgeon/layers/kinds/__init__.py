"""The kinds of modules that can be wrapped, in the order in which they are listed."""

from qsurgeon.layers.kinds.conv1d import CONV1D
from qsurgeon.layers.kinds.experts import EXPERTS
from qsurgeon.layers.kinds.kind import DEFAULT, KINDS, Kind, in_order, kind_in, kind_of, listed, register
from qsurgeon.layers.kinds.linear import LINEAR

__all__ = [
    "CONV1D",
    "DEFAULT",
    "EXPERTS",
    "KINDS",
    "LINEAR",
    "Kind",
    "in_order",
    "kind_in",
    "kind_of",
    "listed",
    "register",
]

for _kind in (LINEAR, CONV1D, EXPERTS):
    register(_kind)
