"""Models of the hub: what is downloaded, where from it is said to be, and what goes wrong in which words."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from versions import at_least

import qsurgeon
from qsurgeon.checkpoint import Options, fetch, fetch_config, push, reserve
from qsurgeon.checkpoint.hub import hub_id, origin
from qsurgeon.cli import main
from qsurgeon.errors import CheckpointError, PlanError
from qsurgeon.layers import quant_layers

HINT = "log in with `hf auth login`"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fails(what: Callable[[], Any], error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        what()
    return str(caught.value)


@pytest.fixture(scope="module")
def sharded(make_qwen2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    make_qwen2(num_hidden_layers=1).save_pretrained(folder, max_shard_size="50kB")
    return folder


# --- reading


def test_a_folder_is_returned_as_it_is(hub: Any, tiny_folder: Path) -> None:
    source = fetch(tiny_folder)
    assert (source.folder, source.origin) == (tiny_folder, "tiny-qwen2")
    assert fetch_config(tiny_folder / "config.json") == source
    assert hub.asked == []


def test_a_folder_called_dot_has_a_name(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder)
    assert fetch(".").origin == "tiny-qwen2"


@pytest.mark.parametrize("fixture", ["tiny_folder", "sharded"])
def test_a_hub_id_is_downloaded_and_pinned(hub: Any, fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    commit = hub.add("me/tiny", folder)
    source = fetch("me/tiny")
    assert contents(source.folder) == contents(folder)
    assert source.origin == f"me/tiny@{commit}"
    assert hub_id(source.origin) == ("me/tiny", commit)
    assert isinstance(hf.AutoModelForCausalLM.from_pretrained(source.folder), hf.Qwen2ForCausalLM)


def test_what_does_not_belong_beside_the_weights_stays_on_the_hub(hub: Any, tiny_folder: Path, tmp_path: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    carried = {"README.md", "LICENSE", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"}
    left = {
        "pytorch_model.bin", "model.fp16.safetensors", "original/model.safetensors", "onnx/model.onnx", "code.py",
        ".gitattributes", "training_args.bin", "plot.png",
    }  # fmt: skip
    hub.repos["me/tiny"]["main"] |= dict.fromkeys(carried | left, b"x")
    assert contents(fetch("me/tiny").folder).keys() == contents(tiny_folder).keys() | carried
    assert hub.served.keys() & left == set()


def test_code_is_downloaded_where_it_is_trusted(hub: Any, tiny_folder: Path) -> None:
    hub.add("me/tiny", tiny_folder, modeling__py=b"x")
    assert not (fetch("me/tiny").folder / "modeling.py").exists()
    assert (fetch("me/tiny", trust_remote_code=True).folder / "modeling.py").read_bytes() == b"x"


def test_the_parts_of_a_sentence_transformer_come_along(hub: Any, tiny_folder: Path) -> None:
    hub.add("me/tiny", tiny_folder, modules__json=b"[]")
    hub.repos["me/tiny"]["main"]["2_Dense/model.safetensors"] = b"x"
    assert (fetch("me/tiny").folder / "2_Dense" / "model.safetensors").read_bytes() == b"x"


def test_a_revision_is_a_branch_or_a_commit(hub: Any, tiny_folder: Path, sharded: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    commit = hub.add("me/tiny", sharded, branch="small")
    for revision in ("small", commit):
        source = fetch("me/tiny", revision)
        assert source.origin == f"me/tiny@{commit}"
        assert contents(source.folder) == contents(sharded)


def test_what_is_in_the_cache_is_not_downloaded_again(hub: Any, tiny_folder: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    first = fetch("me/tiny")
    hub.served.clear()
    assert fetch("me/tiny") == first
    assert not hub.served


def test_a_connection_that_breaks_is_resumed_where_it_broke(
    hub: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # a part of one is not kept
    hub.add("me/tiny", tiny_folder)
    hub.cut_after = 100_000
    if not at_least("huggingface_hub", "1.20"):  # before, it gives up, and begins anew when it is asked again
        text = fails(lambda: fetch("me/tiny"), ConnectionError)
        assert text.startswith("the hub cannot be reached for me/tiny: peer closed connection without sending complete")
        assert text.endswith("; what arrived whole is kept: try again")
        assert contents(fetch("me/tiny").folder) == contents(tiny_folder)
        return
    assert contents(fetch("me/tiny").folder) == contents(tiny_folder)
    assert hub.ranges == ["bytes=100000-"]
    assert hub.served["model.safetensors"] == (tiny_folder / "model.safetensors").stat().st_size


def test_a_cached_snapshot_needs_no_network(hub: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/tiny", tiny_folder)
    first = fetch("me/tiny")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("me/tiny") == first
    assert fetch("me/tiny", first.origin.partition("@")[2]) == first
    assert fetch_config("me/tiny") == first
    assert fetch(first.folder) == first  # a snapshot is pinned, also when it is named by its path
    assert hub.asked == []


def test_a_cached_snapshot_is_enough_where_the_hub_is_out_of_reach(
    hub: Any, tiny_folder: Path, no_hub: Callable[[], None]
) -> None:
    hub.add("me/tiny", tiny_folder)
    first = fetch("me/tiny")
    no_hub()
    assert fetch("me/tiny") == first


def test_a_snapshot_of_the_cache_that_lacks_weights_is_refused_offline(
    hub: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("me/tiny", tiny_folder)
    folder = fetch_config("me/tiny").folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fails(lambda: fetch("me/tiny")) in (
        f"the cache has only a part of me/tiny@{commit}: {folder}: has neither model.safetensors nor "
        "model.safetensors.index.json",
        # huggingface_hub 1.26 to 2.0 finds it itself
        "no model at 'me/tiny': no such folder, and HF_HUB_OFFLINE is set and the cache has no whole snapshot of it",
    )


# --- what goes wrong


@pytest.fixture
def no_hub(hub: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which nobody listens where the hub was."""

    def leave() -> None:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(constants, name, getattr(constants, name).replace(hub.endpoint, "http://127.0.0.1:9"))

    return leave


