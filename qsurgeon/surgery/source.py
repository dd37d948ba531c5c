"""What a module's code does with the weights of its submodules, found by reading its source.

A Linear that is called rounds; one whose ``weight`` its parent takes and multiplies with itself does not. No hook sees
that, and which inputs would show it is different for each model. So the source of ``forward`` is followed, and of what
it calls: names that stand for modules (``self.q_proj``, ``for layer in self.layers``), methods, functions that modules
are passed to. What has no source (compiled code), or takes a module from where no name leads, is not seen.
"""

import ast
import builtins
import inspect
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

ANY = "*"  # in a path: any of what a module holds
FIRST = "next(parameters())"  # in a path: the first of all its parameters
CALLED = "()"  # asked of a module: that it computes
HANDED = "(…)"  # asked of a weight: to be handed to a function that leaves it alone, in whose place a kernel may stand
_MOST_DEEP = 6  # functions that call each other

Path = tuple[str, ...]
Test = tuple[ast.expr, bool]  # a condition on the module, and what it has to be
Names = dict[str, set[Path]]


@dataclass(frozen=True)
class Use:
    """A weight that code takes.

    path: from the module whose code it is. what: the attribute that it asks of the weight, such as ``dtype``; nothing
    if it takes the values, HANDED if others may; CALLED for a module that may be called there, or is handed to who may.
    certain: whether it does so in every call in which ``tests`` hold. where: the function.
    """

    path: Path
    what: str
    certain: bool
    where: str
    tests: tuple[Test, ...] = ()


@dataclass(frozen=True)
class Call:
    """A method of a held module, which only the module itself can name."""

    path: Path
    method: str
    certain: bool
    tests: tuple[Test, ...] = ()


@dataclass
class _Found:
    uses: list[Use] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    read: set[Any] = field(default_factory=set)  # functions, with what their names stood for


@lru_cache(maxsize=4096)
def uses_in(kind: Any, method: str = "forward") -> tuple[tuple[Use, ...], tuple[Call, ...]]:
    """Return what ``method`` of a class of modules does with weights, and which methods of held modules it calls."""
    function = function_of(getattr(kind, method, None))
    if function is None:
        return (), ()
    found = _Found()
    _Reader(kind, function, {"self": {()}}, found).run()
    return tuple(dict.fromkeys(found.uses)), tuple(dict.fromkeys(found.calls))


def function_of(found: Any) -> FunctionType | None:
    """Return the function that decorators wrapped, if Python runs it."""
    found = inspect.unwrap(found) if callable(found) else None
    return found if isinstance(found, FunctionType) else None


