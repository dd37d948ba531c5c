"""What is at the other end of the standard streams: code pages, closed descriptors, readers that leave, full disks."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qsurgeon.cli import main
from qsurgeon.cli.streams import likeness
from qsurgeon.telling import say

TINY_MATH = str(Path(__file__).parents[2] / "examples/models/tiny-math")
COMMANDS = [
    ("--help",),
    ("plan", "--help"),
    ("plan", "w4a4-mxfp4", "--model", TINY_MATH),
    ("plan", "w4a4-mxfp4", "--model", TINY_MATH, "--json"),
    ("plan", "w4a4×mxfp4…", "--model", TINY_MATH),
    ("inspect", TINY_MATH),
    ("inspect", "/nowhere/ünï→\udcff"),
    ("formats",),
    ("recipes",),
    ("recipes", "w4a4-mxfp4"),
    ("schema",),
]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251", "cp437", "shift_jis", "utf-8"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_encoding_stops_a_command(command: tuple[str, ...], encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["qsurgeon", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    wrong = any(one in command for one in ("w4a4×mxfp4…", "/nowhere/ünï→\udcff"))
    assert stop.value.code == (2 if wrong else 1 if command[0] == "inspect" else 0)
    said = (err if wrong else out).getvalue().decode(encoding)
    assert "Traceback" not in said
    assert said.startswith("error: ") if wrong else len(said) > 100


def test_what_an_encoding_lacks_is_written_by_what_looks_like_it() -> None:
    error = UnicodeEncodeError("ascii", "384×128 … ΔW → é─│╭\udcff", 0, 24, "")
    assert likeness(error) == ("384x128 ... dW -> \\xe9-|+\\udcff", 24)
    with pytest.raises(UnicodeDecodeError):
        likeness(UnicodeDecodeError("ascii", b"\xff", 0, 1, ""))


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the shell, in which $Q is qsurgeon."""
    environment = os.environ | {"Q": f"{sys.executable} -m qsurgeon"}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["recipes", "--help"])
def test_a_stream_that_cannot_be_written_is_named(command: str) -> None:
    closed = shell(f"$Q {command} >&-")
    assert (closed.returncode, closed.stderr) == (
        1,
        "error: standard output is closed; to throw the output away, say > /dev/null\n",
    )
    full = shell(f"$Q {command} >/dev/full")
    assert full.returncode == 1
    assert full.stderr.removeprefix("error: ").removeprefix("standard output: ") == "No space left on device\n"


def test_a_reader_that_has_enough_ends_it_quietly() -> None:
    done = shell("set -o pipefail; $Q recipes | head -c 0; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full"])
def test_messages_that_nobody_can_read_stop_nothing_and_stay_out_of_the_result(where: str) -> None:
    assert shell(f"$Q recipes w4a4-mxfp4 {where}").stdout.startswith("# W4A4 with MXFP4")
    wrong = shell(f"$Q recipes nothing-like-it {where}")
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_a_number_that_is_closed_is_not_given_to_a_file() -> None:
    code = "import os, sys; from qsurgeon.cli.streams import prepare; prepare(); sys.exit(os.open('/dev/zero', 0))"
    assert shell(f'{sys.executable} -c "{code}" <&- >&-').returncode > 2


@pytest.mark.parametrize("stream", [None, "full"])
def test_what_no_result_depends_on_is_dropped_where_it_cannot_be_said(
    stream: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", None if stream is None else Full())
    say("unheard")
    assert capsys.readouterr().out == ""
