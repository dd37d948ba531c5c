import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qsurgeon
import qsurgeon.hf.models  # before any output is captured: libraries print while they are imported
from qsurgeon.cli import main
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import CATALOG
from qsurgeon.recipe import shipped_recipes

RECIPE = """\
version: 1
rules:
  - target: [layers]
    weight: mxfp4
"""


WRAPPED = (
    "94.4% of the parameters are wrapped, in 21 of 22 Linear modules (5.6% are in no Linear, most in Embedding): "
    "21 with weight mxfp4, input -"
)


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that holds a model and a recipe, so that messages name short paths."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "tiny")
    Path("mine.yaml").write_text(RECIPE)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def command(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["qsurgeon", *words])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as done:
            code = done.code
        return Result(code or 0, *capfd.readouterr())

    return command


def rewritten(folder: str = "done") -> str:
    qsurgeon.rewrite("w4a4-mxfp4", "tiny", folder)
    return folder


# --- what is nobody's mistake


def test_a_failing_disk_is_one_line_and_exit_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    result = run("apply", "mine.yaml", "--model", "tiny", "--output", "done")
    assert result.code == 1
    assert result.err.endswith("error: done.partial/done/model.safetensors: No space left on device\n")
    assert sorted(path.name for path in Path().iterdir()) == ["mine.yaml", "tiny"]


def test_an_upload_that_fails_says_how_to_repeat_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("me/x: the upload was cut off")

    monkeypatch.setattr("qsurgeon.checkpoint.reserve", lambda repo, **_: repo)
    monkeypatch.setattr("qsurgeon.checkpoint.push", unreachable)
    result = run("apply", "mine.yaml", "--model", "tiny", "--output", "done", "--push-to-hub", "me/x")
    assert result.code == 1
    assert result.err.splitlines()[-2:] == [
        "done is complete; upload it with: hf upload me/x done",
        "error: me/x: the upload was cut off",
    ]
    assert Path("done/config.json").is_file()


def test_a_repository_is_made_when_all_else_is_right_and_before_anything_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(repo: str, **_: Any) -> None:
        asked.append(sorted(path.name for path in Path().iterdir()))
        raise CheckpointError(f"{repo}: the hub does not let us write there")

    asked: list[list[str]] = []
    monkeypatch.setattr("qsurgeon.checkpoint.reserve", refused)
    there = ["mine.yaml", "tiny"]
    push = ("--output", "done", "--push-to-hub", "me/x")
    assert run("apply", "mine.yaml", "--model", "nowhere", *push).code == 2
    Path("wrong.yaml").write_text(Path("mine.yaml").read_text().replace("layers", "layer", 1))
    assert run("apply", "wrong.yaml", "--model", "tiny", *push).code == 2
    Path("wrong.yaml").unlink()
    assert asked == []
    result = run("apply", "mine.yaml", "--model", "tiny", *push)
    assert result == Result(2, "", "error: me/x: the hub does not let us write there\n")
    assert asked == [there]
    assert sorted(path.name for path in Path().iterdir()) == there


# --- plan


def test_plan_shows_every_module_and_what_decided(run: Run) -> None:
    assert run("plan", "mine.yaml", "--model", "tiny") == Result(
        0,
        """\
module                                        n  kind          shape   weight  input  gradient  bits   MB  why
model.embed_tokens                            1  Embedding     96x64   -       -      -           32  0.0  not a Linear
model.layers.{0..2}.self_attn.q_proj          3  Linear        64x64   mxfp4   -      ste       4.25  0.0  rule 'rule 1'
model.layers.{0..2}.self_attn.k_proj          3  Linear        32x64   mxfp4   -      ste       4.25  0.0  rule 'rule 1'
model.layers.{0..2}.self_attn.v_proj          3  Linear        32x64   mxfp4   -      ste       4.25  0.0  rule 'rule 1'
model.layers.{0..2}.self_attn.o_proj          3  Linear        64x64   mxfp4   -      ste       4.25  0.0  rule 'rule 1'
model.layers.{0..2}.mlp.gate_proj             3  Linear        128x64  mxfp4   -      ste       4.25  0.1  rule 'rule 1'
model.layers.{0..2}.mlp.up_proj               3  Linear        128x64  mxfp4   -      ste       4.25  0.1  rule 'rule 1'
model.layers.{0..2}.mlp.down_proj             3  Linear        64x128  mxfp4   -      ste       4.25  0.1  rule 'rule 1'
model.layers.{0..2}.input_layernorm           3  Qwen2RMSNorm  64      -       -      -           32  0.0  not a Linear
model.layers.{0..2}.post_attention_layernorm  3  Qwen2RMSNorm  64      -       -      -           32  0.0  not a Linear
model.norm                                    1  Qwen2RMSNorm  64      -       -      -           32  0.0  not a Linear
lm_head                                       1  Linear        96x64   -       -      -               0.0  """
        """no rule names it; tied to model.embed_tokens

94.4% of the parameters are wrapped, in 21 of 22 Linear modules (5.6% are in no Linear, most in Embedding): """
        """21 with weight mxfp4, input -
parameters: mxfp4 94.4%, full precision 5.6%; 5.81 bits per weight
size: 0.5 MB
large, and stays as it is: model.embed_tokens (Embedding, 5.2% of the parameters)
""",
        "",
    )


