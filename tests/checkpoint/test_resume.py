"""A rewrite that was killed goes on where it was, to the bytes of one that was not."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qsurgeon.checkpoint import Events, Options, rewrite
from qsurgeon.checkpoint.writing.journal import RUN, entries
from qsurgeon.errors import CheckpointError
from qsurgeon.recipe import Recipe

RECIPE = Recipe.model_validate(
    {"version": 1, "storage": "packed", "rules": [{"target": ["layers"], "weight": "nvfp4", "input": "nvfp4"}]}
)
OPTIONS = Options(workers=2, max_shard_size="40kB")
WATCHED = ("pwrite", "write", "preadv", "fsync", "ftruncate", "replace")


@pytest.fixture(scope="module")
def source(make_qwen2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "model"
    make_qwen2(num_hidden_layers=2, tie_word_embeddings=False).save_pretrained(folder, max_shard_size="100kB")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    rewrite(RECIPE, source, out, options=OPTIONS)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def watch_calls(act: Callable[[], None]) -> None:
    """Call ``act`` before every call that reads or writes what a rewrite reads or writes."""
    for name in WATCHED:
        original = getattr(os, name)

        def call(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            act()
            return original(*args, **kwargs)

        setattr(os, name, call)


def rewrite_until(calls: int, source: Path, out: Path) -> None:
    """Rewrite, and be killed as ``kill -9`` does it before the call that is number ``calls``."""
    left = [calls]
    lock = threading.Lock()

    def count() -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    watch_calls(count)
    rewrite(RECIPE, source, out, options=OPTIONS)


def killed(calls: int, source: Path, out: Path) -> int:
    """Return how a process that rewrites ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qsurgeon.checkpoint", "transformers.models.qwen2.modeling_qwen2"])
    process = context.Process(target=rewrite_until, args=(calls, source, out))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def calls_of_a_whole_run(source: Path, out: Path) -> int:
    """Return how many calls there are to be killed before."""
    high = 1
    while killed(high, source, out.with_name(f"{out.name}-{high}")):
        high *= 2
    low = high // 2
    while high - low > 8:
        middle = (low + high) // 2
        low, high = (middle, high) if killed(middle, source, out.with_name(f"{out.name}-{middle}")) else (low, middle)
    return low


