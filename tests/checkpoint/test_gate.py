"""What is wrong with a folder is said before anything is loaded from it, or written, and in the same words."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qsurgeon
from qsurgeon.checkpoint.reading.gate import check_checkpoint
from qsurgeon.errors import CheckpointError, NothingWrappedError, QSurgeonError
from qsurgeon.recipe import Recipe

Act = Callable[[Path, Path], Any]


def recipe(storage: str) -> Recipe:
    rules = [{"target": ["mlp"], "weight": "mxfp4", "input": "mxfp4"}]
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": rules})


def maker(kind: str) -> Any:
    """Return a tiny model with biases, a head, and more than one kind of tensor."""
    import transformers as hf

    tiny: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    torch.manual_seed(0)
    match kind:
        case "qwen2":
            return hf.Qwen2ForCausalLM(hf.Qwen2Config(**tiny, hidden_size=32, num_key_value_heads=2))
        case "tied":
            config = hf.Qwen2Config(**tiny, hidden_size=32, num_key_value_heads=2, tie_word_embeddings=True)
            return hf.Qwen2ForCausalLM(config)
    return hf.BertForSequenceClassification(hf.BertConfig(**tiny, hidden_size=32, max_position_embeddings=16))


TARGET = {"qwen2": "mlp", "tied": "mlp", "bert": "intermediate"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models, plain and wrapped. They are shared: copy one before changing it."""
    root, made = tmp_path_factory.mktemp("gate"), {}
    for kind, target in TARGET.items():
        made[kind] = root / kind
        maker(kind).save_pretrained(made[kind])
        for storage in ("master", "packed"):
            rules = [{"target": [target], "weight": "mxfp4", "input": "mxfp4"}]
            one = Recipe.model_validate({"version": 1, "storage": storage, "rules": rules})
            made[f"{kind}-{storage}"] = root / f"{kind}-{storage}"
            qsurgeon.rewrite(one, made[kind], made[f"{kind}-{storage}"])
    return made


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def load(folder: Path, _out: Path) -> Any:
    return qsurgeon.load(folder)


def rewrite(folder: Path, out: Path) -> Any:
    kind = TARGET[folder.name.partition("-")[0]]
    rules = [{"target": [kind], "weight": "mxfp4", "input": "mxfp4"}]
    return qsurgeon.rewrite(Recipe.model_validate({"version": 1, "rules": rules}), folder, out)


def plan(folder: Path, _out: Path) -> Any:
    return qsurgeon.plan(recipe("master"), folder)


def inspect(folder: Path, _out: Path) -> Any:
    return qsurgeon.inspect(folder)


def refusal(act: Act, folder: Path, tmp_path: Path) -> str:
    with pytest.raises(QSurgeonError) as caught:
        act(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    return str(caught.value)


# --- what is no file


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str, Path], str]]:
    """Return what puts something that is no file at a path, and returns what it is called."""
    opened: list[socket.socket] = []

    def put(kind: str, path: Path) -> str:
        path.unlink(missing_ok=True)
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "linked pipe":
                os.mkfifo(tmp_path / "p")
                path.symlink_to(tmp_path / "p")
            case "socket":
                one = socket.socket(socket.AF_UNIX)
                opened.append(one)
                here = Path.cwd()
                os.chdir(path.parent)  # a socket's path is short
                one.bind(path.name)
                os.chdir(here)
            case "device":
                path.symlink_to("/dev/zero")
            case "folder":
                path.mkdir()
        return kind.rpartition(" ")[2]

    yield put
    for one in opened:
        one.close()


FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@pytest.mark.parametrize("act", [load, inspect, plan, rewrite])
@pytest.mark.parametrize("kind", ["pipe", "linked pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(
    copy: Callable[[str], Path], make: Callable[[str, Path], str], tmp_path: Path, act: Act, kind: str, name: str
) -> None:
    folder = copy("qwen2" if act in (plan, rewrite) else "qwen2-master")
    what = make(kind, folder / name)
    assert refusal(act, folder, tmp_path) == f"{folder / name}: is a {what}; expected a file"


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "README.md", "modeling.py"])
def test_a_pipe_by_any_name_is_refused(copy: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = copy("qwen2")
    os.mkfifo(folder / name)
    assert refusal(rewrite, folder, tmp_path) == f"{folder / name}: is a pipe; expected a file"


# --- adapters


@pytest.fixture
def adapter(folders: dict[str, Path], tmp_path: Path) -> Path:
    model = qsurgeon.load(folders["qwen2-master"])
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    data["base_model_name_or_path"] = str(folders["qwen2-master"])
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(data))
    return tmp_path / "adapter"


