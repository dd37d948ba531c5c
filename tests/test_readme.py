"""What the README shows is run: its commands, its Python, and the table it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, where what the commands write does not stay."""
    path = tmp_path_factory.mktemp("readme")
    (path / "examples").symlink_to(ROOT / "examples")
    return path


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_command_runs_and_plan_prints_what_the_readme_shows(folder: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    ours = [line for line in commands if line.startswith("qsurgeon ")]
    assert len(ours) == 5
    printed = {line: run(line.split(), folder) for line in ours}
    plan = next(text for line, text in printed.items() if line.startswith("qsurgeon plan"))
    assert plan.strip() in {block.strip() for block in blocks("text")}


def test_every_make_target_it_names_is_in_the_makefile() -> None:
    named = set(re.findall(r"^make (\w+)$", "\n".join(blocks("sh")), flags=re.M))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert named == {"demo", "test"}
    assert named <= targets


def test_its_python_runs(folder: Path) -> None:
    code = "\n".join(blocks("python"))
    assert run([sys.executable, "-c", code], folder) == (
        "92.2% of the parameters are wrapped, "
        "in 42 of 43 Linear modules (4.0% are in no Linear, most in Embedding): "
        "42 with weight nvfp4, input nvfp4\n"
    )


def test_its_recipes_plan_on_the_bundled_model(folder: Path) -> None:
    first, second = blocks("yaml")
    assert yaml.safe_load(first)["rules"][0]["exclude"] == ["layers.{0,-1}"]
    for text, wrapped in (
        (
            first,
            "61.5% of the parameters are wrapped, "
            "in 28 of 43 Linear modules (4.0% are in no Linear, most in Embedding): "
            "28 with weight mxfp4, input mxfp4",
        ),
        (second, "18 with weight rotated, input rotated"),
        (second, "24 with weight square, input mxfp4-even"),
    ):
        (folder / "mine.yaml").write_text(text)
        assert wrapped in run(["qsurgeon", "plan", "mine.yaml", "--model", "examples/models/tiny-math"], folder)


def test_every_file_it_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_module_of_the_package_is_in_the_tree() -> None:
    tree = next(block for block in blocks("text") if block.startswith("qsurgeon/"))
    inside = {path.name for path in (ROOT / "qsurgeon").iterdir() if path.name not in {"__pycache__", "recipes"}}
    shown = set(re.findall(r"^    ([\w.]+)/?\s", tree, flags=re.M))
    assert inside - shown <= {"__init__.py", "__main__.py", "version.py"}
    assert shown <= inside
