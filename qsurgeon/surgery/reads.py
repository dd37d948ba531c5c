"""Which modules take the weight of a Linear themselves, instead of calling it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from qsurgeon.surgery.source import ANY, FIRST, Path, uses_in

_MOST_DEEP = 4  # methods of held modules that call such methods


@dataclass(frozen=True)
class Reader:
    """Code that takes a weight.

    by: the module that does, by its path. where: the function. what: the attribute that it asks of the weight; nothing
    if it takes the values. certain: whether it does so whenever it is called.
    """

    by: str
    where: str
    what: str
    certain: bool


def weight_readers(model: nn.Module) -> dict[str, tuple[Reader, ...]]:
    """Return what takes the weight of each Linear of ``model`` that something takes, by the Linear's path."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, dict[Reader, None]] = defaultdict(dict)
    for path, module in model.named_modules():
        for owner, reader in _taken(module, path, "forward", True, 0):
            if isinstance(owner, nn.Linear) and owner is not module and id(owner) in paths:
                found[paths[id(owner)]][reader] = None
    return {path: tuple(readers) for path, readers in found.items()}


def _taken(module: nn.Module, by: str, method: str, certain: bool, depth: int) -> Iterator[tuple[nn.Module, Reader]]:
    """Yield the owner of each weight that a method of ``module`` takes, and what takes it."""
    kind: Any = type(module)
    uses, calls = uses_in(kind, method)
    for use in uses:
        for owner in _owners(module, use.path):
            yield owner, Reader(by, use.where, use.what, certain and use.certain)
    if depth == _MOST_DEEP:
        return
    for call in calls:
        for held in _at(module, call.path):
            yield from _taken(held, by, call.method, certain and call.certain, depth + 1)


def _owners(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    if path[-1:] != (FIRST,):
        yield from _at(module, path)
        return
    for held in _at(module, path[:-1]):
        first = next(held.named_parameters(), ("", None))[0]
        if first.rpartition(".")[2] == "weight":
            yield held.get_submodule(first.rpartition(".")[0])


def _at(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Yield the modules that a path leads to."""
    if not path:
        yield module
        return
    for name, held in module.named_children():
        if path[0] in (ANY, name):
            yield from _at(held, path[1:])
