"""Folders with something changed at random: an error of ours, or a model with the values that its files have.

``QSURGEON_FUZZ=10000`` tries as many changes as it says, in place of the few that fit a suite.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qsurgeon
from qsurgeon.errors import QSurgeonError
from qsurgeon.layers import quant_layers
from qsurgeon.recipe import Recipe

ROUNDS = int(os.environ.get("QSURGEON_FUZZ", "300")) // 6
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 10**9, 10**30, -(10**12), 0.5, -0.0, 1e300, float("nan"), float("inf"),
    "", "x", "auto", "bfloat16", "float8_e4m3fn", "int8", "\x1b[2J\n", "model", "lm_head", "../x", [], {}, [None],
    [1, "x"], {"x": 1}, [[]], {"rope_type": "x"}, {"quant_method": "qsurgeon"}, {"quant_method": "gptq"}, "9" * 5000,
]  # fmt: skip
KEYS = [
    "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings", "architectures", "model_type", "auto_map",
    "quantization_config", "text_config", "rope_parameters", "layer_types", "id2label", "label2id", "num_labels",
    "attn_implementation", "use_cache", "head_dim", "hidden_act", "transformers_version", "_name_or_path",
    "sliding_window", "vocab_size", "problem_type", "is_encoder_decoder", "pruned_heads", "tp_plan",
    "base_model_tp_plan", "storage",
]  # fmt: skip


def recipe(storage: str) -> Recipe:
    rules = [{"name": "mlp", "target": ["mlp"], "exclude": ["layers.0"], "weight": "nvfp4", "input": "mxfp4"}]
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": rules})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(root / "plain", max_shard_size="40KB")
    for storage in ("master", "packed"):
        qsurgeon.rewrite(recipe(storage), root / "plain", root / storage)
    model = peft.get_peft_model(
        qsurgeon.load(root / "master"),
        peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].base_model_name_or_path = str(root / "master")
    model.save_pretrained(str(root / "adapter"))
    return {path.name: path for path in root.iterdir()}


# --- changes


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in parsed JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [one for key, value in items for one in ((*path, key), *places(value, (*path, key)))]


def change_json(data: Any, dice: random.Random) -> None:
    """Replace, remove, rename, add or move one value."""
    path = dice.choice([one for one in places(data) if len(one) < 3 or dice.random() < 0.3] or places(data))
    at = data
    for step in path[:-1]:
        at = at[step]
    what = dice.choice(["replace", "replace", "replace", "remove", "add", "copy", "rename"])
    if what == "remove":
        del at[path[-1]]
    elif what == "add" and isinstance(data, dict):
        data[dice.choice(KEYS)] = dice.choice(VALUES)
    elif what == "copy":
        other = data
        for step in dice.choice(places(data)):
            other = other[step]
        at[path[-1]] = json.loads(json.dumps(other))
    elif what == "rename" and isinstance(at, dict):
        at[f"{path[-1]}x"] = at.pop(path[-1])
    else:
        at[path[-1]] = dice.choice(VALUES)


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5])):
        at = dice.randrange(len(made) + 1)
        what = dice.choice(["bit", "cut", "put", "end"])
        if what == "bit" and at < len(made):
            made[at] ^= 1 << dice.randrange(8)
        elif what == "cut":
            del made[at : at + dice.randrange(1, 9)]
        elif what == "put":
            made[at:at] = dice.randbytes(dice.randrange(1, 9))
        elif what == "end" and dice.random() < 0.3:
            del made[at:]
    return bytes(made)


def change_header(file: Path, dice: random.Random) -> None:
    """Change what a safetensors file says of its tensors, so that it still is one, or not."""
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    try:
        header = json.loads(data[8:end])
    except ValueError:  # what was changed before
        header = {}
    if dice.random() < 0.3 or len(header) < 3:
        file.write_bytes(change_bytes(data[:end], dice) + data[end:])
        return
    if dice.random() < 0.5:  # another name, shape or kind of the same size
        name = dice.choice([one for one in header if one != "__metadata__"])
        entry = header.pop(name)
        how = dice.choice(["name", "flat", "kind", "swap"])
        if how == "flat":
            entry["shape"] = [*reversed(entry["shape"])]
        elif how == "kind":
            entry["dtype"] = {"F32": "I32", "U8": "I8", "BF16": "F16"}.get(entry["dtype"], "U8")
        other = dice.choice([one for one in header if one != "__metadata__"])
        if how == "swap":
            header[name] = header.pop(other)
        header[f"{name}x" if how == "name" else other if how == "swap" else name] = entry
    else:
        change_json(header, dice)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def change(folder: Path, dice: random.Random) -> str:
    """Change one of a folder's files, or two; return which."""
    names = []
    for _ in range(dice.choice([1, 1, 1, 2])):
        file = dice.choice([one for one in sorted(folder.iterdir()) if one.suffix in {".json", ".safetensors"}])
        if dice.random() < 0.5:
            file = next((one for one in folder.iterdir() if one.name in {"config.json", "adapter_config.json"}), file)
        names.append(file.name)
        if file.suffix == ".json" and dice.random() < 0.85:
            try:
                data = json.loads(file.read_text())
                change_json(data, dice)
            except (ValueError, IndexError, TypeError, AttributeError):  # what was changed before
                continue
            file.write_text(json.dumps(data))
        elif file.suffix == ".json":
            file.write_bytes(change_bytes(file.read_bytes(), dice))
        elif file.stat().st_size > 8:
            change_header(file, dice)
    return ", ".join(names)


