"""Private names of torch stand in qsurgeon/torch_private, and nowhere else in the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch, checkpoint

import qsurgeon
from qsurgeon import torch_private

PACKAGE = Path(qsurgeon.__file__).parent
HOME = PACKAGE / "torch_private"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names() -> set[str]:
    """Return the private names of torch that a program could come upon."""
    owners: tuple[object, ...] = (
        torch,
        torch._C,
        torch._C._functorch,
        torch.ops,
        torch.ops.aten,
        torch.compiler,
        torch.distributed,
    )
    owners += (Tensor, nn.Parameter, nn.Module, nn.Linear, forward_ad, checkpoint, _python_dispatch)
    found = {name for owner in owners for name in dir(owner)} | set(vars(nn.Linear(1, 1)))
    operators = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return {name for name in found | operators | set(torch_private.HOLDING) if _is_private(name)}


NAMES = private_names()


def documentation(tree: ast.AST) -> set[int]:
    """Return which nodes are docstrings."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def own(tree: ast.AST) -> set[str]:
    """Return the names that a file gives itself: functions, classes, attributes that it writes and declares."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return found


def uses(text: str) -> Iterator[str]:
    """Yield the private names of torch that a file's text uses, each with its line."""
    tree = ast.parse(text)
    told, mine = documentation(tree), own(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [one.name for one in names]
            case ast.ImportFrom(module=module, names=names):
                modules = [f"{module}.{one.name}" for one in names]
            case ast.Attribute(attr=name) if name in NAMES - mine:
                modules = [f"torch.{name}"]
            case ast.Constant(value=str(word)) if id(node) not in told:
                parts = word.split()
                modules = [f"torch.{one}" for one in parts if one in NAMES - mine]
                modules += [one for one in parts if one.startswith("torch._")]
            case _:
                continue
        for module in modules:
            if module.startswith("torch.") and any(map(_is_private, module.split("."))):
                yield f"{getattr(node, 'lineno', 0)}: {module}"


def test_private_names_of_torch_have_one_home() -> None:
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if HOME not in file.parents]
    found = [f"{file.relative_to(PACKAGE)}:{use}" for file in files for use in uses(file.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "import torch\nx = torch._dynamo.maybe_mark_dynamic",
        "from torch._subclasses.fake_tensor import is_fake",
        "import torch._inductor.config",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from torch.utils.checkpoint import _CheckpointFrame",
        "def f(x): return x._version",
        "def f(x): return x._is_view()",
        "def f(module): return module._modules",
        "def f(module): return module._compiled_call_impl",
        "def f(module): return vars(module)['_orig_mod']",
        "def f(module): return hasattr(module, '_forward_hooks')",
        "NAMES = '''clone _to_copy detach'''",
        "def f(x): return torch.ops.aten._unsafe_view(x, x.shape)",
        "def f(error): return type(error).__module__.startswith('torch._dynamo')",
    ],
)
def test_such_a_name_is_found_wherever_it_is(text: str) -> None:
    assert len(list(uses(text))) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.compiler.is_compiling()",
        "class A:\n    def __init__(self):\n        self._version = 1\n    def f(self):\n        return self._version",
        "'''It holds the first as _orig_mod.'''",
        "from qsurgeon.formats.kernels import native\nnative._libraries",
        "x.__class__",
    ],
)
def test_other_names_are_not(text: str) -> None:
    assert list(uses(text)) == []


def test_each_name_of_the_home_is_documented_and_used() -> None:
    tree = ast.parse((HOME / "__init__.py").read_text("utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    names += [
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    rest = "\n".join(file.read_text("utf-8") for file in PACKAGE.rglob("*.py") if HOME not in file.parents)
    assert [name for name in names if name not in rest] == []
    assert all(ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef))
    assert "2.13" in (ast.get_docstring(tree) or "")
