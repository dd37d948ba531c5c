"""Repositories of the hub that somebody made to break out: nothing of them is downloaded but what a model needs."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from qsurgeon.checkpoint.hub import fetch
from qsurgeon.checkpoint.writing.journal import entries
from qsurgeon.errors import CheckpointError
from qsurgeon.reading import read_regular

NO_PICKLE = "a pickle runs code when it is opened, so it is not read. "
CONVERT = "Convert it with transformers: from_pretrained(…), then save_pretrained(…)"


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        (["x"], "has no weight_map"),
        ({}, "has no weight_map"),
        ("x", "has no weight_map"),
        ({"a": ["x"]}, "tensor a expects the name of a file, got list"),
        ({"a": None}, "tensor a expects the name of a file, got NoneType"),
        ({"a": "../x.safetensors"}, "names '../x.safetensors', which is not a file of its folder"),
        ({"a": "/etc/x.safetensors"}, "names '/etc/x.safetensors', which is not a file of its folder"),
        ({"a": "*"}, "names '*', which is not safetensors; expected safetensors"),
        ({"a": "x.bin"}, f"names 'x.bin', which is not safetensors; {NO_PICKLE}{CONVERT}"),
    ],
    ids=str,
)
def test_an_index_that_names_what_is_no_weight_is_refused_before_that_is_downloaded(
    hub: Any, tiny_folder: Path, weight_map: Any, expected: str
) -> None:
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.add("me/evil", tiny_folder)
    hub.repos["me/evil"]["main"] |= {"model.safetensors.index.json": index, "x.bin": b"x", "evil.py": b"x"}
    with pytest.raises(CheckpointError) as caught:
        fetch("me/evil")
    where, _, why = str(caught.value).partition("model.safetensors.index.json: ")
    assert why == expected
    assert Path(where).is_dir()
    assert not [one for one in hub.asked if one.endswith(("x.bin", "evil.py", "model.safetensors"))]


def test_a_file_that_becomes_a_pipe_before_it_is_opened_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "x")
    before = os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, 1, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: before)
    with pytest.raises(OSError, match="it is not a regular file"):
        read_regular(tmp_path / "x", 10)


def test_a_file_is_closed_if_it_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    close = os.close

    def watched(one: int) -> None:
        closed.append(one)
        close(one)

    monkeypatch.setattr(os, "close", watched)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 10)
    assert len(closed) == 1


def test_a_pipe_among_the_journals_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "journal-0.jsonl").write_text(
        '{"job": "a", "crcs": {"weight": 1}, "finite": true}\n' + "[" * 100_000 + "\n"
    )
    os.mkfifo(tmp_path / "journal-1.jsonl")
    assert list(entries(tmp_path)) == ["a"]