def merge(folder: Path, out: Path) -> Any:
    return qsurgeon.merge(folder, out)


@pytest.mark.parametrize("act", [load, merge])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_a_pipe_in_an_adapter_is_refused(adapter: Path, tmp_path: Path, act: Act, name: str) -> None:
    (adapter / name).unlink(missing_ok=True)
    os.mkfifo(adapter / name)
    assert refusal(act, adapter, tmp_path) == f"{adapter / name}: is a pipe; expected a file"


@pytest.mark.parametrize("act", [load, merge])
@pytest.mark.parametrize("bad", ["pipe", "shape"])
def test_the_base_of_an_adapter_is_looked_at_too(
    adapter: Path, copy: Callable[[str], Path], tmp_path: Path, act: Act, bad: str
) -> None:
    base = copy("qwen2-master")
    data = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(data | {"base_model_name_or_path": str(base)}))
    if bad == "pipe":
        os.mkfifo(base / "tokenizer.json")
        assert refusal(act, adapter, tmp_path) == f"{base}/tokenizer.json: is a pipe; expected a file"
    else:
        change(base, {"model.norm.weight": torch.ones(33)})
        expected = f"{base}/model.safetensors: model.norm.weight has shape [33], config.json says [32]"
        assert refusal(act, adapter, tmp_path) == expected


@pytest.mark.parametrize("act", [load, merge])
def test_an_adapter_without_its_weights_or_with_a_pickle_is_refused(adapter: Path, tmp_path: Path, act: Act) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert refusal(act, adapter, tmp_path) == f"{adapter}: has no adapter_model.safetensors"


