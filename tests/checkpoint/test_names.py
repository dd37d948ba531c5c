"""Folders whose names are not UTF-8: what cannot be loaded afterwards is refused before it is written."""

import os
import shutil
import sys
from pathlib import Path

import pytest

import qsurgeon
from qsurgeon.checkpoint import origin
from qsurgeon.errors import CheckpointError

NAME = os.fsdecode(b"n\xffm")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


def test_a_model_in_such_a_folder_is_rewritten_and_its_card_can_be_read(tiny_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"\xfe copy")
    shutil.copytree(tiny_folder, source)
    qsurgeon.rewrite("w4a4-mxfp4-packed", source, tmp_path / "out")
    assert "\\udcfe copy" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert qsurgeon.load(tmp_path / "out").config.quantization_config.record.source == "\\udcfe copy"
    assert origin(source) == "\\udcfe copy"


def test_such_a_folder_is_not_begun(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.rewrite("w4a4-mxfp4", tiny_folder, tmp_path / NAME)
    assert str(caught.value) == (
        f"{tmp_path}/n\\udcffm: a name that is not UTF-8, which safetensors cannot open; choose another"
    )
    assert list(tmp_path.iterdir()) == []
