"""From a folder to a folder: what is written, and what is refused before anything is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import qsurgeon
from qsurgeon.checkpoint import read_headers, rewrite, weight_files
from qsurgeon.errors import CheckpointError, PlanError
from qsurgeon.recipe import Recipe

TOKENS = torch.arange(1, 13).reshape(2, 6)


Maker = Callable[..., Any]


@pytest.fixture(scope="session")
def save_small(make_qwen2: Maker) -> Callable[..., Path]:
    """Return a function that saves a Qwen2 model of two layers into a folder and returns it."""

    def save(path: Path, shard_size: str = "1GB", *, tied: bool = False) -> Path:
        make_qwen2(num_hidden_layers=2, tie_word_embeddings=tied).save_pretrained(path, max_shard_size=shard_size)
        return path

    return save


@pytest.fixture(scope="session")
def whole(save_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="session")
def sharded(save_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("source") / "model", "50kB")


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "source"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fails(source: Path, destination: Path, recipe: Any = "w4a4-mxfp4", error: type[Exception] = CheckpointError) -> str:
    """Return the error's text, having seen that the source is as it was and no output is left."""
    before = contents(source) if source.is_dir() else {}
    existed = destination.exists()
    with pytest.raises(error) as caught:
        rewrite(recipe, source, destination)
    assert (contents(source) if source.is_dir() else {}) == before
    assert destination.exists() == existed
    assert not destination.with_name(destination.name + ".partial").exists()
    return str(caught.value)


@pytest.mark.parametrize("fixture", ["whole", "sharded"])
def test_the_output_computes_what_the_recipe_on_the_live_model_computes(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(fixture)
    plan = rewrite("w4a4-nvfp4", source, tmp_path / "out")
    live = qsurgeon.apply("w4a4-nvfp4", hf.AutoModelForCausalLM.from_pretrained(source))
    assert "in 14 of 15 Linear modules" in plan.summary
    assert torch.equal(qsurgeon.load(tmp_path / "out")(TOKENS).logits, live(TOKENS).logits)


def test_the_weights_are_copied_and_not_linked(source: Path, tmp_path: Path) -> None:
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    written = tmp_path / "out" / "model.safetensors"
    assert written.read_bytes() == (source / "model.safetensors").read_bytes()
    assert not written.samefile(source / "model.safetensors")


def test_saving_into_the_output_leaves_the_source(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    model = qsurgeon.load(tmp_path / "out")
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "out")
    assert contents(source) == before


def test_the_config_is_the_sources_and_the_record(source: Path, tmp_path: Path) -> None:
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    record = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert record["rules"][0]["excluded"] == {"<output_head>?": ["lm_head"]}
    assert len(record["rules"][0]["modules"]) == 14


def test_recipe_plan_and_versions_lie_beside_the_weights(source: Path, tmp_path: Path) -> None:
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == qsurgeon.load_recipe("w4a4-mxfp4").text
    plan = json.loads((tmp_path / "out" / "qsurgeon-plan.json").read_text())
    assert plan["source"] == "source"
    assert sorted(plan["versions"]) == ["qsurgeon", "torch", "transformers"]
    assert {"module": "lm_head", "why": "excluded by '<output_head>?' of rule 'linears'"} in plan["modules"]


def test_a_model_card_keeps_what_was_on_it(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("# My model\n\nIt does sums.\n")
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# My model\n\nIt does sums.\n\n<!-- qsurgeon -->\n## Number formats\n" in card
    assert "| `model.layers.{0..1}.mlp.up_proj` | 2 | mxfp4 | mxfp4 | ste | rule `linears` |" in card


def test_pickles_and_other_engines_weights_stay_behind(source: Path, tmp_path: Path) -> None:
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"x")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / ".cache").mkdir()
    (source / ".cache" / "x.json").write_text("{}")
    (source / "tokenizer.json").write_text("{}")
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qsurgeon-plan.json",
        "recipe.yaml",
        "tokenizer.json",
    ]


def test_progress_hears_of_every_byte_of_the_weights(sharded: Path, tmp_path: Path, heard: Any) -> None:
    rewrite("w4a4-mxfp4", sharded, tmp_path / "out", heard)
    assert heard.bytes == sum(tensor.size for tensor in read_headers(sharded).values())
    assert heard.estimates[0].read == heard.bytes
    assert heard.estimates[0].written == sum(file.stat().st_size for file in weight_files(sharded))


@pytest.mark.parametrize("shard_size", ["1GB", "50kB"], ids=["whole", "sharded"])
def test_untie_writes_the_tied_weight_a_second_time(
    save_small: Callable[..., Path], shard_size: str, tmp_path: Path
) -> None:
    source = save_small(tmp_path / "tied", shard_size, tied=True)
    recipe = Recipe.model_validate(
        {"version": 1, "untie": True, "rules": [{"target": ["lm_head"], "weight": "mxfp4", "input": "mxfp4"}]}
    )
    rewrite(recipe, source, tmp_path / "out")
    model = qsurgeon.load(tmp_path / "out")
    live = qsurgeon.apply(recipe, hf.AutoModelForCausalLM.from_pretrained(source))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(model(TOKENS).logits, live(TOKENS).logits)


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert fails(tmp_path / "nowhere", tmp_path / "out") == f"{tmp_path}/nowhere: no such folder"


def test_an_output_that_is_the_source_is_refused(source: Path) -> None:
    assert fails(source, source) == f"{source} is the source itself; write somewhere else"


def test_an_output_inside_the_source_is_refused(source: Path) -> None:
    assert fails(source, source / "out") == f"{source}/out is inside the source {source}; write somewhere else"


