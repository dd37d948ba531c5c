"""Another encoding is one file: it streams, loads, saves and computes as the first does, with no other file touched."""

import copy
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import qsurgeon
from qsurgeon.checkpoint.writing import stream
from qsurgeon.errors import CheckpointError, FormatError, RecipeError, ShapeError, SurgeryError
from qsurgeon.formats import Format, Quantized, get_format
from qsurgeon.hf.quantizer import QSurgeonConfig
from qsurgeon.layers import PackedLinear, Quantization, packed_layers
from qsurgeon.recipe import Recipe
from qsurgeon.storage import ENCODINGS, PACKED, Encoding, Slot, encoding_of, register, storages
from qsurgeon.storage.packed import SCALE, TENSOR_SCALE, WEIGHT
from qsurgeon.surgery import current_record, read_record

CODES, SCALES, TOP = "codes_swapped", "scales_transposed", "scale_of_all"
IDS = torch.arange(1, 9).reshape(1, 8)


def swapped(data: Tensor) -> Tensor:
    """Return bytes with their halves exchanged."""
    return data << 4 | data >> 4


class Swapped(Encoding):
    """Other names, in another order; the halves of each byte of codes exchanged; scales transposed."""

    name = "swapped"
    stored = "stored as exchanged halves"
    elsewhere = "nothing can load it"

    def slots(self, format: Format, rows: int, columns: int) -> dict[str, Slot]:
        found = PACKED.slots(format, rows, columns)
        slots = {}
        if TENSOR_SCALE in found:
            slots[TOP] = found[TENSOR_SCALE]
        if SCALE in found:
            slots[SCALES] = Slot(torch.uint8, found[SCALE].shape[::-1], 1)
        return {**slots, CODES: found[WEIGHT]}

    def encode(self, weight: Quantized) -> dict[str, Tensor]:
        found = PACKED.encode(weight)
        encoded = {CODES: swapped(found[WEIGHT])}
        if SCALE in found:
            encoded[SCALES] = found[SCALE].mT
        if TENSOR_SCALE in found:
            encoded[TOP] = found[TENSOR_SCALE]
        return encoded

    def decode(self, stored: Mapping[str, Tensor], format: Format, columns: int, dtype: torch.dtype) -> Quantized:
        found = {WEIGHT: swapped(stored[CODES])}
        if SCALES in stored:
            found[SCALE] = stored[SCALES].mT.contiguous()
        if TOP in stored:
            found[TENSOR_SCALE] = stored[TOP]
        return PACKED.decode(found, format, columns, dtype)

    def section(self, record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "source": "of swapped"}


@pytest.fixture(autouse=True)
def encoding() -> Iterator[Encoding]:
    before = dict(ENCODINGS)
    yield register(Swapped())
    ENCODINGS.clear()
    ENCODINGS.update(before)


def recipe(storage: str, weight: str = "nvfp4") -> Recipe:
    formats = {
        "square": {"like": "mxfp4", "block": [4, 8]},
        "rows": {"like": "nvfp4", "tensor_scale": "row"},
        "random": {"like": "mxfp4", "rounding": "stochastic"},
        "rotated": {"like": "nvfp4", "hadamard": 16},
    }
    rules = [{"target": ["layers"], "exclude": ["layers.0.mlp"], "weight": weight}]
    return Recipe.model_validate({"version": 1, "storage": storage, "formats": formats, "rules": rules})