# --- what is tried


def opened(folder: Path, _out: Path) -> None:
    """Load, and see that every value is what the files have: no parameter is random."""
    model = qsurgeon.load(folder)
    assert quant_layers(model)
    tensors: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, tensor in state.items():
        found = tensors.get(name)
        if found is None:  # an alias, or tied
            assert any(
                one.shape == tensor.shape and torch.equal(one.to(tensor.dtype), tensor) for one in tensors.values()
            )
        else:
            assert torch.equal(found.to(tensor.dtype), tensor) or not found.isfinite().all(), name


def inspected(folder: Path, _out: Path) -> None:
    report = qsurgeon.inspect(folder)
    assert str(report).replace("\n", "").isprintable()
    json.loads(report.to_json())


def planned(folder: Path, _out: Path) -> None:
    assert qsurgeon.plan(recipe("master"), folder).wrapped


def rewritten(folder: Path, out: Path) -> None:
    qsurgeon.rewrite(recipe("packed"), folder, out)
    opened(out, out)


def merged(folder: Path, out: Path) -> None:
    qsurgeon.merge(folder, out)
    opened(out, out)


def tried(act: Callable[[Path, Path], None], folder: Path, out: Path) -> str:
    """Return what became of it. Another error than ours passes through."""
    try:
        act(folder, out)
    except QSurgeonError:
        assert not out.exists()
        return "refused"
    return "done"


ACTS: list[tuple[str, Callable[[Path, Path], None]]] = [
    ("master", opened), ("packed", opened), ("packed", inspected), ("plain", planned), ("plain", rewritten),
    ("adapter", merged),
]  # fmt: skip


@pytest.mark.parametrize(("name", "act"), ACTS, ids=lambda one: getattr(one, "__name__", one))
@pytest.mark.filterwarnings("ignore")
def test_a_folder_with_something_changed_is_refused_in_our_words_or_is_what_its_files_say(
    folders: dict[str, Path], tmp_path: Path, name: str, act: Callable[[Path, Path], None]
) -> None:
    dice = random.Random(f"{name} {act.__name__}")
    seen = {"refused": 0, "done": 0}
    for place in range(ROUNDS):
        folder, out = Path(shutil.copytree(folders[name], tmp_path / "in")), tmp_path / "out"
        what = change(folder, dice)
        try:
            seen[tried(act, folder, out)] += 1
        except BaseException as error:
            kept = Path(os.environ.get("QSURGEON_FUZZ_KEEP", tmp_path)) / f"{name}-{act.__name__}-{place}"
            shutil.copytree(folder, kept)
            error.add_note(f"round {place}, {what} changed: {kept}")
            raise
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
    assert min(seen.values()) > 0