def test_plan_can_show_one_line_a_module(run: Run) -> None:
    lines = run("plan", "mine.yaml", "--model", "tiny", "--all").out.splitlines()
    assert [line.split()[0] for line in lines if "up_proj" in line] == [
        f"model.layers.{layer}.mlp.up_proj" for layer in range(3)
    ]


def test_plan_prints_json(run: Run) -> None:
    report = json.loads(run("plan", "mine.yaml", "-m", "tiny", "--json").out)
    assert (report["source"], report["wrapped"], report["wrappable"], report["unnamed"]) == (
        "tiny",
        21,
        22,
        ["model.embed_tokens"],
    )
    assert report["modules"][1] == {
        "module": "model.layers.0.self_attn.q_proj",
        "kind": "Linear",
        "shape": [64, 64],
        "weight": "mxfp4",
        "input": "-",
        "gradient": "ste",
        "phases": "both",
        "saved_inputs": "packed",
        "adapters": "apart",
        "backward": "dequantized",
        "noise": None,
        "sigma": None,
        "why": "rule 'rule 1'",
        "parameters": 4160,
        "bits": 4.25,
        "bytes": 16640,
        "type": "Linear",
        "called": None,
        "large": False,
        "bypassed": False,
        "misread": False,
        "when": "",
        "rounds": None,
        "adapter": False,
        "tower": None,
    }


def test_plan_takes_the_recipes_own_model(run: Run) -> None:
    Path("own.yaml").write_text("model: tiny\n" + RECIPE)
    assert run("plan", "own.yaml") == run("plan", "mine.yaml", "--model", "tiny")


def test_the_model_option_wins_over_the_recipes(run: Run) -> None:
    Path("own.yaml").write_text("model: nowhere\n" + RECIPE)
    assert run("plan", "own.yaml", "--model", "tiny").code == 0


def test_plan_takes_a_config_file(run: Run) -> None:
    assert run("plan", "mine.yaml", "--model", "tiny/config.json").code == 0


def test_plan_writes_nothing(run: Run) -> None:
    before = sorted(Path().rglob("*"))
    run("plan", "mine.yaml", "--model", "tiny")
    assert sorted(Path().rglob("*")) == before


# --- apply


def test_apply_writes_a_folder_and_says_how_much_is_wrapped(run: Run) -> None:
    result = run("apply", "mine.yaml", "--model", "tiny", "--output", "out")
    assert (result.code, result.out) == (0, f"out: {WRAPPED}\n")
    assert result.err.splitlines()[-1] == "see it with: qsurgeon inspect out"