@pytest.fixture
def source(tiny_qwen2: Any, tmp_path: Path) -> Path:
    tiny_qwen2.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def weights(model: Any) -> dict[str, Tensor]:
    return {name: layer.opened(torch.float32) for name, layer in packed_layers(model).items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("weight", ["nvfp4", "square", "rows", "random", "rotated", "fp8_e4m3", "mxfp6_e2m3"])
def test_another_encoding_streams_and_loads_as_the_first_does(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    monkeypatch.setattr(stream, "SLAB", 2048)  # several slabs a weight
    for storage in ("packed", "swapped"):
        qsurgeon.rewrite(recipe(storage, weight), source, tmp_path / storage)
    one, other = (qsurgeon.load(tmp_path / storage) for storage in ("packed", "swapped"))
    assert len(weights(one)) > 4
    assert same(weights(one), weights(other))
    assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)
    live = qsurgeon.apply(recipe("swapped", weight), AutoModelForCausalLM.from_pretrained(source))
    assert same(weights(one), weights(live))
    live.save_pretrained(tmp_path / "live")
    assert same(tensors(tmp_path / "live"), tensors(tmp_path / "swapped"))


def test_what_is_told_of_a_checkpoint_is_told_of_its_encoding(source: Path, tmp_path: Path) -> None:
    qsurgeon.rewrite(recipe("swapped"), source, tmp_path / "out")
    found = tensors(tmp_path / "out")
    layer = "model.layers.1.self_attn.q_proj"
    assert {name for name in found if name.startswith(layer)} >= {f"{layer}.{key}" for key in (CODES, SCALES, TOP)}
    assert f"{layer}.{WEIGHT}" not in found
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (section["storage"], section["source"]) == ("swapped", "of swapped")
    card = (tmp_path / "out/README.md").read_text()
    assert "are stored as exchanged halves (`storage: swapped`)" in card
    assert "without it nothing can load it." in card
    model = qsurgeon.load(tmp_path / "out")
    report, live = qsurgeon.inspect(tmp_path / "out"), qsurgeon.inspect(model)
    assert (report.storage, live.storage) == ("swapped", "swapped")
    assert (report.bytes, live.bytes) == (sum(one.nbytes for one in found.values()),) * 2
    assert "storage=swapped" in repr(model.get_submodule(layer))


def test_an_encoded_model_is_saved_copied_and_pickled(source: Path, tmp_path: Path) -> None:
    qsurgeon.rewrite(recipe("swapped"), source, tmp_path / "out")
    model = qsurgeon.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "out"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # made here
        assert same(weights(other), weights(model))
        assert {layer.encoding for layer in packed_layers(other).values()} == {encoding_of("swapped")}
    fresh = qsurgeon.apply(recipe("swapped"), AutoModelForCausalLM.from_pretrained(source))
    fresh.load_state_dict(model.state_dict())
    assert same(weights(fresh), weights(model))
    layer = next(iter(packed_layers(model).values()))
    values = torch.randn(*layer.features)
    layer.repack(values)
    assert torch.equal(layer.opened_rows([1, 3]), layer.grid.fake_quantize(values)[[1, 3]])
    with pytest.raises(CheckpointError) as caught:
        layer.load_state_dict({**layer.state_dict(), CODES: torch.zeros(1)})
    assert str(caught.value) == f"{CODES} is torch.float32; a packed weight is torch.uint8"


def test_a_run_that_was_stopped_goes_on_by_the_names_of_its_pieces(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qsurgeon.rewrite(recipe("swapped"), source, tmp_path / "whole")
    write, done = stream._Sink.end, list[str]()

    def end(sink: Any) -> int:
        if len(done) > 9:
            raise OSError(28, "no space")
        done.append(sink.piece.name)
        return write(sink)

    monkeypatch.setattr(stream._Sink, "end", end)
    with pytest.raises(OSError, match="no space"):
        qsurgeon.rewrite(recipe("swapped"), source, tmp_path / "out")
    written = list[str]()

    def noted(sink: Any) -> int:
        written.append(sink.piece.name)
        return write(sink)

    monkeypatch.setattr(stream._Sink, "end", noted)
    qsurgeon.rewrite(recipe("swapped"), source, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    pieces = [name for name in tensors(tmp_path / "whole") if name.rpartition(".")[2] in (CODES, SCALES, TOP)]
    assert 0 < len(written) < len(pieces)


class TooShort(Swapped):
    name = "short"

    def encode(self, weight: Quantized) -> dict[str, Tensor]:
        return {name: tensor[:-1] if name == CODES else tensor for name, tensor in super().encode(weight).items()}


class TooLong(Swapped):
    name = "long"

    def encode(self, weight: Quantized) -> dict[str, Tensor]:
        return {name: torch.cat([one, one]) if name == CODES else one for name, one in super().encode(weight).items()}


@pytest.mark.parametrize("kind", [TooShort, TooLong])
def test_an_encoding_that_does_not_keep_to_its_slots_is_an_error(
    source: Path, tmp_path: Path, kind: type[Encoding]
) -> None:
    register(kind())
    one = {"version": 1, "storage": kind.name, "rules": [{"target": ["layers.1.mlp.up_proj"], "weight": "mxfp4"}]}
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.rewrite(Recipe.model_validate(one), source, tmp_path / "out")
    name = f"model.layers.1.mlp.up_proj.{CODES}"
    told = (
        f"{name} has 4064 bytes; its place is 4096"
        if kind is TooShort
        else (f"{name} has more bytes than its place, 4096")
    )
    assert str(caught.value) == told


def test_a_recipe_says_each_encoding_that_is_registered(tmp_path: Path) -> None:
    assert storages() == ("master", "packed", "swapped")
    assert Recipe.model_json_schema()["properties"]["storage"]["enum"] == ["master", "packed", "swapped"]
    (tmp_path / "mine.yaml").write_text("version: 1\nstorage: swaped\nrules:\n- {target: [layers], weight: mxfp4}\n")
    with pytest.raises(RecipeError) as caught:
        qsurgeon.load_recipe(tmp_path / "mine.yaml")
    assert caught.value.mistakes[0].message == "'storage' cannot be 'swaped'; did you mean 'swapped'?"


def test_a_record_of_an_encoding_that_is_not_there_is_an_error(tiny_qwen2: Any) -> None:
    record = current_record(qsurgeon.apply(recipe("swapped"), tiny_qwen2))
    assert record is not None
    del ENCODINGS["swapped"]
    with pytest.raises(CheckpointError) as caught:
        read_record(record.to_dict(), "config.json")
    assert str(caught.value) == "config.json: quantization_config.storage: Input should be 'master' or 'packed'"


def test_two_encodings_have_two_names() -> None:
    with pytest.raises(FormatError) as caught:
        register(Swapped())
    assert str(caught.value) == "'swapped' is a storage already; name yours otherwise"


def test_a_model_with_two_encodings_has_no_record(tiny_qwen2: Any) -> None:
    model = qsurgeon.apply(recipe("packed"), tiny_qwen2)
    last = list(packed_layers(model).values())[-1]
    last.encode_as(ENCODINGS["swapped"])
    with pytest.raises(SurgeryError) as caught:
        current_record(model)
    assert str(caught.value) == (
        "some weights are stored as packed and some as swapped; a checkpoint has one storage: apply recipes with the "
        "same storage"
    )


def test_a_plain_checkpoint_is_not_encoded_while_it_is_loaded(source: Path, tiny_qwen2: Any) -> None:
    record = current_record(qsurgeon.apply(recipe("swapped"), tiny_qwen2))
    assert record is not None
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(source, quantization_config=QSurgeonConfig(**record.to_dict()))
    assert str(caught.value) == (
        "storage: swapped is not packed while a plain checkpoint is loaded: write a checkpoint first (qsurgeon apply), "
        "and load that"
    )


def test_what_is_not_packed_as_the_first_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = torch.nn.Linear(32, 16)
    PackedLinear.wrap(layer, Quantization(get_format("mxfp4"), None), "mine")
    layer.encode_as(encoding_of("swapped"))
    monkeypatch.setattr("qsurgeon.layers.packed.is_sharded", lambda tensor: True)
    with pytest.raises(ShapeError) as caught:
        layer(torch.zeros(1, 32))
    assert str(caught.value) == "mine.weight is stored as swapped, which cannot be sharded"