@pytest.mark.parametrize("act", [load, merge])
def test_an_adapter_that_is_no_safetensors_is_refused(adapter: Path, tmp_path: Path, act: Act) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    message = refusal(act, adapter, tmp_path)
    assert message.startswith(f"{file}: is not a whole safetensors file: it is cut short: 1 of ")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": "x"}, "the adapter cannot be loaded: "),
        ({"target_modules": 5}, "the adapter cannot be loaded: "),
        ({"megatron_config": {}}, "has a megatron_config, with which peft imports whatever it names"),
    ],
    ids=str,
)
def test_an_adapter_with_values_that_none_has_is_refused(
    adapter: Path, tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert expected in refusal(load, adapter, tmp_path)
    assert str(adapter) in refusal(merge, adapter, tmp_path)


@pytest.mark.parametrize("act", [load, rewrite])
def test_settings_for_generation_that_are_none_are_refused(
    copy: Callable[[str], Path], tmp_path: Path, act: Act
) -> None:
    folder = copy("qwen2" if act is rewrite else "qwen2-packed")
    (folder / "generation_config.json").write_text('{"max_new_tokens": "x", "eos_token_id": []}')
    assert refusal(act, folder, tmp_path).startswith(f"{folder}/generation_config.json: cannot be read: ")


# --- tensors


def change(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """Put ``tensors`` in place of a folder's own; None takes one away."""
    file = folder / "model.safetensors"
    found = {name: one for name, one in (load_file(file) | tensors).items() if one is not None}
    save_file(found, file, metadata={"format": "pt"})


CASES = [(rewrite, kind) for kind in TARGET] + [
    (load, f"{kind}-{how}") for kind in TARGET for how in ("master", "packed")
]


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("act", "name"), CASES)
@pytest.mark.parametrize("how", ["missing", "renamed", "rows", "columns", "integers"])
def test_every_tensor_of_a_wrong_name_shape_or_kind_is_named(
    folders: dict[str, Path], copy: Callable[[str], Path], tmp_path: Path, act: Act, name: str, how: str
) -> None:
    folder = copy(name)
    file, good = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    first = {key: one for key, one in all_tensors(folders[name]).items() if ".1." not in key}
    for key, tensor in first.items():
        bad = {
            "missing": {key: None},
            "renamed": {key: None, f"{key}_x": tensor},
            "rows": {key: torch.cat([tensor, tensor[:1]])},
            "columns": {key: tensor[..., :-1].contiguous()},
            "integers": {key: torch.zeros(tensor.shape, dtype=torch.int8)},
        }[how]
        change(folder, bad)  # type: ignore[arg-type]
        message = refusal(act, folder, tmp_path)
        assert key in message, message
        assert len(message) < 500
        file.write_bytes(good)
    act(folder, tmp_path / "out")


def test_the_messages_in_full(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("bert")
    file = folder / "model.safetensors"
    good = file.read_bytes()
    for bad, expected in (
        (
            {"bert.pooler.dense.bias": None, "classifier.bias": None},
            "the checkpoint has no tensor bert.pooler.dense.bias, nor 1 more of BertForSequenceClassification",
        ),
        (
            {"classifier.weight": None, "classifier.wait": torch.ones(2, 32)},
            "the checkpoint has no tensor classifier.weight; classifier.wait is there, which the model has no place "
            "for",
        ),
        (
            {"bert.embeddings.word_embeddings.weight": torch.ones(63, 32)},
            f"{file}: bert.embeddings.word_embeddings.weight has shape [63, 32], config.json says [64, 32]",
        ),
        (
            {"classifier.bias": torch.ones(2, dtype=torch.int32)},
            f"{file}: classifier.bias is I32; expected floating point",
        ),
        (
            {"classifier.bias": torch.ones(2, dtype=torch.bool)},
            f"{file}: classifier.bias is BOOL; expected floating point",
        ),
    ):
        change(folder, bad)  # type: ignore[arg-type]
        assert refusal(rewrite, folder, tmp_path) == expected
        file.write_bytes(good)


def test_codes_are_bytes(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen2-packed")
    key = "model.layers.0.mlp.up_proj.weight"
    change(folder, {key: all_tensors(folder)[key].float()})
    expected = f"{key} is F32; the packed layer takes U8 (in {folder}/model.safetensors)"
    assert refusal(load, folder, tmp_path) == expected


def test_a_record_of_another_model_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen2-master")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model.layers.0.mlp.up_proj"', '"model.layers.0.mlp.up"'))
    assert refusal(load, folder, tmp_path) == (
        "Qwen2ForCausalLM has model.layers.0.mlp.gate_proj but no model.layers.0.mlp.up, which config.json wraps"
    )


def test_a_folder_in_full_precision_is_left_to_whoever_asked(folders: dict[str, Path]) -> None:
    check_checkpoint(folders["qwen2"])
    with pytest.raises(NothingWrappedError, match=r"no module is wrapped; its config\.json has no quantization_config"):
        qsurgeon.load(folders["qwen2"])


def test_a_tensor_that_is_tied_need_not_be_there_and_may_be(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("tied-master")
    assert "lm_head.weight" not in all_tensors(folder)
    embedding = all_tensors(folder)["model.embed_tokens.weight"].clone()
    for _ in range(2):
        model = qsurgeon.load(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embedding.to(model.lm_head.weight.dtype))
        change(folder, {"lm_head.weight": embedding})
    change(folder, {"model.embed_tokens.weight": None})
    assert torch.equal(qsurgeon.load(folder).model.embed_tokens.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["old.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_a_tensor_that_the_model_has_no_place_for_is_no_mistake(
    copy: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = copy("qwen2")
    change(folder, {name: torch.ones(3)})
    rewrite(folder, tmp_path / "out")
    loaded = qsurgeon.load(tmp_path / "out")
    assert qsurgeon.inspect(loaded).wrapped > 0
    assert (
        loaded.state_dict().keys()
        == all_tensors(tmp_path / "out").keys() - {name} | loaded.all_tied_weights_keys.keys()
    )


def test_a_folder_inside_of_a_folder_is_looked_at(copy: Callable[[str], Path], tmp_path: Path) -> None:
    copy("qwen2-master").rename(tmp_path / "part")
    os.mkfifo(tmp_path / "part" / "tokenizer.json")
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load(tmp_path, subfolder="part")
    assert str(caught.value) == f"{tmp_path}/part/tokenizer.json: is a pipe; expected a file"