def test_apply_says_so_also_where_something_else_set_a_rank(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run("apply", "mine.yaml", "--model", "tiny", "--output", "done").out == f"done: {WRAPPED}\n"


def test_what_apply_writes_is_what_plan_said(run: Run) -> None:
    run("apply", "w4a4-nvfp4", "--model", "tiny", "--output", "out")
    planned = run("plan", "w4a4-nvfp4", "--model", "tiny")
    assert run("inspect", "out") == planned


def test_apply_takes_model_and_output_from_the_recipe(run: Run) -> None:
    Path("own.yaml").write_text("model: tiny\noutput: there\n" + RECIPE)
    assert run("apply", "own.yaml").out == f"there: {WRAPPED}\n"
    assert Path("there/config.json").is_file()


def test_the_output_option_wins_over_the_recipes(run: Run) -> None:
    Path("own.yaml").write_text("model: tiny\noutput: there\n" + RECIPE)
    run("apply", "own.yaml", "--output", "here")
    assert (Path("here").is_dir(), Path("there").exists()) == (True, False)


def test_apply_leaves_the_source_as_it_was(run: Run) -> None:
    before = {path: path.read_bytes() for path in sorted(Path("tiny").iterdir())}
    run("apply", "mine.yaml", "--model", "tiny", "--output", "out")
    assert {path: path.read_bytes() for path in sorted(Path("tiny").iterdir())} == before


# --- inspect


def test_inspect_exits_1_if_nothing_is_wrapped(run: Run) -> None:
    result = run("inspect", "tiny")
    assert result.code == 1
    assert "full precision: none of 22 Linear modules is wrapped" in result.out.splitlines()


def test_inspect_exits_0_if_something_is_wrapped(run: Run) -> None:
    assert run("inspect", rewritten()).code == 0


def test_inspect_prints_json(run: Run) -> None:
    report = json.loads(run("inspect", rewritten(), "--json").out)
    assert (report["storage"], report["wrapped"], report["wrappable"]) == ("master", 21, 22)
    assert report["modules"][-1]["why"] == "excluded by '<output_head>?' of rule 'linears'; tied to model.embed_tokens"


# --- formats, recipes, schema


def test_formats_lists_the_catalogue_with_what_was_computed_of_each(run: Run) -> None:
    result = run("formats")
    assert (result.code, result.err) == (0, "")
    head, *rows = result.out.split("\n\n")[0].splitlines()
    assert head.split("  ")[0] == "format"
    table = {row.split()[0]: " ".join(row.split()) for row in rows}
    assert table["mxfp4"] == "mxfp4 e2m1 4.25 32 e8m0 floor none 2.55e+38 2.94e-39 18.8 17.6"
    assert table["mxfp8_e4m3"].startswith("mxfp8_e4m3 = mxfp8 e4m3 8.25 32 ")
    assert table["nvfp4"] == "nvfp4 e2m1 4.5 16 e4m3 nearest by_role 2.69e+03 0.000977 20.4 20.8"
    assert table["fp8_e4m3"] == "fp8_e4m3 e4m3 8 none none none tensor 448 0.00195 31.5 31.5"
    assert len(table) == len(CATALOG) - 1  # one has two names


def test_formats_prints_json(run: Run) -> None:
    first = json.loads(run("formats", "--json").out)[0]
    sqnr = first.pop("sqnr")
    assert first == {
        "format": "mxfp4",
        "also": [],
        "bits": 4.25,
        **CATALOG["mxfp4"].to_dict(),
        "largest": 6 * 2.0**125,
        "smallest": 2.0**-128,
    }
    assert sqnr == {"gaussian": pytest.approx(18.8, abs=0.1), "t(4)": pytest.approx(17.6, abs=0.1)}


def test_recipes_lists_the_shipped_ones_with_what_they_do(run: Run) -> None:
    lines = run("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *shipped_recipes()]
    (line,) = [line for line in lines if line.split()[0] == "w4a4-mxfp4"]
    assert "W4A4 with MXFP4: the weights and inputs of every Linear but the output head." in line


def test_recipes_prints_json(run: Run) -> None:
    assert list(json.loads(run("recipes", "--json").out)) == list(shipped_recipes())


def test_recipes_prints_one_as_it_is(run: Run) -> None:
    assert run("recipes", "w4a4-mxfp4").out == shipped_recipes()["w4a4-mxfp4"].read_text("utf-8")


def test_schema_prints_the_schema_of_recipes(run: Run) -> None:
    assert json.loads(run("schema").out) == qsurgeon.Recipe.model_json_schema()


# --- help


def test_version_prints_the_version(run: Run) -> None:
    assert run("--version") == Result(0, f"qsurgeon {qsurgeon.__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command(run: Run, option: str) -> None:
    result = run(option)
    assert result.code == 0
    assert [
        word for word in ("plan", "apply", "inspect", "formats", "recipes", "schema") if word not in result.out
    ] == []


def test_no_command_shows_the_help_and_is_a_mistake(run: Run) -> None:
    result = run()
    assert (result.code, "Usage: qsurgeon" in result.out) == (2, True)


# --- the user's mistakes: one message on stderr, exit code 2


def test_an_unknown_command_is_a_mistake(run: Run) -> None:
    result = run("plna")
    assert result.code == 2
    assert "No such command 'plna'." in result.err


def test_an_unknown_option_is_a_mistake(run: Run) -> None:
    result = run("plan", "mine.yaml", "--modle", "tiny")
    assert result.code == 2
    assert "No such option: --modle" in result.err


def test_a_missing_argument_is_a_mistake(run: Run) -> None:
    result = run("inspect")
    assert result.code == 2
    assert "Missing argument 'MODEL'." in result.err


def mistake(result: Result) -> str:
    """Return what is said about a mistake, after checking that this is all."""
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    return result.err.lstrip("\n")  # an empty progress bar leaves an empty line


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_command_without_a_model_is_a_mistake(run: Run, command: str) -> None:
    assert mistake(run(command, "mine.yaml")) == "error: no model: pass --model FOLDER, or set 'model:' in the recipe\n"


def test_apply_without_an_output_is_a_mistake(run: Run) -> None:
    assert mistake(run("apply", "mine.yaml", "--model", "tiny")) == (
        "error: no output folder: pass --output FOLDER, or set 'output:' in the recipe\n"
    )


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_typo_in_the_recipe_is_a_mistake(run: Run, command: str) -> None:
    Path("mine.yaml").write_text(RECIPE.replace("weight", "wieght"))
    output = ("--output", "out") if command == "apply" else ()
    assert mistake(run(command, "mine.yaml", "--model", "tiny", *output)) == (
        "error: mine.yaml:4:5: unknown key 'wieght'; did you mean 'weight'?\n        wieght: mxfp4\n        ^^^^^^\n"
    )


def test_an_unknown_format_is_a_mistake(run: Run) -> None:
    Path("mine.yaml").write_text(RECIPE.replace("mxfp4", "mxpf4"))
    assert mistake(run("plan", "mine.yaml", "--model", "tiny")) == (
        "error: mine.yaml:4:13: no format 'mxpf4'; did you mean 'mxfp4'?\n"
        "        weight: mxpf4\n"
        "                ^^^^^\n"
    )


def test_a_pattern_that_names_nothing_is_a_mistake(run: Run) -> None:
    Path("mine.yaml").write_text(RECIPE.replace("layers", "layer", 1))
    assert mistake(run("plan", "mine.yaml", "--model", "tiny")) == (
        "error: mine.yaml:3:14: 'layer' names no module; did you mean 'layers'?\n"
        "      - target: [layer]\n"
        "                 ^^^^^\n"
    )


@pytest.mark.parametrize("words", [("plan", "w4a4-mxpf4", "--model", "tiny"), ("recipes", "w4a4-mxpf4")], ids=" ".join)
def test_an_unknown_recipe_is_a_mistake(run: Run, words: tuple[str, ...]) -> None:
    assert mistake(run(*words)) == "error: no recipe 'w4a4-mxpf4'; did you mean 'w4a4-mxfp4'?\n"


@pytest.mark.parametrize("words", [("plan", "mine.yaml", "--model", "empty"), ("inspect", "empty")], ids=" ".join)
def test_a_folder_without_a_model_is_a_mistake(run: Run, words: tuple[str, ...]) -> None:
    Path("empty").mkdir()
    assert mistake(run(*words)) == "error: empty has no config.json; expected a model's folder\n"


@pytest.mark.parametrize(
    "words", [("plan", "mine.yaml", "--model", "./nowhere"), ("inspect", "./nowhere")], ids=" ".join
)
def test_a_model_that_is_not_there_is_a_mistake(run: Run, words: tuple[str, ...]) -> None:
    assert mistake(run(*words)) == "error: nowhere: no such folder\n"


def apply(run: Run, model: str = "tiny", output: str = "out") -> str:
    """Return what is said about an apply that cannot be, after checking that nothing was written."""
    before = sorted(Path().rglob("*"))
    said = mistake(run("apply", "mine.yaml", "--model", model, "--output", output))
    assert sorted(Path().rglob("*")) == before
    return said


def test_a_source_that_is_not_there_is_a_mistake(run: Run) -> None:
    assert apply(run, model="nowhere") == (
        "error: no model at 'nowhere': no such folder, and HF_HUB_OFFLINE is set and the cache has no whole snapshot "
        "of it\n"
    )
    assert apply(run, model="./tinny") == "error: tinny: no such folder; did you mean 'tiny'?\n"


def test_an_output_that_exists_is_a_mistake(run: Run) -> None:
    Path("out").mkdir()
    assert apply(run) == "error: out exists; name another folder, or remove it first\n"


def test_an_output_that_is_a_file_is_a_mistake(run: Run) -> None:
    Path("out").touch()
    assert apply(run) == "error: out exists; name another folder, or remove it first\n"


def test_an_output_beneath_a_file_is_a_mistake(run: Run) -> None:
    Path("file").touch()
    assert apply(run, output="file/out") == "error: file/out cannot be written: Not a directory\n"


def test_an_output_inside_the_source_is_a_mistake(run: Run) -> None:
    assert apply(run, output="tiny/out") == "error: tiny/out is inside the source tiny; write somewhere else\n"


def test_public_without_a_repository_is_a_mistake(run: Run) -> None:
    result = run("apply", "mine.yaml", "--model", "tiny", "--output", "done", "--public")
    assert (result.code, result.err) == (
        2, "error: --public requires --push-to-hub REPO\n"
    )  # fmt: skip
    assert not Path("done").exists()


def test_a_size_that_is_none_is_a_mistake(run: Run) -> None:
    result = run("apply", "mine.yaml", "--model", "tiny", "--output", "done", "--max-shard-size", "10XB")
    assert (result.code, result.err) == (
        2, "error: '10XB' is no size of a file; expected one like 5GB, 500MB or a number of bytes\n"
    )  # fmt: skip


def test_a_source_that_is_pickle_only_is_a_mistake(run: Run) -> None:
    Path("tiny/model.safetensors").rename("tiny/pytorch_model.bin")
    assert apply(run) == (
        "error: tiny: has no safetensors, only pytorch_model.bin; a pickle runs code when it is opened, "
        "so it is not read. Convert it with transformers: from_pretrained(…), then save_pretrained(…)\n"
    )


def test_a_source_without_weights_is_a_mistake(run: Run) -> None:
    Path("tiny/model.safetensors").unlink()
    assert apply(run) == "error: tiny: has neither model.safetensors nor model.safetensors.index.json\n"


def test_a_source_that_was_rewritten_already_is_a_mistake(run: Run) -> None:
    rewritten()
    assert apply(run, model="done").startswith(
        "error: done was rewritten by qsurgeon already; apply the recipe to the model it came from. If it was trained"
    )


def test_a_source_that_is_quantized_otherwise_is_a_mistake(run: Run) -> None:
    config = json.loads(Path("tiny/config.json").read_text())
    Path("tiny/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert apply(run) == "error: tiny is quantized already, by gptq; expected a checkpoint in full precision\n"


# --- as a program


@pytest.mark.one_version
def test_a_mistake_in_a_real_process_is_one_message_and_exit_code_2() -> None:
    Path("mine.yaml").write_text(RECIPE.replace("weight", "wieght"))
    command = [sys.executable, "-m", "qsurgeon", "plan", "mine.yaml", "--model", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-3:] == [
        "error: mine.yaml:4:5: unknown key 'wieght'; did you mean 'weight'?",
        "        wieght: mxfp4",
        "        ^^^^^^",
    ]
    assert "Traceback" not in done.stderr


def interrupted(after: int) -> subprocess.CompletedProcess[str]:
    """Apply the recipe in a process that gets Ctrl-C's signal after some slabs of weights."""
    program = f"""
import os, signal, sys
from qsurgeon.cli import main
from qsurgeon.errors import CheckpointError
from qsurgeon.cli.progress import Bar

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without
left = [{after}]

def advance(self, count):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGINT)

Bar.advance = advance
sys.argv = "qsurgeon apply mine.yaml --model tiny --output done --workers 1".split()
main()
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.one_version
def test_ctrl_c_is_one_line_that_says_how_to_go_on(run: Run) -> None:
    done = interrupted(after=20)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == (
        "interrupted; finished work is kept in done.partial, and the same command resumes it"
    )
    assert "Traceback" not in done.stderr
    assert run("apply", "mine.yaml", "--model", "tiny", "--output", "done", "--resume").code == 0


def test_ctrl_c_in_any_command_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsurgeon.hf.models.plan", stop)
    result = run("plan", "mine.yaml", "--model", "tiny")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")


def test_a_reader_that_has_enough_is_no_mistake_of_ours() -> None:
    command = [sys.executable, "-m", "qsurgeon", "--version"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1