def test_an_output_that_exists_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    assert fails(source, tmp_path / "out") == f"{tmp_path}/out exists; name another folder, or remove it first"
    assert fails(source, tmp_path / "file") == f"{tmp_path}/file exists; name another folder, or remove it first"
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_another_run_is_writing_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        rewrite("w4a4-mxfp4", source, tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out.partial exists: another run is writing it, or one was killed; remove it if none is running"
    )
    assert contents(tmp_path / "out.partial") == {"model.safetensors": b"mine"}


def test_an_output_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert fails(source, tmp_path / "file" / "out") == f"{tmp_path}/file/out cannot be written: Not a directory"


def test_a_link_that_leads_elsewhere_is_found_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    (source / "vocab.txt").symlink_to("/etc/hostname")
    assert fails(source, tmp_path / "out").startswith(f"{source}/vocab.txt: is a link to /etc/hostname, outside of")
    assert not (tmp_path / "out.partial").exists()


def test_a_second_rewrite_is_refused(source: Path, tmp_path: Path) -> None:
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    assert fails(tmp_path / "out", tmp_path / "again") == (
        f"{tmp_path}/out was rewritten by qsurgeon already; apply the recipe to the model it came from. If it was "
        "trained since: a recipe that says the same and 'storage: packed' packs its weights as they are now, and "
        "without the quantization_config in its config.json they are an ordinary model's, in full precision"
    )


def test_a_checkpoint_that_something_else_quantized_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert fails(source, tmp_path / "out") == (
        f"{source} is quantized already, by gptq; expected a checkpoint in full precision"
    )


def test_a_recipe_that_does_not_fit_writes_nothing(source: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"version": 1, "rules": [{"target": ["layrs"], "weight": "mxfp4"}]})
    assert fails(source, tmp_path / "out", recipe, PlanError) == (
        "rules[0].target[0]: 'layrs' names no module; did you mean 'layers'?"
    )


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert fails(source, tmp_path / "out") == (
        f"{source}/model.safetensors: model.layers.0.mlp.up_proj.weight has shape [128, 32], config.json says [128, 64]"
    )


def test_a_file_that_is_cut_short_is_refused(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert fails(source, tmp_path / "out").startswith(f"{file}: is not a whole safetensors file: ")


def test_a_missing_shard_is_named_with_the_nearest_there_is(shards: Path, tmp_path: Path) -> None:
    first, *_ = weight_files(shards)
    first.rename(first.with_suffix(".safetensors.bak"))
    message = fails(shards, tmp_path / "out")
    assert message.startswith(f"{shards}: the index names {first.name}, which is missing; did you mean 'model-")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_names_a_file_elsewhere_is_refused(shards: Path, tmp_path: Path, name: str) -> None:
    index = shards / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], name)
    index.write_text(json.dumps(data))
    assert fails(shards, tmp_path / "out") == f"{index}: names '{name}', which is not a file of its folder"


def test_an_index_without_a_map_is_refused(shards: Path, tmp_path: Path) -> None:
    index = shards / "model.safetensors.index.json"
    index.write_text("{}")
    assert fails(shards, tmp_path / "out") == f"{index}: has no weight_map"


def test_a_checkpoint_of_pickles_is_refused_and_the_reason_given(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")
    assert fails(source, tmp_path / "out") == (
        f"{source}: has no safetensors, only pytorch_model.bin; a pickle runs code when it is opened, so it is not "
        "read. Convert it with transformers: from_pretrained(…), then save_pretrained(…)"
    )


def test_a_folder_without_weights_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    assert fails(source, tmp_path / "out") == (
        f"{source}: has neither model.safetensors nor model.safetensors.index.json"
    )


def test_a_config_that_is_not_json_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    assert fails(source, tmp_path / "out") == (
        f"{source}/config.json: is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)"
    )
    (source / "config.json").write_text("[]")
    assert fails(source, tmp_path / "out") == f"{source}/config.json: expected a JSON object, got list"
    (source / "config.json").unlink()
    assert fails(source, tmp_path / "out") == f"{source}/config.json: cannot be read: No such file or directory"


def test_an_error_while_writing_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        rewrite("w4a4-mxfp4", source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_headers_tell_names_files_shapes_and_dtypes(sharded: Path) -> None:
    headers = read_headers(sharded)
    one = headers["model.layers.0.mlp.up_proj.weight"]
    assert (one.shape, one.dtype, one.file.parent) == ((128, 64), "F32", sharded)
    assert len(headers) == len(hf.AutoModelForCausalLM.from_pretrained(sharded).state_dict())


def test_weights_of_other_parts_in_subfolders_come_along(source: Path, tmp_path: Path) -> None:
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    rewrite("w4a4-mxfp4", source, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()


def test_untie_where_tensors_go_by_other_names_is_refused(save_small: Callable[..., Path], tmp_path: Path) -> None:
    source = save_small(tmp_path / "tied", tied=True)
    tensors = load_file(source / "model.safetensors")
    tensors["other.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.model_validate({"version": 1, "untie": True, "rules": [{"target": ["lm_head"], "weight": "mxfp4"}]})
    assert fails(source, tmp_path / "out", recipe) == (
        "no file has a tensor model.embed_tokens.weight to untie lm_head.weight from: its tensors go by other names "
        "than its modules. Load the model, apply the recipe to it, and save it"
    )


def test_a_config_json_is_no_folder(source: Path, tmp_path: Path) -> None:
    assert fails(source / "config.json", tmp_path / "out") == f"{source}/config.json: is a file; expected a folder"


def test_an_output_path_is_resolved_before_it_is_staged(source: Path, tmp_path: Path) -> None:
    rewrite("w4a4-mxfp4", source, tmp_path / "out" / "deep" / "..")
    assert (tmp_path / "out" / "config.json").is_file()
