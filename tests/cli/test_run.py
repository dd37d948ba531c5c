"""`qsurgeon run`, with real processes: what is started here never imports qsurgeon itself."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qsurgeon
from qsurgeon.cli import main
from qsurgeon.errors import UsageError
from qsurgeon.launch import STARTUP, environment, run
from qsurgeon.launch.announce import announce

TINY_MATH = Path(__file__).parents[2] / "examples/models/tiny-math"
WRAPPED = (
    "Qwen2ForCausalLM: 92.2% of the parameters are wrapped, in 42 of 43 Linear modules "
    "(4.0% are in no Linear, most in Embedding): "
    "42 with weight mxfp4, input mxfp4 (recipe rules: linears)"
)
LOAD = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that qsurgeon wrote, with a tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "wrapped"
    qsurgeon.rewrite("w4a4-mxfp4", TINY_MATH, folder)
    return folder


def start(*command: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in {"QSURGEON_RUN", "RANK"}} | variables
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, check=False)


def below(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` below ``qsurgeon run``."""
    return start(sys.executable, "-m", "qsurgeon", "run", "--", *command, **variables)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what was announced, the process ids left out."""
    # Not by the start of a line: another process's progress bar may stand before it.
    return [re.sub(r"pid \d+", "pid N", line) for line in re.findall(r"qsurgeon: (pid .*)", done.stderr)]


# --- what is loaded


def test_a_program_that_knows_nothing_of_qsurgeon_loads_its_checkpoint_and_says_so_once(wrapped: Path) -> None:
    code = LOAD + "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
    code += "print(type(model).__name__, sorted(info['missing_keys']), model.from_pretrained.__name__)"
    done = below(sys.executable, "-c", code, *map(str, (wrapped, wrapped, TINY_MATH, TINY_MATH)))
    printed = "QuantLinear QuantLinear Linear Linear Qwen2ForCausalLM [] from_pretrained"
    assert done.stdout.split()[-7:] == printed.split(), done.stderr
    assert said(done) == [
        f"pid N: {WRAPPED}",
        f"pid N: Qwen2ForCausalLM from {TINY_MATH}: full precision: none of 43 Linear modules is wrapped",
    ]


@pytest.mark.one_version
def test_without_it_nothing_happens(wrapped: Path) -> None:
    # The folder alone, as a PYTHONPATH that outlived its run: the variable is what counts.
    paths = os.pathsep.join([str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = start(sys.executable, "-c", LOAD, str(wrapped), PYTHONPATH=paths)
    assert done.stdout.split()[-1] == "Linear", done.stderr
    assert said(done) == []


def test_the_variable_alone_makes_an_imported_qsurgeon_say_it(wrapped: Path) -> None:
    # As in a worker of verl, which imports what its configuration names after it imported transformers.
    code = "from transformers import Qwen2ForCausalLM; __import__('qsurgeon')" + LOAD
    done = start(sys.executable, "-c", code, str(wrapped), QSURGEON_RUN="1")
    assert done.stdout.split()[-1] == "QuantLinear", done.stderr
    assert said(done) == [f"pid N: {WRAPPED}"]


@pytest.mark.one_version
def test_every_child_of_torchrun_says_it(wrapped: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOAD)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = below(*launcher, str(script), str(wrapped))
    assert done.returncode == 0, done.stderr
    assert sorted(said(done)) == [f"pid N (rank 0): {WRAPPED}", f"pid N (rank 1): {WRAPPED}"]


def test_trl_trains_the_wrapped_model(wrapped: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": f"{n} + {n} = {2 * n}"}) + "\n" for n in range(2)))
    output = tmp_path / "trained"
    options = {
        "model_name_or_path": wrapped,
        "dataset_name": data,
        "output_dir": output,
        "max_steps": 1,
        "max_length": 16,
        "bf16": False,
        "report_to": "none",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    trl = str(Path(sys.executable).with_name("trl"))
    done = below(trl, "sft", "--use_cpu", *words, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert said(done) == [f"pid N: {WRAPPED}"]
    assert qsurgeon.inspect(output).wrapped == 42


# --- what is announced


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tiny_qwen2: Any) -> Any:
    monkeypatch.setenv("QSURGEON_RUN", "1")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("qsurgeon.launch.announce._said", set())
    return tiny_qwen2


def test_a_live_model_is_announced_when_a_recipe_is_applied(watched: Any, capfd: pytest.CaptureFixture[str]) -> None:
    qsurgeon.apply("w4a4-mxfp4", watched)
    assert capfd.readouterr().err == (
        f"qsurgeon: pid {os.getpid()}: Qwen2ForCausalLM: 94.4% of the parameters are wrapped, in 21 of "
        "22 Linear modules (5.6% are in no Linear, most in Embedding): 21 with weight mxfp4, input mxfp4 "
        "(recipe rules: linears)\n"
    )


def test_a_forked_child_says_what_its_parent_said(
    watched: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    qsurgeon.apply("w4a4-mxfp4", watched)
    capfd.readouterr()
    announce(watched)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    announce(watched)
    assert capfd.readouterr().err.startswith("qsurgeon: pid 7: ")


def test_every_rule_is_named(watched: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rules = [{"name": name, "target": [name], "weight": "mxfp4"} for name in ("mlp", "self_attn")]
    qsurgeon.apply(qsurgeon.Recipe.model_validate({"version": 1, "rules": rules}), watched)
    # In the model's order, where attention comes first.
    assert "(recipe rules: self_attn, mlp)\n" in capfd.readouterr().err


def test_nothing_is_said_outside_of_it(
    watched: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QSURGEON_RUN")
    qsurgeon.apply("w4a4-mxfp4", watched)
    assert capfd.readouterr().err == ""


def test_a_module_that_is_no_transformers_model_can_still_be_wrapped(
    watched: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = [{"target": ["0"], "weight": "mxfp4"}]
    qsurgeon.apply(qsurgeon.Recipe.model_validate({"version": 1, "rules": rules}), nn.Sequential(nn.Linear(32, 32)))
    assert "in 1 of 1 Linear modules: 1 with weight mxfp4, input - (recipe rules: rule 1)" in capfd.readouterr().err


def test_a_model_without_a_name_can_be_announced(watched: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for model, expected in (
        (watched, "Qwen2ForCausalLM: full precision: none of 22 Linear modules is wrapped"),
        (
            nn.Linear(4, 4),
            "Linear: full precision: none of 0 Linear modules is wrapped",
        ),  # the root is not one of its modules
    ):
        announce(model)
        assert capfd.readouterr().err == f"qsurgeon: pid {os.getpid()}: {expected}\n"


# --- the command


def test_the_exit_code_and_the_streams_are_the_commands() -> None:
    # Without `--`, and with an option that is the command's own.
    words = ("run", "sh", "-c", "cat; echo $0 >&2; exit 37", "--help")
    done = start(sys.executable, "-m", "qsurgeon", *words, stdin="typed")
    assert (done.returncode, done.stdout, done.stderr) == (37, "typed", "--help\n")


def test_the_command_takes_the_place_of_qsurgeon() -> None:
    code = "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=-1); print(p.pid, p.communicate()[0])"
    child = (sys.executable, "-c", "import os; print(os.getpid())")
    done = start(sys.executable, "-c", code, sys.executable, "-m", "qsurgeon", "run", "--", *child)
    started, printed = done.stdout.split()
    assert printed == f"b'{started}\\n'"


def test_a_command_that_is_not_there_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    for name in ("nosuch", "./train.py"):
        monkeypatch.setattr(sys, "argv", ["qsurgeon", "run", "--", name])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert capfd.readouterr().err == (
            f"error: no command '{name}': it is not in PATH, and not an executable file "
            "(a script is run with: qsurgeon run -- python SCRIPT)\n"
        )


@pytest.mark.parametrize("words", [[], ["--"]])
def test_no_command_is_the_users_mistake(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qsurgeon", "run", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capfd.readouterr().err == "error: no command to run: say qsurgeon run -- COMMAND ARGS...\n"


def test_the_library_says_the_same() -> None:
    with pytest.raises(UsageError) as caught:
        run([])
    assert str(caught.value) == "no command to run: say qsurgeon run -- COMMAND ARGS..."


def test_starting_it_imports_no_torch() -> None:
    code = "import sys, qsurgeon.launch; print(*sorted({'torch', 'transformers', 'typer'} & sys.modules.keys()), '.')"
    done = start(sys.executable, "-c", code, QSURGEON_RUN="1")
    assert (done.stdout, done.stderr) == (".\n", "")


# --- the environment


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, [str(STARTUP)]),
        ("", [str(STARTUP)]),  # an empty entry would put the current folder on the path
        ("/a:/b", [str(STARTUP), "/a", "/b"]),
        (f"/a:{STARTUP}:/b", [str(STARTUP), "/a", "/b"]),
    ],
)
def test_the_users_pythonpath_comes_second(before: str | None, after: list[str]) -> None:
    given = {"HOME": "/h"} | ({} if before is None else {"PYTHONPATH": before.replace(":", os.pathsep)})
    made = environment(given)
    assert made == {"HOME": "/h", "QSURGEON_RUN": "1", "PYTHONPATH": os.pathsep.join(after)}


def test_a_sitecustomize_of_the_users_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; value = 'theirs'; print(__name__)")
    code = "import sys, sitecustomize; print(sitecustomize.value, 'qsurgeon' in sys.modules)"
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = below(sys.executable, "-c", code, PYTHONPATH=paths)
    # Once for qsurgeon's own process, whose place the command takes, and once for the command.
    assert done.stdout.split() == ["sitecustomize", "sitecustomize", "theirs", "True"], done.stderr


def test_a_sitecustomize_of_the_users_that_fails_is_reported_and_keeps_nothing_from_being_wrapped(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('theirs is broken')")
    code = "import sys; print('qsurgeon' in sys.modules)"
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = start(sys.executable, "-c", code, **environment({"PYTHONPATH": paths}))
    assert done.stdout.split() == ["True"]
    assert done.stderr.endswith("ValueError: theirs is broken\n")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has a transformers of a sort, and no qsurgeon."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "transformers/quantizers").mkdir(parents=True)
    (packages / "transformers/quantizers/auto.py").write_text("")
    return folder / "bin/python"


def test_an_environment_without_qsurgeon_says_so_and_goes_on(elsewhere: Path) -> None:
    done = start(str(elsewhere), "-c", "print('done')", **environment({}))
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert said(done) == [
        f"pid N: qsurgeon run: {elsewhere} cannot import qsurgeon (No module named 'qsurgeon'), "
        "so nothing would be wrapped; install it in that environment"
    ]


def test_an_environment_without_qsurgeon_does_not_get_as_far_as_loading_a_model(elsewhere: Path) -> None:
    done = start(str(elsewhere), "-c", "import transformers.quantizers.auto; print('loading')", **environment({}))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(
        f"ImportError: qsurgeon run: {elsewhere} cannot import qsurgeon (No module named 'qsurgeon'), "
        "so nothing would be wrapped; install it in that environment\n"
    )
    done = start(str(elsewhere), "-c", "import transformers.quantizers.auto; print('loading')", PYTHONPATH=str(STARTUP))
    assert (done.returncode, done.stdout, done.stderr) == (0, "loading\n", "")