def test_killed_at_any_call_it_goes_on_to_the_same_bytes(
    source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    before = contents(source)
    last = calls_of_a_whole_run(source, tmp_path / "count")
    assert last > 100
    resumed = 0
    for calls in sorted(random.Random(0).sample(range(last), 24)):
        out = tmp_path / f"out{calls}"
        assert killed(calls, source, out) == -signal.SIGKILL
        assert not out.exists()
        resumed += bool(entries(tmp_path / f"out{calls}.partial"))
        rewrite(RECIPE, source, out, options=OPTIONS)
        assert contents(out) == uninterrupted
        assert not out.with_name(f"{out.name}.partial").exists()
    assert resumed > 15
    assert contents(source) == before


def test_killed_again_and_again_it_ends(source: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    out, times = tmp_path / "out", 0
    while killed(60, source, out):
        times += 1
        assert times < 40
    assert times > 1
    assert contents(out) == uninterrupted


@pytest.fixture
def unfinished(source: Path, tmp_path: Path) -> Path:
    """An output of which most is done; its folder is beside it."""
    killed(100, source, tmp_path / "out")
    assert entries(tmp_path / "out.partial")
    return tmp_path / "out"


def test_it_says_what_it_found(source: Path, unfinished: Path, heard: Any) -> None:
    done = len(entries(unfinished.with_name("out.partial")))
    rewrite(RECIPE, source, unfinished, heard, OPTIONS)
    assert heard.notes == [f"{unfinished}.partial is an unfinished run of this: {done} of 27 tensors are done"]


def test_what_is_done_is_not_done_again(
    source: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    done = entries(unfinished.with_name("out.partial"))
    read = []
    original = os.preadv

    def count(*args: Any) -> int:
        read.append(args)
        return original(*args)

    monkeypatch.setattr("os.preadv", count)
    rewrite(RECIPE, source, unfinished, options=OPTIONS)
    packed = 14
    assert 0 < len(read) <= 27 + packed - len(done)
    assert contents(unfinished) == uninterrupted


def test_bytes_that_never_reached_the_disk_are_written_again(
    source: Path, unfinished: Path, uninterrupted: dict[str, bytes]
) -> None:
    for file in unfinished.with_name("out.partial").glob("out/*.safetensors"):
        size = file.stat().st_size
        file.write_bytes(file.read_bytes()[: size // 2] + bytes(size - size // 2))
    rewrite(RECIPE, source, unfinished, options=OPTIONS)
    assert contents(unfinished) == uninterrupted


def test_what_is_being_made_is_on_the_disk_before_it_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[os.stat_result] = []
    fsync, replace = os.fsync, Path.replace

    def renamed(file: Path, target: Path) -> Path:
        assert target.name != RUN or any(os.path.samestat(one, file.stat()) for one in flushed)
        return replace(file, target)

    def seen(handle: int) -> None:
        flushed.append(os.fstat(handle))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "replace", renamed)
    rewrite(RECIPE, source, tmp_path / "out", options=OPTIONS)


def test_a_line_that_was_cut_off_spoils_no_other(
    source: Path, unfinished: Path, uninterrupted: dict[str, bytes]
) -> None:
    file = unfinished.with_name("out.partial") / "journal-0.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n")[:-7])
    rewrite(RECIPE, source, unfinished, options=OPTIONS)
    assert contents(unfinished) == uninterrupted


def refused(source: Path, out: Path, recipe: Recipe = RECIPE, options: Options = OPTIONS) -> str:
    partial = out.with_name("out.partial")
    before = contents(partial)
    with pytest.raises(CheckpointError) as caught:
        rewrite(recipe, source, out, options=options)
    assert contents(partial) == before
    start, _, rest = str(caught.value).partition(": ")
    assert start == f"{partial} was started by a run that this one cannot resume"
    reason, _, end = rest.rpartition(". ")
    assert end == "Delete it to start over, or repeat the original run"
    return reason


def test_another_recipe_is_refused(source: Path, unfinished: Path) -> None:
    other = Recipe.model_validate({**RECIPE.model_dump(exclude_unset=True), "saved_inputs": "full"})
    assert refused(source, unfinished, other) == "the recipe differs"


def test_another_size_of_files_is_refused(source: Path, unfinished: Path) -> None:
    assert refused(source, unfinished, options=Options(max_shard_size="50kB")) == (
        "--max-shard-size was 40kB, now it is 50kB"
    )


def test_a_source_that_changed_is_refused(source: Path, unfinished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    file = min(copy.glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file, metadata={"format": "pt"})
    assert refused(copy, unfinished).startswith(f"the source's {file.name} date was 20")


def test_another_version_is_refused(source: Path, unfinished: Path) -> None:
    run = unfinished.with_name("out.partial") / RUN
    run.write_text(json.dumps(json.loads(run.read_text()) | {"torch": "1.0"}))
    assert refused(source, unfinished).startswith("torch was 1.0, now it is ")


def test_a_run_of_which_nothing_is_done_is_in_nobodys_way(source: Path, tmp_path: Path) -> None:
    class Dies(Events):
        def advance(self, count: int) -> None:
            raise KeyboardInterrupt

    out, other = tmp_path / "out", Options(max_shard_size="1MB")
    partial = tmp_path / "out.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed
        with pytest.raises(KeyboardInterrupt):
            rewrite(RECIPE, source, out, Dies(), OPTIONS)
    left = {file.name for file in (partial / "out").iterdir()}
    assert (partial / RUN).is_file()
    rewrite(RECIPE, source, out, options=other)
    rewrite(RECIPE, source, tmp_path / "new", options=other)
    assert left - contents(tmp_path / "new").keys()
    assert contents(out) == contents(tmp_path / "new")


def test_resume_needs_something_to_go_on_with(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        rewrite(RECIPE, source, tmp_path / "out", options=Options(resume=True))
    assert str(caught.value) == f"there is nothing to resume: no {tmp_path}/out.partial"
    assert not (tmp_path / "out.partial").exists()


def test_resume_goes_on(source: Path, unfinished: Path, uninterrupted: dict[str, bytes]) -> None:
    rewrite(RECIPE, source, unfinished, options=Options(resume=True, max_shard_size="40kB", workers=1))
    assert contents(unfinished) == uninterrupted


def test_two_runs_into_one_folder_are_one_too_many(source: Path, tmp_path: Path) -> None:
    class Second(Events):
        error = ""

        def begin(self, _: Any) -> None:
            with pytest.raises(CheckpointError) as caught:
                rewrite(RECIPE, source, tmp_path / "out", options=OPTIONS)
            self.error = str(caught.value)

    second = Second()
    rewrite(RECIPE, source, tmp_path / "out", second, OPTIONS)
    assert second.error == f"{tmp_path}/out is being written by another run, in {tmp_path}/out.partial"
    assert (tmp_path / "out" / "config.json").is_file()
