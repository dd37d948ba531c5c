import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qsurgeon

PACKAGE = Path(qsurgeon.__file__).parent
STARTUP = "launch/startup/sitecustomize.py"  # lies in the package and is none of its modules: Python itself runs it

# Who may import whom: each part those to its left, and nobody beside it. The package itself hands out names of all.
ORDER = (
    {
        "hub_private",
        "installed",
        "patching",
        "peft_private",
        "torch_private",
        "transformers_private",
        "version",
        "visible",
        "words",
    },
    {"errors", "telling"},
    {"reading"},
    {"arguments", "places"},
    {"formats"},
    {"storage"},
    {"layers"},
    {"recipe"},
    {"observing", "surgery"},
    {"checkpoint"},
    {"exchange"},
    {"launch"},
    {"hf"},
    {"calibration", "noise", "scanning", "merging", "vllm", "watch"},
    {"report"},
    {"cli"},
    {"__init__", "__main__"},
)
RANK = {part: place for place, parts in enumerate(ORDER) for part in parts}

Import = ast.Import | ast.ImportFrom


def files() -> Iterator[tuple[str, ast.Module]]:
    """Yield the path of each source file inside the package, and its syntax tree."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield str(file.relative_to(PACKAGE)), ast.parse(file.read_text("utf-8"))


def imports(tree: ast.AST) -> Iterator[Import]:
    return (node for node in ast.walk(tree) if isinstance(node, Import))


def modules(node: Import) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def part(path: str) -> str:
    """Return which part of the package a file belongs to."""
    return Path(path).parts[0].removesuffix(".py")


def test_every_part_has_its_place() -> None:
    assert {part(path) for path, _ in files()} <= RANK.keys()


def test_imports_point_left_only() -> None:
    wrong = [
        f"{path}:{node.lineno}: {part(path)} imports {other}"
        for path, tree in files()
        for node in imports(tree)
        for module in modules(node)
        if module.startswith("qsurgeon.")
        for other in [module.split(".")[1]]
        if other != part(path) and RANK[other] >= RANK[part(path)]
    ]
    assert wrong == []


def test_parts_do_not_import_the_package_itself() -> None:
    found = {path for path, tree in files() for node in imports(tree) if "qsurgeon" in modules(node)}
    assert found == {STARTUP}


def test_what_python_runs_at_its_start_imports_nothing_but_the_package_and_the_standard_library() -> None:
    (tree,) = (tree for path, tree in files() if path == STARTUP)
    imported = {module.split(".")[0] for node in imports(tree) for module in modules(node)}
    assert imported - sys.stdlib_module_names == {"qsurgeon"}


def test_imports_are_absolute_and_name_what_they_import() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in files()
        for node in imports(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names))
    ]
    assert wrong == []


def test_only_commands_import_inside_functions() -> None:
    inside = {
        path
        for path, tree in files()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        if list(imports(function))
    }
    assert inside == {"cli/commands.py", "cli/scan.py", "report/html/plots.py", "vllm/__init__.py"}


def test_only_packages_that_hand_out_names_import_by_a_name_in_a_variable() -> None:
    dynamic = {
        path
        for path, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "import_module"
    }
    assert dynamic == {"__init__.py", "recipe/__init__.py"}


def test_all_public_names_are_there() -> None:
    assert [name for name in qsurgeon.__all__ if not hasattr(qsurgeon, name)] == []


def test_only_public_names_are_listed() -> None:
    assert dir(qsurgeon) == sorted(qsurgeon.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError) as caught:
        _ = qsurgeon.nothing
    assert str(caught.value) == "module 'qsurgeon' has no attribute 'nothing'"


# --- in a fresh interpreter


def fresh(code: str) -> str:
    """Return the last line that ``code`` prints; libraries may print lines of their own before it."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("option", ["--help", "--version", "plan --help", "merge --help"])
def test_the_command_line_answers_without_torch_and_transformers(option: str) -> None:
    code = f"""
import sys
sys.argv = ["qsurgeon", *{option.split()}]
from qsurgeon.cli import main
try:
    main()
except SystemExit as done:
    print(done.code, *sorted({{"torch", "transformers", "peft", "accelerate"}} & sys.modules.keys()))
"""
    assert fresh(code) == "0"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, qsurgeon; print(*sorted({'torch', 'transformers', 'yaml', 'pydantic'} & sys.modules.keys()), '.')"
    )
    assert fresh(code) == "."


REGISTERED = "print('qsurgeon' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)"


def test_transformers_knows_qsurgeon_if_it_comes_second() -> None:
    assert fresh(f"import qsurgeon; import transformers.quantizers.auto; {REGISTERED}") == "True"


def test_transformers_knows_qsurgeon_if_it_comes_first() -> None:
    assert fresh(f"import transformers.quantizers.auto; import qsurgeon; {REGISTERED}") == "True"


@pytest.mark.parametrize("order", ["qsurgeon, peft", "peft, qsurgeon", "qsurgeon, transformers.trainer, peft"])
def test_peft_refuses_what_computes_past_wrapped_layers_whichever_comes_first(order: str) -> None:
    shows = "print('patched_by_qsurgeon' in vars(peft.tuners.tuners_utils.BaseTuner.inject_adapter))"
    assert fresh(f"import {order}; {shows}") == "True"


# What nothing has imported then.
UNUSED = [
    "transformers.integrations.liger",
    "transformers.trainer",
    "trl.experimental.async_distillation.async_distillation_trainer",
    "trl.trainer.distillation_trainer",
    "trl.trainer.sft_trainer",
    "trl.trainer.utils",
]


@pytest.mark.parametrize("first", ["surgery.skeleton", "checkpoint.kept", "merging"])
def test_whatever_imports_transformers_first_is_not_imported_by_what_that_imports(first: str) -> None:
    assert fresh(f"import qsurgeon, transformers; import qsurgeon.{first}; {REGISTERED}") == "True"


def test_importing_twice_is_harmless() -> None:
    code = f"""
import importlib, sys, qsurgeon
importlib.reload(qsurgeon)  # before transformers
import peft, transformers.quantizers.auto
importlib.reload(qsurgeon)  # and after
waiting = [finder.watched for finder in sys.meta_path if type(finder).__module__ == "qsurgeon"]
assert sorted(waiting) == {sorted(UNUSED)}
{REGISTERED}
"""
    assert fresh(code) == "True"
