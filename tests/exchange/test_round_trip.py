"""There and back: what is exported and imported again has the bytes that it had."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from exchange_cases import same, tensors
from safetensors.torch import load_file, save_file

import qsurgeon
from qsurgeon.checkpoint.writing import stream
from qsurgeon.exchange.encodings import reciprocal
from qsurgeon.surgery import read_config, record_in

THERE = [
    ("mxfp4", "mxfp4", "compressed-tensors"),
    ("even", "even", "compressed-tensors"),
    ("nvfp4", None, "compressed-tensors"),
    ("nvfp4", "nvfp4-static", "compressed-tensors"),
    ("mxfp8", "mxfp8", "compressed-tensors"),
    ("mxfp6_e2m3", "mxfp8", "compressed-tensors"),
    ("fp8_e4m3", "fp8-static", "compressed-tensors"),
    ("fp8_e4m3_row", "fp8_e4m3_row", "compressed-tensors"),
    ("fp8_e4m3_128x128", "fp8-128", "compressed-tensors"),
    ("int8", "int8", "compressed-tensors"),
    ("int4_b32", None, "compressed-tensors"),
    ("nvfp4", "nvfp4-static", "modelopt"),
    ("nvfp4", None, "modelopt"),
    ("mxfp8", "mxfp8", "modelopt"),
    ("fp8_e4m3", "fp8-static", "modelopt"),
]


@pytest.mark.parametrize(("weight", "asked", "to"), THERE)
def test_a_packed_model_comes_back_to_the_byte(
    wrapped: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weight: str,
    asked: str | None,
    to: str,
) -> None:
    folder = wrapped(weight, asked, "packed")
    monkeypatch.setattr(stream, "SLAB", 4096)
    qsurgeon.export(folder, tmp_path / "there", to)
    done = qsurgeon.import_checkpoint(tmp_path / "there", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(folder))
    one, other = (record_in(read_config(place)) for place in (folder, tmp_path / "back"))
    assert one is not None
    assert other is not None
    assert one.quantizations() == other.quantizations() == done.modules
    ids = torch.arange(1, 9)[None]
    assert torch.equal(
        qsurgeon.load(folder)(input_ids=ids).logits, qsurgeon.load(tmp_path / "back")(input_ids=ids).logits
    )
    qsurgeon.export(tmp_path / "back", tmp_path / "again", to)
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "there"))


def test_master_weights_come_back_as_they_would_have_been_packed(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    qsurgeon.export(wrapped("nvfp4", None), tmp_path / "there", "compressed-tensors")
    qsurgeon.import_checkpoint(tmp_path / "there", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(wrapped("nvfp4", None, "packed")))


def inexact() -> Iterator[float]:
    """Yield divisors that are no reciprocals of their reciprocals."""
    for step in range(1000):
        divisor = float(torch.tensor(20000 + step * 7.1, dtype=torch.float32))
        if reciprocal(reciprocal(divisor)) != divisor:
            yield divisor


def test_a_foreign_divisor_comes_back_to_the_last_bit(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    qsurgeon.export(wrapped("nvfp4", "nvfp4-static"), tmp_path / "there", "compressed-tensors")
    found, divisors = load_file(tmp_path / "there/model.safetensors"), inexact()
    names = [name for name in found if name.endswith("_global_scale")]
    for name in names:
        found[name] = torch.tensor([next(divisors)])
    save_file(found, tmp_path / "there/model.safetensors", {"format": "pt"})
    (tmp_path / "there/qsurgeon-export.json").unlink()
    qsurgeon.import_checkpoint(tmp_path / "there", tmp_path / "back")
    qsurgeon.export(tmp_path / "back", tmp_path / "again", "compressed-tensors")
    assert len(names) == 20
    assert same(tensors(tmp_path / "again"), found)
