"""Which code reads the weight of a layer itself instead of calling the layer."""

import ast
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from qsurgeon.layers.kinds import KINDS
from qsurgeon.layers.layer import USUAL
from qsurgeon.surgery.inventory import Module, inventory
from qsurgeon.surgery.reader import Reader
from qsurgeon.surgery.source import ANY, CALLED, FIRST, Path, Test, Use, uses_in
from qsurgeon.torch_private import children
from qsurgeon.transformers_private.attributes import SET_ON_CONFIGS

_MOST_DEEP = 4  # methods of held modules that call such methods
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def modules_of(model: nn.Module) -> tuple[Module, ...]:
    """Return the inventory of ``model``, with what takes the weights of those that can be wrapped."""
    found = weight_readers(model)
    return tuple(replace(one, readers=found.get(one.path, ())) for one in inventory(model))


def weight_readers(model: nn.Module) -> dict[str, tuple[Reader, ...]]:
    """Return what takes the weights of each layer of ``model`` that something takes, by the layer's path.

    Where nothing calls the layer, whatever takes its values is certain to compute past it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    sources = tuple(kind.source for kind in KINDS.values())
    found: dict[str, dict[Reader, None]] = defaultdict(dict)
    called = set[str]()
    for module in model.modules():
        if type(module).__module__.startswith("peft."):  # adapters.py says what was measured of those
            continue
        for owner, reader in _taken(module, "forward", True, 0):
            if isinstance(owner, sources) and owner is not module and id(owner) in paths:
                if reader.what == CALLED:
                    called.add(paths[id(owner)])
                else:
                    found[paths[id(owner)]][reader] = None
    return {
        path: tuple(one if path in called else replace(one, certain=one.certain or one.what == "") for one in readers)
        for path, readers in found.items()
    }


def _taken(module: nn.Module, method: str, certain: bool, depth: int) -> Iterator[tuple[nn.Module, Reader]]:
    """Yield the owner of each weight that a method of ``module`` takes, and what takes it."""
    kind: Any = type(module)
    uses, calls = uses_in(kind, method)
    for use in uses:
        outcome = _outcome(module, use.tests)
        if outcome is not False:
            for owner in _owners(module, use):
                yield owner, Reader(use.where, use.what, certain and use.certain and outcome is True)
    if depth == _MOST_DEEP:
        return
    for call in calls:
        outcome = _outcome(module, call.tests)
        if outcome is not False:
            for held in _at(module, call.path):
                if isinstance(held, nn.Linear):  # called by its forward, which a wrapped one has too
                    continue
                yield from _taken(held, call.method, certain and call.certain and outcome is True, depth + 1)


def _owners(module: nn.Module, use: Use) -> Iterator[nn.Module]:
    """Yield the modules whose weight code takes, or that it may call."""
    if use.path[-1:] == (FIRST,):
        for held in _at(module, use.path[:-1]):
            first = next(held.named_parameters(), ("", None))[0]
            if first.rpartition(".")[2] == USUAL:
                yield held.get_submodule(first.rpartition(".")[0])
        return
    for held in _at(module, use.path):
        yield held
        if use.what == CALLED and isinstance(held, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from held.children()


def _at(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Yield the modules that a path leads to; a layer of peft's is passed over for the layer that it holds."""
    if not path:
        held = children(module).get("base_layer")
        yield module if held is None else held
        return
    for name, held in module.named_children():
        if path[0] in (ANY, name):
            yield from _at(held, path[1:])


# --- what a condition on a module comes to


class _UnknownError(Exception):
    """What a condition asks of is known only when the module is called."""


def _outcome(module: nn.Module, tests: Iterable[Test]) -> bool | None:
    """Return whether all ``tests`` come out as they have to; None if that is not known."""
    known: bool | None = True
    for test, wanted in tests:
        try:
            if bool(_value(test, module)) is not wanted:
                return False
        except _UnknownError:
            known = None
    return known


def _value(node: ast.expr, module: nn.Module) -> Any:
    """Return what an expression comes to for ``module``. Raises: _UnknownError."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id="self"):
            return module
        case ast.Attribute(value=value, attr=attr) if attr != "training":
            return _attribute(_value(value, module), attr)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, module)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(one, module) for one in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_value(one, module) for one in values)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            try:
                return _COMPARE[type(op)](_value(left, module), _value(right, module))
            except TypeError as error:
                raise _UnknownError from error
        case ast.Call(func=ast.Name(id="hasattr"), args=[value, ast.Constant(value=str(attr))]):
            return attr == SET_ON_CONFIGS or hasattr(_value(value, module), attr)
    raise _UnknownError


def _attribute(owner: Any, name: str) -> Any:
    """Return what ``owner`` has under a name, if that runs no code."""
    if isinstance(getattr(type(owner), name, None), property) or not hasattr(owner, name):
        raise _UnknownError
    return getattr(owner, name)
