"""Monkey-patches of third-party methods and functions. Every patch is made here."""

import sys
from collections.abc import Callable
from functools import wraps
from inspect import getattr_static
from types import ModuleType
from typing import Any

_DONE = "patched_by_qsurgeon"

Method = Callable[..., Any]


def patch(owner: type | ModuleType, name: str, make: Callable[[Method], Method]) -> None:
    """Replace a method of a class, or a function of a module, by what ``make`` makes of it.

    A second call for the same ``make`` does nothing.

    A method of the class, because one of an object would be lost by whoever copies it, and trainers call methods of
    what they unwrapped themselves. A staticmethod stays one, and a classmethod.
    """
    found = getattr_static(owner, name)
    kind = type(found) if isinstance(found, (staticmethod, classmethod)) else None
    method = found if kind is None else found.__func__
    maker = f"{make.__module__}.{make.__qualname__}"
    done: tuple[str, ...] = getattr(method, _DONE, ())
    if maker in done:
        return
    new = wraps(method)(make(method))
    vars(new)[_DONE] = (*done, maker)
    setattr(owner, name, new if kind is None else kind(new))


def patch_function(owner: ModuleType, name: str, make: Callable[[Method], Method]) -> None:
    """Replace a function as ``patch`` does, and also where modules of its library have imported it by its name."""
    before = vars(owner)[name]
    patch(owner, name, make)
    library = owner.__name__.partition(".")[0]
    for module in [one for key, one in sys.modules.items() if key.partition(".")[0] == library and one is not owner]:
        if vars(module).get(name) is before:
            setattr(module, name, vars(owner)[name])