@pytest.fixture(params=[fetch, fetch_config], ids=["fetch", "fetch_config"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    asked: Callable[..., Any] = request.param
    return asked


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c", "model/", "~/model"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(hub: Any, name: str, ask: Callable[..., Any]) -> None:
    assert fails(lambda: ask(name)) == f"{Path(name).expanduser()}: no such folder"
    assert hub.asked == []


def test_a_misspelt_folder_is_answered_with_the_one_beside_it(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/tiny-math").mkdir(parents=True)
    assert fails(lambda: fetch("./models/tiny-maths")) == (
        "models/tiny-maths: no such folder; did you mean 'models/tiny-math'?"
    )
    assert fails(lambda: fetch("models/tiny-maths")) == (
        "no model at 'models/tiny-maths': no such folder, and the hub has none, or it is private "
        f"({HINT}); did you mean 'models/tiny-math'?"
    )


def test_an_id_that_the_hub_does_not_know_is_refused(hub: Any, ask: Callable[..., Any]) -> None:
    assert fails(lambda: ask("me/nothing")) == (
        f"no model at 'me/nothing': no such folder, and the hub has none, or it is private ({HINT})"
    )


def test_what_cannot_be_an_id_is_refused(hub: Any, ask: Callable[..., Any]) -> None:
    assert fails(lambda: ask("me/a--b")).startswith(
        "no model at 'me/a--b': no such folder, and it cannot be a hub id: Cannot have -- or .. in repo_id"
    )


def test_a_gated_model_is_refused_with_the_page_to_ask_at(hub: Any, tiny_folder: Path, ask: Callable[..., Any]) -> None:
    hub.add("me/tiny", tiny_folder)
    hub.gated.add("me/tiny")
    assert fails(lambda: ask("me/tiny")) == (f"me/tiny is gated: ask for access at {hub.endpoint}/me/tiny, then {HINT}")


def test_an_unknown_revision_is_answered_with_the_nearest(hub: Any, tiny_folder: Path, ask: Callable[..., Any]) -> None:
    hub.add("me/tiny", tiny_folder)
    hub.add("me/tiny", tiny_folder, branch="step-100")
    assert fails(lambda: ask("me/tiny", "step-10")) == "me/tiny has no revision 'step-10'; did you mean 'step-100'?"
    assert fails(lambda: ask("me/tiny", "0" * 40)) == f"me/tiny has no revision '{'0' * 40}'"


def test_a_revision_of_a_folder_is_refused(tiny_folder: Path, ask: Callable[..., Any]) -> None:
    assert fails(lambda: ask(tiny_folder, "main")) == (
        f"{tiny_folder} is on this disk; a revision is of a model on the hub"
    )


def test_offline_and_not_cached_is_the_users_to_mend(
    hub: Any, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fails(lambda: ask("me/tiny")) == (
        "no model at 'me/tiny': no such folder, and HF_HUB_OFFLINE is set and the cache has no whole snapshot of it"
    )


def test_no_network_is_nobodys_mistake(no_hub: Callable[[], None], ask: Callable[..., Any]) -> None:
    no_hub()
    assert fails(lambda: ask("me/tiny"), ConnectionError) == (
        "no model at 'me/tiny': no such folder, and the hub cannot be reached: [Errno 111] Connection refused"
    )


def test_a_hub_that_is_down_is_nobodys_mistake(hub: Any, ask: Callable[..., Any]) -> None:
    hub.down = True
    assert fails(lambda: ask("me/tiny"), ConnectionError).startswith(
        "no model at 'me/tiny': no such folder, and the hub cannot be reached: Server error '503 Service Unavailable'"
    )


def test_a_token_that_is_refused_is_the_users_to_mend(
    hub: Any, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert fails(lambda: ask("me/tiny")) == (
        f"the hub does not give me/tiny: Invalid credentials in Authorization header; {HINT}"
    )


def test_a_model_of_pickles_is_refused_before_anything_is_downloaded(hub: Any, tiny_folder: Path) -> None:
    hub.add("me/tiny", tiny_folder, pytorch_model__bin=b"x")
    del hub.repos["me/tiny"]["main"]["model.safetensors"]
    assert fails(lambda: fetch("me/tiny")) == (
        "me/tiny has no safetensors, only pytorch_model.bin; a pickle runs code when it is opened, so it is not "
        "downloaded. Convert it with transformers: from_pretrained(…), then save_pretrained(…)"
    )
    del hub.repos["me/tiny"]["main"]["pytorch_model.bin"]
    assert fails(lambda: fetch("me/tiny")) == (
        "me/tiny has neither model.safetensors nor model.safetensors.index.json on the hub"
    )
    assert not hub.served


def test_a_model_without_a_config_is_refused(hub: Any, tiny_folder: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    del hub.repos["me/tiny"]["main"]["config.json"]
    assert fails(lambda: fetch_config("me/tiny")) == "me/tiny has no config.json on the hub"


# --- plan and inspect


def test_plan_and_inspect_download_the_config_alone(hub: Any, tiny_folder: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    plan = qsurgeon.plan("w4a4-mxfp4", "me/tiny")
    assert plan.steps == qsurgeon.plan("w4a4-mxfp4", tiny_folder).steps
    assert qsurgeon.inspect("me/tiny").rows == qsurgeon.inspect(tiny_folder).rows
    assert hub.served == {"config.json": (tiny_folder / "config.json").stat().st_size}


def test_plan_and_inspect_take_a_revision(hub: Any, tiny_folder: Path, sharded: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    hub.add("me/tiny", sharded, branch="small")
    assert len(qsurgeon.plan("w4a4-mxfp4", "me/tiny", "small").wrapped) == 7
    assert qsurgeon.inspect("me/tiny", revision="small").wrappable == 8
    assert qsurgeon.inspect("me/tiny").wrappable == 22


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process: its exit code, and what it printed."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qsurgeon", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), *capfd.readouterr()

    return run


def test_the_commands_take_a_hub_id_and_its_revision(
    hub: Any, tiny_folder: Path, sharded: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    hub.add("me/tiny", tiny_folder)
    hub.add("me/tiny", sharded, branch="small")
    code, out, _ = command("plan", "w4a4-mxfp4", "--model", "me/tiny", "--revision", "small", "--json")
    assert (code, json.loads(out)["wrapped"]) == (0, 7)
    code, out, _ = command("inspect", "me/tiny", "--revision", "small")
    assert code == 1
    assert "full precision: none of 8 Linear modules is wrapped" in out.splitlines()
    wrong = "error: me/tiny has no revision 'smal'; did you mean 'small'?\n"
    assert command("inspect", "me/tiny", "--revision", "smal") == (2, "", wrong)
    assert hub.served.keys() == {"config.json"}


def test_a_hub_out_of_reach_is_exit_code_1(
    no_hub: Callable[[], None], command: Callable[..., tuple[int, str, str]]
) -> None:
    no_hub()
    assert command("inspect", "me/tiny") == (
        1,
        "",
        "error: no model at 'me/tiny': no such folder, and the hub cannot be reached: [Errno 111] Connection refused\n",
    )


@pytest.mark.one_version
def test_a_process_of_its_own_asks_the_endpoint_it_is_told(hub: Any, tiny_folder: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    words = ["plan", "w4a4-mxfp4", "--model", "me/tiny", "--json"]
    done = subprocess.run([sys.executable, "-m", "qsurgeon", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wrapped"] == 21
    assert hub.served.keys() == {"config.json"}


def test_progress_is_shown_on_stderr_and_nothing_on_stdout(
    hub: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/tiny", tiny_folder)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # shows bars where no terminal is
    code = "from qsurgeon.checkpoint import fetch; fetch('me/tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Downloading" in done.stderr
    assert "100%" in done.stderr
    assert "Downloading" not in done.stdout


# --- records


@pytest.mark.parametrize("pinned", [False, True], ids=["id", "snapshot"])
def test_a_record_says_which_model_of_the_hub_it_was(hub: Any, tiny_folder: Path, pinned: bool) -> None:
    commit = hub.add("me/tiny", tiny_folder)
    name = fetch("me/tiny").folder if pinned else "me/tiny"
    model = qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(name))
    source = model.config.quantization_config.record.source
    assert source == (f"me/tiny@{commit}" if pinned else "me/tiny")
    assert hub_id(source) == ("me/tiny", commit if pinned else None)


def test_a_folders_path_stays_at_home(tiny_folder: Path) -> None:
    model = qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(tiny_folder))
    assert model.config.quantization_config.record.source == "tiny-qwen2"
    assert hub_id("tiny-qwen2") is None
    assert origin("/gone/away/tiny") == "tiny"
    assert origin("") == ""


# --- rewriting what is on the hub


def test_a_hub_id_is_rewritten_and_its_commit_is_in_the_record(
    hub: Any, tiny_folder: Path, sharded: Path, tmp_path: Path
) -> None:
    hub.add("me/tiny", sharded)
    commit = hub.add("me/tiny", tiny_folder, branch="big")
    qsurgeon.rewrite("w4a4-mxfp4-packed", "me/tiny", tmp_path / "out", options=Options(revision="big"))
    qsurgeon.rewrite("w4a4-mxfp4-packed", tiny_folder, tmp_path / "local")
    here, there = contents(tmp_path / "out"), contents(tmp_path / "local")
    assert here["model.safetensors"] == there["model.safetensors"]
    record = json.loads(here["config.json"])["quantization_config"]
    assert record["source"] == json.loads(here["qsurgeon-plan.json"])["source"] == f"me/tiny@{commit}"
    assert f"at commit `{commit[:12]}`" in here["README.md"].decode()
    assert qsurgeon.load(tmp_path / "out").config.num_hidden_layers == 3


def test_config_and_weights_are_of_one_commit(
    hub: Any, tiny_folder: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the branch moves after the config was read."""
    commit = hub.add("me/tiny", tiny_folder, branch="old")
    hub.add("me/tiny", tiny_folder)
    module = sys.modules["qsurgeon.checkpoint.rewrite"]
    plan = vars(module)["plan_for"]

    def move_branch(*args: Any) -> Any:
        hub.add("me/tiny", sharded)
        return plan(*args)

    monkeypatch.setattr(module, "plan_for", move_branch)
    qsurgeon.rewrite("w4a4-mxfp4", "me/tiny", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "qsurgeon-plan.json").read_text())["source"] == f"me/tiny@{commit}"
    assert qsurgeon.load(tmp_path / "out").config.num_hidden_layers == 3


def test_a_recipe_that_does_not_fit_downloads_no_weight(hub: Any, tiny_folder: Path, tmp_path: Path) -> None:
    hub.add("me/tiny", tiny_folder)
    (tmp_path / "mine.yaml").write_text("version: 1\nrules:\n  - {target: [layrs], weight: mxfp4}\n")
    with pytest.raises(PlanError, match="'layrs' names no module"):
        qsurgeon.rewrite(tmp_path / "mine.yaml", "me/tiny", tmp_path / "out")
    assert set(hub.served) == {"config.json"}


def test_apply_takes_a_hub_id_and_pushes_what_it_wrote(
    hub: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("me/tiny", tiny_folder)
    out = tmp_path / "out"
    command = ["apply", "w4a4-mxfp4-packed", "--model", "me/tiny", "--output", str(out), "--push-to-hub", "me/packed"]
    monkeypatch.setattr(sys, "argv", ["qsurgeon", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert hub.repos["me/packed"]["main"] == contents(out)
    assert f"{hub.endpoint}/me/packed/commit/{hub.commit('me/packed')}" in capsys.readouterr().out


# --- writing


@pytest.fixture
def written(tiny_folder: Path, tmp_path: Path) -> Path:
    qsurgeon.rewrite("w4a4-mxfp4", tiny_folder, tmp_path / "tiny-w4a4")
    return tmp_path / "tiny-w4a4"


def test_a_model_on_the_hub_is_checked_before_it_is_loaded(hub: Any, written: Path) -> None:
    hub.add("me/whole", written)
    assert quant_layers(qsurgeon.load("me/whole")).keys() == quant_layers(qsurgeon.load(written)).keys()
    tensors = load_file(written / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    hub.add("me/broken", written)
    text = fails(lambda: qsurgeon.load("me/broken"))
    assert text.endswith("model.safetensors: model.norm.weight has shape [8], config.json says [64]")


def test_what_is_pushed_arrives_to_the_byte(hub: Any, written: Path) -> None:
    address = push(written, "me/tiny-w4a4")
    assert hub.repos["me/tiny-w4a4"]["main"] == contents(written)
    assert address == f"{hub.endpoint}/me/tiny-w4a4/commit/{hub.commit('me/tiny-w4a4')}"
    assert hub.created["me/tiny-w4a4"]["visibility"] == "private"
    assert qsurgeon.inspect("me/tiny-w4a4").wrapped == 21


def test_a_repository_is_public_where_that_is_said(hub: Any, written: Path) -> None:
    push(written, "me/tiny-w4a4", private=False)
    assert hub.created["me/tiny-w4a4"]["visibility"] == "public"


def test_pushing_again_keeps_what_else_is_there(hub: Any, written: Path) -> None:
    push(written, "me/tiny-w4a4")
    hub.repos["me/tiny-w4a4"]["main"]["notes.txt"] = b"mine"
    (written / "more.json").write_text("{}")
    push(written, "me/tiny-w4a4")
    assert hub.repos["me/tiny-w4a4"]["main"] == contents(written) | {"notes.txt": b"mine"}


def test_who_may_not_write_hears_of_it_before_the_work(
    hub: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("you/theirs", tiny_folder)
    hub.writable = False
    assert fails(lambda: reserve("you/theirs")) == (
        "you/theirs: the hub does not let us write there (You have no write access to it.); "
        f"{HINT}, with a token that may"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert fails(lambda: reserve("me/new")) == (
        f"me/new: the hub does not let us write there (Invalid username or password.); {HINT}, with a token that may"
    )
    assert fails(lambda: reserve("me/a--b")).startswith(
        "'me/a--b' cannot be a repository of the hub: Cannot have -- or .. in repo_id"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fails(lambda: reserve("me/new")) == "me/new: HF_HUB_OFFLINE is set, so that nothing can be pushed"


def test_a_push_without_a_network_is_nobodys_mistake(no_hub: Callable[[], None], written: Path) -> None:
    no_hub()
    assert fails(lambda: push(written, "me/tiny-w4a4"), ConnectionError) == (
        "me/tiny-w4a4: the upload was cut off: [Errno 111] Connection refused; what arrived whole is kept: try again"
    )


def test_a_folder_that_is_no_whole_checkpoint_is_not_pushed(hub: Any, written: Path, tmp_path: Path) -> None:
    assert fails(lambda: push(tmp_path / "nowhere", "me/x")) == (
        f"{tmp_path}/nowhere/config.json: cannot be read: No such file or directory"
    )
    (written / "model.safetensors").unlink()
    assert fails(lambda: push(written, "me/x")) == (
        f"{written}: has neither model.safetensors nor model.safetensors.index.json"
    )
    assert hub.asked == []
