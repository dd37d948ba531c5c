"""Compiled kernels are loaded from folders that nobody else can write to, and from no others."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qsurgeon.formats import kernels
from qsurgeon.formats.kernels import native
from qsurgeon.formats.kernels.private import NotPrivateError, private_folder, read_private

ANOTHER = os.geteuid() + 4321


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def refusal(path: Path) -> str:
    with pytest.raises(NotPrivateError) as caught:
        private_folder(path)
    return str(caught.value)


@pytest.fixture
def another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process believe that it is another user, to whom nothing here belongs; nobody but root could chown."""
    monkeypatch.setattr(os, "geteuid", lambda: ANOTHER)


# --- folders


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_folder_that_is_made_is_closed_to_others_and_so_are_those_around_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert made == tmp_path / "a" / "b"
    assert [mode(made), mode(made.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("before", [0o700, 0o750, 0o755, 0o711])
def test_a_folder_that_others_could_only_read_is_closed_to_them(tmp_path: Path, before: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(before)
    assert mode(private_folder(tmp_path / "a")) == 0o700


@pytest.mark.parametrize("before", [0o777, 0o775, 0o757, 0o720, 0o702, 0o1777, 0o1770])
def test_a_folder_that_others_can_write_to_is_refused_and_stays_as_it_is(tmp_path: Path, before: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(before)
    assert refusal(tmp_path / "a") == f"others than its owner can write to {tmp_path}/a (mode {before:04o})"
    assert mode(tmp_path / "a") == before


@pytest.mark.parametrize("before", [0o777, 0o775, 0o757])
@pytest.mark.parametrize("inside", ["b", "b/c"])
def test_a_folder_inside_of_one_that_others_can_write_to_is_refused(tmp_path: Path, before: int, inside: str) -> None:
    (tmp_path / "a" / inside).mkdir(parents=True, mode=0o700)
    (tmp_path / "a").chmod(before)
    assert refusal(tmp_path / "a" / inside) == f"others than its owner can write to {tmp_path}/a (mode {before:04o})"


def test_a_folder_where_others_can_write_files_of_their_own_alone_may_hold_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o1777)  # as /tmp
    assert mode(private_folder(tmp_path / "a" / "b")) == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path: Path, another_user: None) -> None:
    whose = next((one for one in reversed(tmp_path.parents) if one.stat().st_uid not in (0, ANOTHER)), tmp_path)
    assert refusal(tmp_path) == f"{whose} belongs to user {os.getuid()}, and this is user {ANOTHER}"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("of_another", ["a", "a/b"])
def test_root_does_not_use_the_folder_of_a_user(tmp_path: Path, of_another: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.chown(tmp_path / of_another, ANOTHER, ANOTHER)
    assert refusal(tmp_path / "a" / "b") == f"{tmp_path}/{of_another} belongs to user {ANOTHER}, and this is user 0"


def test_a_link_is_followed_and_what_it_leads_to_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("open")
    assert refusal(tmp_path / "link" / "x") == f"others than its owner can write to {tmp_path}/open (mode 0777)"
    (tmp_path / "open").chmod(0o700)
    assert private_folder(tmp_path / "link" / "x") == tmp_path / "open" / "x"


def test_a_relative_path_is_refused() -> None:
    assert refusal(Path("cache")) == "'cache' is not an absolute path"


def test_a_system_without_users_is_said_to_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid")
    assert refusal(tmp_path) == "this system does not say who can write to a folder"


def test_a_file_in_the_way_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "a").chmod(0o644)
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(NotADirectoryError):
            private_folder(path)
    assert mode(tmp_path / "a") == 0o644


# --- files


def test_a_file_is_read_if_it_is_ours_alone(tmp_path: Path) -> None:
    file = tmp_path / "x"
    assert read_private(file) is None
    file.write_bytes(b"abc")
    file.chmod(0o644)
    assert read_private(file) == b"abc"
    for others in (0o664, 0o646, 0o666):
        file.chmod(others)
        assert read_private(file) is None


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert [read_private(tmp_path / one) for one in ("link", "folder", "pipe")] == [None, None, None]


def test_a_file_of_another_user_is_not_read(tmp_path: Path, another_user: None) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert read_private(tmp_path / "x") is None


# --- where it is


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("QSURGEON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "/home/me/.cache/qsurgeon"),
        ({"QSURGEON_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/qsurgeon"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/qsurgeon"),
        ({"XDG_CACHE_HOME": "x"}, "/home/me/.cache/qsurgeon"),
        ({"XDG_CACHE_HOME": "/x", "QSURGEON_CACHE": "/y"}, "/y"),
        ({"QSURGEON_CACHE": "~/y"}, "/home/me/y"),
        ({"QSURGEON_CACHE": "y"}, "y"),
        ({"HOME": "/"}, "/.cache/qsurgeon"),
        ({"HOME": "me"}, "me/.cache/qsurgeon"),
    ],
)
def test_the_folder_is_what_the_environment_says(
    environment: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name, value in given.items():
        environment.setenv(name, value)
    assert native.cache_folder() == Path(expected)


# --- kernels

ROUND = """
import torch
from qsurgeon.formats import get_format, kernels
x = torch.tensor([0.3, -2.6, 5.0, 0.0] * 8)
print(get_format("mxfp4").fake_quantize(x)[:4].tolist(), kernels.kind_for(x, get_format("mxfp4")))
print(get_format("mxfp8").fake_quantize(x)[:4].tolist())
"""
VALUES = "[0.5, -3.0, 4.0, 0.0] native\n[0.3125, -2.5, 5.0, 0.0]\n"


def run(cwd: Path, **environment: str) -> list[str]:
    """Round two formats in a process of its own, see the right values, and return what it says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", ROUND],
        cwd=cwd,
        env={**os.environ, kernels.VARIABLE: "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, VALUES), done.stderr
    return done.stderr.splitlines()


def plant(folder: Path) -> Path:
    """Put a library in place of each kernel in ``folder`` that leaves a trace where it is loaded; return the trace."""
    trace = folder.parent / "loaded"
    code = f'#include <cstdio>\n__attribute__((constructor)) static void go() {{ fopen("{trace}", "w"); }}\n'
    (folder.parent / "evil.cpp").write_text(code)
    evil = folder.parent / "evil.so"
    subprocess.run(["c++", "-shared", "-fPIC", folder.parent / "evil.cpp", "-o", evil], check=True)
    for file in folder.glob("*.so"):
        file.write_bytes(evil.read_bytes())
        file.with_suffix(".sha256").write_text(hashlib.sha256(evil.read_bytes()).hexdigest())
    return trace


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two kernels. It is shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("kernels") / "cache"
    run(folder.parent, QSURGEON_CACHE=str(folder))
    assert len(list(folder.glob("*.so"))) == 2
    assert {mode(file) for file in (*folder.glob("*.so"), *folder.glob("*.sha256"))} == {0o600}
    return folder


def test_a_kernel_in_a_folder_that_others_can_write_to_is_not_loaded(compiled: Path, tmp_path: Path) -> None:
    folder, temporary = tmp_path / "cache", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    for file in compiled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o600)
    trace = plant(folder)
    folder.chmod(0o777)
    said = run(tmp_path, QSURGEON_CACHE=str(folder), TMPDIR=str(temporary))
    assert not trace.exists()
    assert said == [
        "qsurgeon: compiled CPU kernels are not kept, and none is loaded that was: others than its owner can write to "
        f"{folder} (mode 0777). Set QSURGEON_CACHE to a folder that you alone can write to",
        "qsurgeon: compiling the CPU kernel of mxfp4, float32: some seconds",
        "qsurgeon: compiling the CPU kernel of mxfp8, float32: some seconds",
    ]
    assert list(temporary.iterdir()) == []
    folder.chmod(0o700)  # what the trace would look like
    with pytest.raises(AssertionError):
        run(tmp_path, QSURGEON_CACHE=str(folder))
    assert trace.exists()


def test_a_kernel_that_others_could_have_changed_is_compiled_again(compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    for file in compiled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    trace = plant(folder)
    for file in folder.glob("*.so"):
        file.chmod(0o666)
    assert len(run(tmp_path, QSURGEON_CACHE=str(folder))) == 2
    assert not trace.exists()
    assert run(tmp_path, QSURGEON_CACHE=str(folder)) == []


def test_no_folder_of_a_project_that_one_is_in_is_taken_for_the_cache(compiled: Path, tmp_path: Path) -> None:
    for name in (".cache/qsurgeon", "here/qsurgeon"):
        (tmp_path / name).mkdir(parents=True)
        for file in compiled.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        trace = plant(tmp_path / name)
    first, *_ = run(tmp_path, HOME=".", XDG_CACHE_HOME="here", QSURGEON_CACHE="")
    assert re.search(r"'\.?/?\.cache/qsurgeon' is not an absolute path", first)
    assert not trace.exists()


def test_where_no_folder_is_private_torch_computes(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", ROUND],
        env={**os.environ, kernels.VARIABLE: "", "QSURGEON_CACHE": "x", "TMPDIR": str(tmp_path / "open")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == VALUES.replace("native", "eager")
    assert done.stderr.splitlines()[-1] == (
        "qsurgeon: the CPU kernels cannot be compiled, so that slower torch operations compute the same values: "
        f"others than its owner can write to {tmp_path}/open (mode 0777)"
    )


def test_a_compiler_that_is_no_command_is_said_once() -> None:
    code = f"from qsurgeon.formats.kernels import native\nprint(native.compiler())\n{ROUND}"
    environment = {**os.environ, kernels.VARIABLE: "", "CXX": "g++ '-O2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "('', None)\n" + VALUES.replace("native", "eager")
    assert done.stderr.splitlines() == [
        "qsurgeon: the CPU kernels cannot be compiled, so that slower torch operations compute the same values: CXX is "
        "no command: no closing quotation: g++ '-O2"
    ]