@lru_cache(maxsize=4096)
def parsed(function: FunctionType) -> ast.FunctionDef | None:
    """Return the syntax tree of a function, or None for one without source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    first = tree.body[0]
    return first if isinstance(first, ast.FunctionDef) else None


def _asks_for_bytes(test: ast.expr) -> bool:
    """Return whether a condition asks if a dtype is uint8: code that does so knows of weights that are packed."""
    return any(isinstance(one, ast.Attribute) and one.attr == "uint8" for one in ast.walk(test))


class _Reader(ast.NodeVisitor):
    """Follows one function with what its names stand for, which are paths from a module."""

    def __init__(
        self, kind: type, function: FunctionType, names: Names, found: _Found, caller: "_Reader | None" = None
    ) -> None:
        self.kind, self.function, self.found = kind, function, found
        self.names: Names = {name: set(paths) for name, paths in names.items()}
        self.certain: bool = caller is None or caller.certain
        self.tests: tuple[Test, ...] = () if caller is None else caller.tests
        self.depth: int = 0 if caller is None else caller.depth + 1
        self.knows_bytes = False  # here a dtype is asked for by code that knows that it may be uint8
        self.is_owner = False  # what is visited owns an attribute that is asked for, which calls nothing

    def run(self) -> None:
        tree = parsed(self.function)
        again = (
            self.function,
            self.certain,
            self.tests,
            frozenset((name, frozenset(one)) for name, one in self.names.items()),
        )
        if tree is None or again in self.found.read:
            return
        self.found.read.add(again)
        parameters = [one.arg for one in (*tree.args.posonlyargs, *tree.args.args)]
        if parameters and "self" in self.names and parameters[0] != "self":
            self.names[parameters[0]] = self.names["self"]
        for statement in tree.body:
            self.visit(statement)

    # --- what may not happen

    def _maybe(self, *nodes: ast.AST) -> None:
        before, self.certain = self.certain, False
        for node in nodes:
            self.visit(node)
        self.certain = before

    def _branches(self, test: ast.expr, body: list[ast.AST], other: list[ast.AST]) -> None:
        """Visit both branches, each as what is done if the test comes out so."""
        before, knows = self.tests, self.knows_bytes
        self.knows_bytes = knows or _asks_for_bytes(test)
        self.visit(test)
        if self._is_of_module(test):
            for branch, outcome in ((body, True), (other, False)):
                self.tests = (*before, (test, outcome))
                for node in branch:
                    self.visit(node)
        else:
            self._maybe(*body, *other)
        self.tests, self.knows_bytes = before, knows

    def visit_If(self, node: ast.If) -> None:
        self._branches(node.test, [*node.body], [*node.orelse])
        if any(isinstance(one, ast.Return) for statement in node.body for one in ast.walk(statement)):
            # What comes after may not be reached.
            if self._is_of_module(node.test):
                self.tests = (*self.tests, (node.test, False))
            else:
                self.certain = False

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branches(node.test, [node.body], [node.orelse])

    def _is_of_module(self, test: ast.expr) -> bool:
        """Return whether a condition asks of nothing but the module, which knows the answer before it is called."""
        names = {one.id for one in ast.walk(test) if isinstance(one, ast.Name)}
        return self.names.get("self") == {()} and "self" in names and names <= {"self", "hasattr"}

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self._maybe(*node.values[1:])

    # --- names

    def visit_Assign(self, node: ast.Assign) -> None:
        paths = self._paths(node.value)
        if not paths:
            self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.names[target.id] = self.names.get(target.id, set()) | paths if not self.certain else set(paths)
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=False):
                    if isinstance(one, ast.Name):
                        self.names[one.id] = self._paths(value)
            else:
                self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, node.iter)
        for test in node.ifs:
            self.visit(test)

    def _comprehension(self, node: Any) -> None:
        for one in node.generators:
            self.visit(one)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(part)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension  # noqa: N815

    def _bind(self, target: ast.expr, iterable: ast.expr) -> None:
        """Let the names of a loop's target stand for what any of its iterables holds."""
        if isinstance(iterable, ast.Call):  # enumerate(…), zip(…), self.layers.values()
            held = self._paths(iterable) or {(*path, ANY) for one in iterable.args for path in self._paths(one)}
        else:
            held = {(*path, ANY) for path in self._paths(iterable)}
        if not held:
            self.visit(iterable)
        for one in ast.walk(target):
            if isinstance(one, ast.Name):
                self.names[one.id] = set(held)

    def _paths(self, node: ast.expr) -> set[Path]:
        """Return the modules and weights that an expression stands for; nothing for any other."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name, set())
            case ast.Attribute(value=value, attr=attr):
                return {(*path, attr) for path in self._paths(value) if "weight" not in path and FIRST not in path}
            case ast.Subscript(value=value, slice=index):
                paths = self._paths(value)
                return paths if isinstance(index, ast.Slice) else {(*path, ANY) for path in paths}
            case ast.IfExp(body=body, orelse=orelse):
                return self._paths(body) | self._paths(orelse)
            case ast.Call(func=ast.Attribute(value=value, attr="values" | "items" | "children")):
                return {(*path, ANY) for path in self._paths(value)}
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(attr)), *_]):
                return {(*path, attr) for path in self._paths(value)}
            case ast.Call(
                func=ast.Name(id="next"), args=[ast.Call(func=ast.Attribute(value=value, attr="parameters"))]
            ):
                return {(*path, FIRST) for path in self._paths(value)}
        return set()

    # --- weights

    def visit_Attribute(self, node: ast.Attribute) -> None:
        weights = [path for path in self._paths(node.value) if path[-1:] in (("weight",), (FIRST,))]
        for path in weights:
            self._use(path, node.attr)
        own = [path for path in self._paths(node) if path[-1:] == ("weight",)]
        for path in own:
            self._use(path, "")
        self._may_call(node)
        if not weights and not own:
            before, self.is_owner = self.is_owner, isinstance(node.value, ast.Attribute | ast.Name)
            self.visit(node.value)
            self.is_owner = before

    def visit_Name(self, node: ast.Name) -> None:
        self._may_call(node)
        if isinstance(node.ctx, ast.Load):
            for path in self.names.get(node.id, set()):
                if path[-1:] in (("weight",), (FIRST,)):
                    self._use(path, "")

    def _may_call(self, node: ast.expr) -> None:
        """Note the modules that an expression stands for, unless it only owns what is asked for."""
        for path in set() if self.is_owner else self._paths(node):
            module = path[:-1] if path[-1:] in (("forward",), ("__call__",)) else path
            if module and module[-1] not in ("weight", FIRST):
                self.found.uses.append(Use(module, CALLED, self.certain, self.function.__qualname__, self.tests))

    def _use(self, path: Path, what: str) -> None:
        if what == "dtype" and self.knows_bytes:
            return
        owner = path[:-1] if path[-1] == "weight" else path
        self.found.uses.append(Use(owner, what, self.certain, self.function.__qualname__, self.tests))

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(one, ast.Is | ast.IsNot) for one in node.ops):  # `is None` takes nothing of it
            self.generic_visit(node)

    # --- calls

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "id", "type"):
            return
        paths = self._paths(node)
        if any(path[-1:] in (("weight",), (FIRST,)) for path in paths):
            for path in paths:
                self._use(path, "")
            return
        given = [*node.args, *(one.value for one in node.keywords)]
        followed = self._follow(node)
        for one in (node.func, *given):
            modules = self._paths(one)
            if not (followed and one is not node.func and modules):
                self.visit(one)

    def _follow(self, node: ast.Call) -> bool:
        """Read the function that is called, if it is one of Python's; return whether it was."""
        function, owner, own = self._called(node.func)
        if function is None:
            return self._held(node)
        bound = self._arguments(function, node, skip=own is not None)
        if own is not None:
            bound["self"] = own
        elif not any(bound.values()):
            return False
        if self.depth < _MOST_DEEP:
            _Reader(owner, function, bound, self.found, self).run()
            self._note_handed(function, bound)
        return True

    def _note_handed(self, function: FunctionType, bound: Names) -> None:
        """Note the weights that a function got of which it uses nothing."""
        used = {use.path for use in self.found.uses if use.what != CALLED}
        handed = {path[:-1] for paths in bound.values() for path in paths if path[-1:] == ("weight",)}
        self.found.uses += [Use(one, HANDED, False, function.__qualname__, self.tests) for one in handed - used]

    def _called(self, called: ast.expr) -> tuple[FunctionType | None, type, set[Path] | None]:
        """Return the function that an expression names, the class to look further in, and what its ``self`` is."""
        found: Any = None
        own: set[Path] | None = None
        match called:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if self.names.get("self") == {()}:
                found, own = inspect.getattr_static(self.kind, name, None), {()}
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                found, own = self._inherited(name), self.names.get("self", set())
            case ast.Name(id=name) if name not in self.names and not hasattr(builtins, name):
                found = self.function.__globals__.get(name)
        if isinstance(found, staticmethod):
            found, own = found.__func__, None
        return function_of(found), self.kind, own

    def _inherited(self, name: str) -> Any:
        """Return what ``super().name`` is in this function."""
        free = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=False))
        if "__class__" not in free:
            return None
        order = self.kind.__mro__
        at = free["__class__"].cell_contents
        behind = order[order.index(at) + 1 :] if at in order else ()
        return next((vars(one)[name] for one in behind if name in vars(one)), None)

    def _held(self, node: ast.Call) -> bool:
        """Note a method of a held module."""
        if not isinstance(node.func, ast.Attribute):
            return False
        paths = {path for path in self._paths(node.func.value) if path and path[-1] not in ("weight", FIRST)}
        self.found.calls += [Call(path, node.func.attr, self.certain, self.tests) for path in paths]
        return False

    def _arguments(self, function: FunctionType, node: ast.Call, *, skip: bool) -> Names:
        """Return what the parameters of a function stand for in a call of it."""
        code = function.__code__
        parameters = code.co_varnames[int(skip) : code.co_argcount + code.co_kwonlyargcount]
        bound = {name: self._paths(one) for name, one in zip(parameters, node.args, strict=False)}
        bound |= {one.arg: self._paths(one.value) for one in node.keywords if one.arg}
        return {name: paths for name, paths in bound.items() if paths}
