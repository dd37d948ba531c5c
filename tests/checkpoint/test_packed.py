"""A packed rewrite: what packing in memory gives, whatever the files, the threads and the slabs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, safe_open, save_file

import qsurgeon
from qsurgeon.checkpoint import Options, read_headers, rewrite
from qsurgeon.checkpoint.writing import stream
from qsurgeon.checkpoint.writing.layout import size_in_bytes
from qsurgeon.errors import CheckpointError
from qsurgeon.recipe import Recipe

TOKENS = torch.arange(1, 13).reshape(2, 6)
FORMATS = {
    "turned": {"like": "mxfp4", "hadamard": 16},
    "square": {"like": "mxfp4", "block": [16, 16]},
    "by-chance": {"like": "mxfp4", "rounding": "stochastic"},
    "by-row": {"like": "nvfp4", "tensor_scale": "row"},
    "fixed": {"like": "nvfp4", "tensor_scale": "static", "static_scale": 0.001},
}


def recipe(weight: str = "nvfp4", input: str | None = None, **fields: Any) -> Recipe:
    rule = {"target": ["layers"], "weight": weight, **({"input": input} if input else {})}
    return Recipe.model_validate({"version": 1, "storage": "packed", "rules": [rule], "formats": FORMATS, **fields})


@pytest.fixture(scope="module")
def model(make_qwen2: Callable[..., Any]) -> Any:
    return make_qwen2(num_hidden_layers=2, tie_word_embeddings=False).to(torch.bfloat16)


@pytest.fixture(scope="module")
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    model.save_pretrained(folder, max_shard_size="50kB")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("weight", ["mxfp4", "nvfp4", "mxfp6_e2m3", "fp8_e4m3", "int4_b32", *FORMATS])
@pytest.mark.parametrize("slab", [1024, stream.SLAB], ids=["slabs", "whole"])
def test_the_tensors_are_those_of_packing_in_memory(
    source: Path, tmp_path: Path, weight: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLAB", slab)
    rewrite(recipe(weight), source, tmp_path / "out")
    live = qsurgeon.apply(recipe(weight), hf.AutoModelForCausalLM.from_pretrained(source))
    assert equal(tensors_of(tmp_path / "out"), live.state_dict())
    assert torch.equal(qsurgeon.load(tmp_path / "out")(TOKENS).logits, live(TOKENS).logits)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("size", [None, "20kB", "1GB"])
def test_neither_threads_nor_files_change_a_tensor(
    source: Path, tmp_path: Path, workers: int, size: str | None
) -> None:
    rewrite(recipe(), source, tmp_path / "out", options=Options(workers=workers, max_shard_size=size))
    rewrite(recipe(), source, tmp_path / "one", options=Options(workers=1))
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "one"))
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 2) == (size == "20kB")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (size == "20kB")


def test_files_are_no_larger_than_asked(source: Path, tmp_path: Path) -> None:
    rewrite(recipe(), source, tmp_path / "out", options=Options(max_shard_size="20kB"))
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 20_000  # noqa: SIM118


@pytest.mark.parametrize(
    ("size", "count"),
    [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("30 KB", 30_000), ("700B", 700), ("1TB", 10**12), (42, 42)],
)
def test_sizes_of_files(size: int | str, count: int) -> None:
    assert size_in_bytes(size) == count


@pytest.mark.parametrize("size", ["10XB", "GB", "", "0", "0.1B", "-5GB", "1e3GB", 0, -1])
def test_a_size_that_is_none_is_refused_before_anything_is_read(size: int | str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        rewrite(recipe(), "me/not-downloaded", tmp_path / "out", options=Options(max_shard_size=size))
    assert str(caught.value) == (f"'{size}' is no size of a file; expected one like 5GB, 500MB or a number of bytes")


def test_what_is_not_wrapped_is_the_sources_to_the_bit(source: Path, tmp_path: Path) -> None:
    rewrite(recipe(), source, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = [name for name in before if before[name].dtype == after[name].dtype]
    assert len(kept) == len(before) - 14
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_weight_takes_four_and_a_half_bits(source: Path, tmp_path: Path) -> None:
    rewrite(recipe(), source, tmp_path / "out")
    headers = read_headers(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    sizes = {key: headers[key].size for key in headers if key.startswith(name)}
    assert sizes == {name: 128 * 32, f"{name}_scale": 128 * 4, f"{name}_tensor_scale": 4}


def test_a_rule_without_a_weight_format_leaves_the_weight(source: Path, tmp_path: Path) -> None:
    only_inputs = Recipe.model_validate(
        {"version": 1, "storage": "packed", "rules": [{"target": ["layers"], "input": "mxfp4"}]}
    )
    rewrite(only_inputs, source, tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(source))


def test_master_files_change_only_when_asked(source: Path, tmp_path: Path) -> None:
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    rewrite("w4a4-mxfp4", source, tmp_path / "one", options=Options(max_shard_size="1GB"))
    for file in source.glob("*.safetensors*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert equal(tensors_of(tmp_path / "one"), tensors_of(source))


@pytest.mark.parametrize("stored_twice", [False, True])
def test_an_untied_weight_is_packed_and_the_other_is_not(
    make_qwen2: Callable[..., Any], tmp_path: Path, stored_twice: bool
) -> None:
    make_qwen2(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    if stored_twice:
        file = tmp_path / "tied" / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    head = Recipe.model_validate(
        {"version": 1, "storage": "packed", "untie": True, "rules": [{"target": ["lm_head"], "weight": "mxfp4"}]}
    )
    rewrite(head, tmp_path / "tied", tmp_path / "out")
    loaded = qsurgeon.load(tmp_path / "out")
    live = qsurgeon.apply(head, hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tied"))
    assert loaded.lm_head.weight.dtype == torch.uint8
    assert torch.equal(loaded(TOKENS).logits, live(TOKENS).logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_weights_by_other_names_are_found_and_keep_them(make_qwen2: Callable[..., Any], tmp_path: Path) -> None:
    """A checkpoint of the base model, whose names lack the prefix, for the model with a head."""
    make_qwen2(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    live = qsurgeon.apply(recipe(), hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    rewrite(recipe(), tmp_path / "model", tmp_path / "out")
    assert "layers.0.mlp.up_proj.weight_scale" in read_headers(tmp_path / "out")
    assert torch.equal(qsurgeon.load(tmp_path / "out")(TOKENS).logits, live(TOKENS).logits)


def test_a_wrapped_weight_that_is_missing_is_named_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    rewrite("w4a4-mxfp4", source, tmp_path / "broken", options=Options(max_shard_size="1GB"))
    (tmp_path / "broken" / "config.json").write_bytes((source / "config.json").read_bytes())
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        rewrite(recipe(), tmp_path / "broken", tmp_path / "out")
    assert str(caught.value) == "no file has a tensor for model.layers.1.mlp.up_proj.weight"
    assert not (tmp_path / "out.partial").exists()


def test_tensors_without_a_place_are_told_and_copied(source: Path, tmp_path: Path, heard: Any) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "odd"))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors = tensors_of(source)
    tensors["model.mtp.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite(recipe(), folder, tmp_path / "out", heard)
    assert heard.notes == ["1 tensors that the model has no place for are copied as they are, such as model.mtp.weight"]
    assert torch.equal(tensors_of(tmp_path / "out")["model.mtp.weight"], tensors["model.mtp.weight"])


def test_nothing_is_told_where_all_has_its_place(make_qwen2: Callable[..., Any], tmp_path: Path, heard: Any) -> None:
    make_qwen2(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    rewrite(recipe(), tmp_path / "tied", tmp_path / "out", heard)
    assert heard.notes == []
