"""Which norm's output goes straight into which layers, found by reading the code of modules.

``self.mlp(self.norm(x))`` says so, and so does a name that carries the output from one line to another, until it is
given another value. What is added to something first, or returned, goes nowhere that is seen here.
"""

import ast
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from qsurgeon.surgery.source import function_of, parsed

Names = dict[str, frozenset[str]]
NOTHING: frozenset[str] = frozenset()
_MOST_DEEP = 5  # modules in each other
# Methods of a tensor that neither mix nor change its values, but for rounding.
_SAME = frozenset({"bfloat16", "clone", "contiguous", "flatten", "float", "half", "reshape", "to", "transpose"} | {
    "type_as", "unsqueeze", "squeeze", "view"})  # fmt: skip


def feeds(model: nn.Module, norms: Collection[str], layers: Mapping[str, int]) -> set[str]:
    """Return which of ``norms``, by their paths, feed one of ``layers``: a path, and how many inputs it has.

    The output is followed into the modules that it is passed to, as their code passes it on. Where that cannot be seen,
    such a module counts as one that passes it to all layers in it that have as many inputs as the norm has outputs.
    """
    held: dict[str, dict[str, str]] = defaultdict(dict)
    for path in norms:
        parent, _, name = path.rpartition(".")
        held[parent][name] = path
    found = set()
    for parent, own in held.items():
        module = model.get_submodule(parent)
        for given in _read(module, frozenset(own), {}):
            path = own[given.source]
            width = model.get_submodule(path).get_parameter("weight").numel()
            if _reaches(model, _joined(parent, given.child), given.place, width, layers, _MOST_DEEP):
                found.add(path)
    return found


def _reaches(model: nn.Module, path: str, place: int | str, width: int, layers: Mapping[str, int], depth: int) -> bool:
    """Return whether what the module at ``path`` is given at a place of its arguments comes to one of ``layers``."""
    if path in layers:
        return True
    module = model.get_submodule(path)
    name = _parameter(module, place)
    given = _read(module, frozenset(), {name: frozenset({name})}) if name is not None and depth else set()
    if not given:
        return any(one.startswith(f"{path}.") and inputs == width for one, inputs in layers.items())
    return any(_reaches(model, _joined(path, one.child), one.place, width, layers, depth - 1) for one in given)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parameter(module: nn.Module, place: int | str) -> str | None:
    """Return what the forward of a module calls an argument of a call; None if that is not known."""
    function = function_of(type(module).forward)
    if function is None or isinstance(place, str):
        return None if function is None else str(place)
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    return names[place] if place < len(names) else None


class Given(NamedTuple):
    """That a module is called with what a name of the code, a norm or an argument, stands for: at which place."""

    source: str
    child: str
    place: int | str


def _read(module: nn.Module, norms: frozenset[str], names: Names) -> set[Given]:
    """Return what the forward of a module passes to its children, of the outputs of ``norms`` and of ``names``."""
    function = function_of(type(module).forward)
    tree = None if function is None else parsed(function)
    if tree is None:
        return set()
    reader = _Flow(norms, frozenset(name for name, _ in module.named_children()), names)
    reader.run(tree.body)
    return reader.found


class _Flow(ast.NodeVisitor):
    """Follows values through one function: the outputs of norms, and what ``names`` stand for."""

    def __init__(self, norms: frozenset[str], children: frozenset[str], names: Names) -> None:
        self.norms, self.children = norms, children
        self.names = dict(names)
        self.found: set[Given] = set()

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    # --- statements

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._value(node.value)
        self._forget(node.target)

    def visit_If(self, node: ast.If) -> None:
        self._value(node.test)
        before = dict(self.names)
        self.run(node.body)
        first, self.names = self.names, before
        self.run(node.orelse)
        self.names = {name: first.get(name, NOTHING) | self.names.get(name, NOTHING) for name in {*first, *self.names}}

    def visit_For(self, node: ast.For) -> None:
        self._value(node.iter)
        self._forget(node.target)
        self.run(node.body)

    def visit_Expr(self, node: ast.Expr) -> None:
        self._value(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            self._value(node.value)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            carried = [self._value(one) for one in value.elts]
            for one, what in zip(target.elts, carried, strict=True):
                self._set(one, what)
        else:
            self._set(target, self._value(value))

    def _set(self, target: ast.expr, carried: frozenset[str]) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = carried
        else:
            self._forget(target)

    def _forget(self, target: ast.expr) -> None:
        for one in ast.walk(target):
            if isinstance(one, ast.Name):
                self.names.pop(one.id, None)

    # --- expressions

    def _value(self, node: ast.expr) -> frozenset[str]:
        """Return what an expression is, by its source; note what goes into the modules that it calls."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name, NOTHING)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                given: list[tuple[int | str, ast.expr]] = [*enumerate(node.args)]
                given += [(one.arg, one.value) for one in node.keywords if one.arg]
                carried = [(place, source) for place, one in given for source in self._value(one)]
                if name in self.norms:
                    return frozenset({name})
                if name in self.children:
                    self.found |= {Given(source, name, place) for place, source in carried}
                return NOTHING
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _SAME:
                return self._value(value)
            case ast.IfExp(body=body, orelse=orelse):
                return self._value(body) | self._value(orelse)
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                self.names[name] = self._value(value)
                return self.names[name]
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child)
            elif isinstance(child, ast.keyword):
                self._value(child.value)
        return NOTHING
