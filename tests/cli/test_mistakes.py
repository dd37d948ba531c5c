"""Command lines as people type them who come from another tool, or are in a hurry; and each answer, whole.

``mistakes/*.txt`` hold them by what is mistaken: a line that begins with ``$`` is typed, what follows is the exit
code and all that is said. An answer that ends in ``…`` goes on.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qsurgeon
import qsurgeon.hf.models  # before any output is captured: libraries print while they are imported
from qsurgeon.cli import main
from qsurgeon.errors import RecipeError
from qsurgeon.recipe import find_recipe, shipped_recipes

HERE = Path(__file__).parent / "mistakes"
RECIPE = "version: 1\nrules:\n  - {target: [layers], weight: mxfp4}\n"
QUANTIZED = {"quant_method": "mxfp4"}


def lines() -> Iterator[Any]:
    """Yield each line that is typed, with its exit code and its answer."""
    for file in sorted(HERE.glob("*.txt")):
        for block in file.read_text("utf-8").split("\n$ ")[1:]:
            typed, code, answer = block.split("\n", 2)
            yield pytest.param(typed, int(code), answer.rstrip("\n"), id=f"{file.stem}: {typed}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with models, recipes and what is taken for them."""
    here = tmp_path_factory.mktemp("mistakes")
    for name in ("tiny", "other", "out/exists"):
        shutil.copytree(tiny_folder, here / name)
    qsurgeon.rewrite("w4a4-mxfp4", tiny_folder, here / "done")
    config = json.loads((tiny_folder / "config.json").read_text("utf-8"))
    contents = {
        "gptoss/config.json": json.dumps({**config, "quantization_config": QUANTIZED}),
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": "done"}),
        "diffusers/model_index.json": "{}",
        "big.partial/big/model.safetensors": "",
        "models--owner--name/snapshots/x": "",
        "runs/checkpoint-500/config.json": "{}",
        "ggufs/model.gguf": "",
        "model.gguf": "",
    }
    for name, text in contents.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text, "utf-8")
    (here / "empty").mkdir()
    for name in ("mine", "first", "second"):
        (here / f"{name}.yaml").write_text(RECIPE, "utf-8")
    for file in (HERE / "recipes").iterdir():
        shutil.copy(file, here / file.name)
    return here


@pytest.mark.parametrize(("typed", "code", "answer"), list(lines()))
def test_a_mistake_is_answered_with_what_to_type(
    typed: str, code: int, answer: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(sys, "argv", shlex.split(typed))
    before = sorted(folder.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as done:
        main()
    out, err = capfd.readouterr()
    said = (out if done.value.code in (0, None) else err).strip()
    if answer.endswith("…"):
        said = said[: len(answer) - 1] + "…"
    assert (done.value.code or 0, said) == (code, answer)
    assert sorted(folder.rglob("*")) == before


def test_a_folder_is_never_called_by_a_home_or_a_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr(sys, "argv", ["qsurgeon", "apply", "mine.yaml", "--model=tiny", "--output=~/written"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert (folder / "home/written/config.json").is_file()
    assert not (folder / "~").exists()


def test_a_recipe_names_model_and_output_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    Path("homely.yaml").write_text(RECIPE + "model: ~/tiny\noutput: ~/homely\n", "utf-8")
    monkeypatch.setattr(sys, "argv", ["qsurgeon", "apply", "~/homely.yaml"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert Path("homely/config.json").is_file()


@pytest.mark.parametrize("form", ["{0}.yaml", "recipes/{0}.yaml", "./{0}.yml", "{1}", "'{0}'", " {0} ", "{1}.YAML"])
def test_a_shipped_recipe_by_another_name_is_offered(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped_recipes():
        with pytest.raises(RecipeError) as caught:
            find_recipe(form.format(name, name.upper()))
        assert str(caught.value).endswith(f"; did you mean '{name}'?")


EARLY = """
import sys
sys.argv = {argv!r}
from qsurgeon.cli import main
try:
    main()
except SystemExit as done:
    print(done.code, *sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "typed",
    [
        "qsurgeon plan w4a4-mxfp4",
        "qsurgeon plan w4a4-mxpf4 -m tiny",
        "qsurgeon plan w4a4-mxfp4 -m ./nowhere",
        "qsurgeon plan w4a4-mxfp4 -m nowhere",
        "qsurgeon apply w4a4-mxfp4 -m tiny",
        "qsurgeon inspect nowhere",
        "qsurgeon plan tab.yaml -m tiny",
        "qsurgeon plan tiny w4a4-mxfp4",
    ],
)
def test_what_is_missing_is_said_before_torch_is_imported(
    typed: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    code = EARLY.format(argv=shlex.split(typed))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n")
