"""What a machine or a file can do to a rewrite: one clear message, the source as it was, no output that looks done."""

import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qsurgeon
from qsurgeon.checkpoint import Events, Options, rewrite
from qsurgeon.checkpoint.writing.journal import entries
from qsurgeon.errors import CheckpointError
from qsurgeon.recipe import Recipe

RECIPE = Recipe.model_validate(
    {"version": 1, "storage": "packed", "rules": [{"target": ["layers"], "weight": "nvfp4", "input": "nvfp4"}]}
)
ALONE = Options(workers=1)
KEPT = "; finished work is kept in {out}.partial, and the same command resumes it"


@pytest.fixture
def source(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "source"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fails(error: type[Exception], source: Path, out: Path, options: Options = ALONE) -> str:
    """Return the message, having seen that the source is as it was and that nothing looks finished."""
    before = contents(source)
    with pytest.raises(error) as caught:
        rewrite(RECIPE, source, out, options=options)
    assert contents(source) == before
    assert not out.exists()
    assert not list(out.parent.glob("out.partial/out/config.json"))
    return str(caught.value.args[-1])


def failing(name: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let a call of ``os`` fail from its ``number``-th on, until what is returned is called."""
    original, calls = getattr(os, name), [0]

    def call(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] >= number:
            raise OSError(code, os.strerror(code))
        return original(*args)

    monkeypatch.setattr(os, name, call)
    return lambda: monkeypatch.setattr(os, name, original)


@pytest.mark.parametrize("number", [2, 9, 30])
def test_a_disk_that_fills_up(source: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    mend = failing("pwrite", number, errno.ENOSPC, monkeypatch)
    message = fails(OSError, source, out)
    kept = KEPT.format(out=out) if number > 2 else ""
    assert message == f"{out}.partial/out/model.safetensors: No space left on device{kept}"
    assert out.with_name("out.partial").exists() == bool(kept)
    mend()
    rewrite(RECIPE, source, out)
    rewrite(RECIPE, source, tmp_path / "other")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()


def test_a_disk_without_room_is_told_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    message = fails(OSError, source, tmp_path / "out")
    assert message.endswith("GB are to be written, 0.00 GB are free")
    assert not (tmp_path / "out.partial").exists()


def test_what_lies_beside_the_weights_needs_room_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "checkpoint-7").mkdir()
    (source / "checkpoint-7" / "model.safetensors").write_bytes(bytes(20_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**7))
    assert "0.02 GB are to be written, 0.01 GB are free" in fails(OSError, source, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_is_too_small(source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GB are to be written" in fails(OSError, source, small_disk / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
    message = fails(OSError, source, small_disk / "out")
    assert message == (
        f"{small_disk}/out.partial/out/model.safetensors: No space left on device" + KEPT.format(out=small_disk / "out")
    )
    assert entries(small_disk / "out.partial")


def test_more_files_than_may_be_open(make_qwen2: Callable[..., Any], tmp_path: Path) -> None:
    make_qwen2(num_hidden_layers=4).save_pretrained(tmp_path / "source", max_shard_size="20kB")
    options = Options(max_shard_size="3kB")
    rewrite(RECIPE, tmp_path / "source", tmp_path / "free", options=options)  # imports open files too
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 16, limits[1]))
    try:
        rewrite(RECIPE, tmp_path / "source", tmp_path / "out", options=options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 16
    assert contents(tmp_path / "out") == contents(tmp_path / "free")


@pytest.mark.parametrize(
    ("number", "file", "kept"), [(1, "run.new", ""), (2, "out/model.safetensors", KEPT)], ids=["run", "weights"]
)
def test_a_disk_that_loses_what_was_written(
    source: Path, tmp_path: Path, number: int, file: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = failing("fsync", number, errno.EIO, monkeypatch)
    out = tmp_path / "out"
    assert fails(OSError, source, out) == f"{out}.partial/{file}: Input/output error{kept.format(out=out)}"
    mend()
    rewrite(RECIPE, source, out)


def fsync_fails(code: int, folders: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what reaches the disk not be told of ``folders``, which are asked for when it is."""
    original = os.fsync

    def fsync(handle: int) -> None:
        if any(os.path.samestat(os.fstat(handle), folder.stat()) for folder in folders()):
            raise OSError(code, os.strerror(code))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_system_that_flushes_no_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync_fails(errno.EINVAL, lambda: [tmp_path, *tmp_path.glob("out.partial/out")], monkeypatch)
    rewrite(RECIPE, source, tmp_path / "out")
    assert qsurgeon.inspect(tmp_path / "out").wrapped == 21
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_an_output_whose_name_does_not_reach_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_fails(errno.EIO, lambda: [tmp_path], monkeypatch)
    with pytest.raises(OSError, match=re.escape(f"{tmp_path}: Input/output error") + "$"):
        rewrite(RECIPE, source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_file_system_where_a_file_that_is_open_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS gives an open file another name when it is removed, so that its folder cannot be removed."""
    removed: list[Any] = []
    original = os.rmdir

    def rmdir(path: Any, **where: Any) -> None:
        if Path(path).name == "out.partial" and not removed:
            removed.append(path)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        original(path, **where)

    monkeypatch.setattr(os, "rmdir", rmdir)
    rewrite(RECIPE, source, tmp_path / "out")
    assert removed
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize("number", [1, 12, 20])
def test_a_disk_that_cannot_be_read(source: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mend = failing("preadv", number, errno.EIO, monkeypatch)
    message = fails(OSError, source, tmp_path / "out")
    assert message.startswith(f"{source}/model.safetensors: Input/output error, reading model.")
    mend()
    rewrite(RECIPE, source, tmp_path / "out")
    assert qsurgeon.inspect(tmp_path / "out").wrapped == 21


class Meddles(Events):
    """Does something to the source when the first bytes were dealt with."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act: Callable[[], Any] | None = act

    def advance(self, count: int) -> None:
        act, self.act = self.act, None
        if act is not None:
            act()


def test_a_source_that_is_cut_short_meanwhile(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model.safetensors: ends inside of model\..*; it was cut short"):
        rewrite(RECIPE, source, tmp_path / "out", Meddles(lambda: os.truncate(file, 100_000)), ALONE)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    with pytest.raises(CheckpointError) as caught:
        rewrite(RECIPE, source, tmp_path / "out", Meddles(lambda: os.utime(file)), ALONE)
    assert str(caught.value) == f"{source} changed while it was read"
    assert not (tmp_path / "out").exists()


class Impatient(Events):
    """Presses Ctrl-C after some slabs."""

    def __init__(self, slabs: int) -> None:
        self.left = slabs

    def advance(self, count: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_interrupted_it_keeps_what_is_done(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        rewrite(RECIPE, source, tmp_path / "out", Impatient(20), ALONE)
    assert str(caught.value) == KEPT.format(out=tmp_path / "out")
    assert len(entries(tmp_path / "out.partial")) > 10
    assert not (tmp_path / "out").exists()


def test_interrupted_before_anything_is_done_it_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        rewrite(RECIPE, source, tmp_path / "out", Impatient(1), ALONE)
    assert str(caught.value) == "; nothing was written"
    assert list(tmp_path.iterdir()) == [source]


def broken(source: Path, value: float, *names: str) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name in names:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


PLAIN, WRAPPED = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(source: Path, tmp_path: Path, value: float) -> None:
    broken(source, value, PLAIN, WRAPPED)
    out = tmp_path / "out"
    message = fails(CheckpointError, source, out)
    names, _, rest = message.removeprefix(f"{source} has NaN or infinity in ").partition(". ")
    assert sorted(names.split(", ")) == [PLAIN, WRAPPED]
    assert rest == f"With --allow-nonfinite they are written all the same{KEPT.format(out=out)}"


def test_allow_nonfinite_goes_on_from_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(source, torch.nan, WRAPPED)
    fails(CheckpointError, source, tmp_path / "out")
    monkeypatch.delattr(os, "preadv")  # all is done: nothing of the source is read again
    rewrite(RECIPE, source, tmp_path / "out", options=Options(allow_nonfinite=True))
    assert qsurgeon.load(tmp_path / "out").model.layers[1].mlp.up_proj.weight.dtype == torch.uint8


def test_large_values_are_finite(source: Path, tmp_path: Path) -> None:
    """Their sum is not."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors[PLAIN].fill_(torch.finfo(torch.float32).max)
    save_file(tensors, file, metadata={"format": "pt"})
    rewrite(RECIPE, source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_output_in_a_folder_that_is_read_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    if os.getuid() == 0:  # who may write anywhere
        failing("mkdir", 1, errno.EACCES, monkeypatch)
    assert fails(CheckpointError, source, folder / "out") == f"{folder}/out cannot be written: Permission denied"
    assert list(folder.iterdir()) == []
