"""An adapter folded into its wrapped base: what is written, what is reported, what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qsurgeon
from qsurgeon.errors import CheckpointError, NothingWrappedError
from qsurgeon.formats import get_format
from qsurgeon.formats.quality import sqnr
from qsurgeon.layers import quant_layers
from qsurgeon.merging import merge, total
from qsurgeon.report.merging import merge_text

# peft's own: that it saves embeddings along, and that a lora_B.bias has one dimension.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape:peft.utils.warning.PeftWarning",
)

TOKENS = torch.arange(1, 13).reshape(2, 6)
UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.{}.self_attn.q_proj"

Maker = Callable[..., Any]


@pytest.fixture(scope="session")
def plain(make_qwen2: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in full precision, in two files, with something beside the weights."""
    folder = tmp_path_factory.mktemp("merge") / "plain"
    make_qwen2(num_hidden_layers=2, tie_word_embeddings=False).save_pretrained(folder, max_shard_size="150kB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def base(plain: Path) -> Path:
    qsurgeon.rewrite("w4a4-mxfp4", plain, plain.parent / "base")
    return plain.parent / "base"


def adapter_of(base: Path, folder: Path, config: Any = None, **fields: Any) -> Any:
    """Save an adapter of ``base`` that does something, and return it on its base."""
    config = config or peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **fields})
    model = peft.get_peft_model(qsurgeon.load(base, dtype="auto"), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "adapter"
    adapter_of(base, folder)
    return folder


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    """Return a copy of an adapter's folder with other fields in its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | changes))
    return to


def fails(adapter: Path, out: Path, model: Any = None, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        merge(adapter, out, model)
    assert not out.exists()
    assert not list(out.parent.glob("*.partial"))
    return str(caught.value)


# --- what is written


def test_the_merged_model_is_what_merging_by_hand_and_rounding_anew_gives(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    qsurgeon.merge(adapter, tmp_path / "out")
    by_hand = qsurgeon.load(base)
    peft.PeftModel.from_pretrained(by_hand, adapter).merge_and_unload()
    merged = qsurgeon.load(tmp_path / "out")
    assert len(quant_layers(merged)) == 14
    assert torch.equal(merged(TOKENS).logits, by_hand(TOKENS).logits)
    assert not torch.equal(merged(TOKENS).logits, qsurgeon.load(base)(TOKENS).logits)


def test_what_the_adapter_does_not_touch_is_copied_to_the_bit(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qsurgeon.merge(adapter, out)
    same = {"config.json", "tokenizer.json", "recipe.yaml", "README.md", "qsurgeon-plan.json"}
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in same)
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(shards) > 1
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()} | {"qsurgeon-merge.json"}
    changed = set()
    for name in shards:
        before, after = load_file(base / name), load_file(out / name)
        assert before.keys() == after.keys()
        changed |= {key for key in before if not torch.equal(before[key], after[key])}
        with safe_open(out / name, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert changed == {
        f"model.layers.{layer}.{one}.weight" for layer in range(2) for one in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_the_sum_is_made_in_float32_and_kept_in_the_dtype_of_the_base(make_qwen2: Maker, tmp_path: Path) -> None:
    make_qwen2(tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path / "plain")
    qsurgeon.rewrite("w4a4-mxfp4", tmp_path / "plain", tmp_path / "base")
    model = adapter_of(tmp_path / "base", tmp_path / "adapter")
    qsurgeon.merge(tmp_path / "adapter", tmp_path / "out")
    layer = model.base_model.model.get_submodule(UP)
    expected = (layer.weight.float() + layer.get_delta_weight("default")).to(torch.bfloat16)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[f"{UP}.weight"], expected)


@pytest.mark.parametrize("recipe", ["w4a4-mxfp4-hadamard", "w4a4-nvfp4-square", "w8a8-int8", "w8a8-fp8", "w4a16-nvfp4"])
def test_a_base_in_any_format_is_merged(plain: Path, tmp_path: Path, recipe: str) -> None:
    base = tmp_path / "base"
    qsurgeon.rewrite(recipe, plain, base)
    adapter_of(base, tmp_path / "adapter")
    done = qsurgeon.merge(tmp_path / "adapter", tmp_path / "out")
    by_hand = peft.PeftModel.from_pretrained(qsurgeon.load(base), tmp_path / "adapter").merge_and_unload()
    merged = qsurgeon.load(tmp_path / "out")
    assert merged.config.quantization_config.to_dict() == qsurgeon.load(base).config.quantization_config.to_dict()
    assert torch.equal(merged(TOKENS).logits, by_hand(TOKENS).logits)
    assert 0 < total(done.changes).changed < total(done.changes).codes
    assert total(done.changes).sqnr > 10


def test_a_weight_that_is_not_rounded_has_no_codes(plain: Path, tmp_path: Path) -> None:
    rules = {"version": 1, "rules": [{"target": ["layers"], "input": "mxfp8"}]}
    qsurgeon.rewrite(qsurgeon.Recipe.model_validate(rules), plain, tmp_path / "base")
    adapter_of(tmp_path / "base", tmp_path / "adapter")
    done = qsurgeon.merge(tmp_path / "adapter", tmp_path / "out")
    assert {(one.weight, one.share) for one in done.changes} == {("-", None)}
    assert len(quant_layers(qsurgeon.load(tmp_path / "out"))) == 14


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"use_rslora": True, "rank_pattern": {"up_proj": 2}},
    ],
    ids=str,
)
def test_the_other_things_that_a_lora_adapter_can_carry_are_merged_too(
    base: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    adapter_of(base, tmp_path / "adapter", **fields)
    done = qsurgeon.merge(tmp_path / "adapter", tmp_path / "out")
    by_hand = peft.PeftModel.from_pretrained(qsurgeon.load(base), tmp_path / "adapter").merge_and_unload()
    got, expected = qsurgeon.load(tmp_path / "out").state_dict(), by_hand.state_dict()
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    whole = {"modules_to_save", "trainable_token_indices"} & fields.keys()
    assert bool(done.replaced) == bool(whole)


def test_a_base_that_the_adapter_does_not_name_can_be_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    lost = copied(adapter, tmp_path / "lost", base_model_name_or_path="nowhere/base")
    assert fails(lost, tmp_path / "out") == (
        f"nowhere/base: the base that {lost} names is no folder here; say where it is: --model FOLDER"
    )
    assert merge(lost, tmp_path / "out", base).base == str(base)


def test_an_adapter_of_zeros_changes_nothing(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    peft.get_peft_model(qsurgeon.load(base), config).save_pretrained(str(tmp_path / "adapter"))
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert [(one.relative, one.share, one.sqnr) for one in done.changes] == [(0, 0, math.inf)] * 2
    assert done.to_dict()["total"] == {"relative": 0, "codes": 8192, "changed": 0, "share": 0, "sqnr": None}
    for file in base.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_progress_counts_every_byte_of_weights(base: Path, adapter: Path, tmp_path: Path, heard: Any) -> None:
    merge(adapter, tmp_path / "out", events=heard)
    assert heard.bytes == sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert [one.written for one in heard.estimates] == [heard.bytes]


# --- what is reported


def test_the_report_is_what_the_formats_say(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = merge(adapter, tmp_path / "out")
    model: Any = peft.PeftModel.from_pretrained(qsurgeon.load(base), adapter).base_model.model
    layer = model.get_submodule(UP)
    weight, delta = layer.weight.detach(), layer.get_delta_weight("default").detach()
    mxfp4 = get_format("mxfp4").as_weight
    (change,) = [one for one in done.changes if one.module == UP]
    assert change.shape == (128, 64)
    assert change.weight == "mxfp4"
    assert change.relative == pytest.approx(float(delta.norm() / weight.norm()))
    differ = mxfp4.quantize(weight).codes != mxfp4.quantize(weight + delta).codes
    assert change.changed == int(differ.sum()) > 0
    assert change.share == pytest.approx(float(differ.float().mean()))
    trained = mxfp4.fake_quantize(weight) + delta
    assert change.sqnr == pytest.approx(sqnr(trained, mxfp4.fake_quantize(weight + delta)))
    assert json.loads((tmp_path / "out" / "qsurgeon-merge.json").read_text()) == done.to_dict()


def test_modules_without_a_format_are_reported_and_not_in_the_total(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert [one.weight for one in done.changes] == ["mxfp4", "mxfp4", "-"]
    head = done.to_dict()["modules"][-1]
    assert (head["module"], head["codes"], head["share"], head["sqnr"]) == ("lm_head", 0, None, None)
    assert done.to_dict()["total"]["codes"] == 2 * 64 * 64
    lines = merge_text(done).splitlines()
    assert lines[-2].startswith("3 modules are merged, 2 of them rounded again: ΔW/W ")


def test_an_adapter_of_modules_without_a_format_has_no_total(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "adapter", target_modules=["lm_head"])
    done = merge(tmp_path / "adapter", tmp_path / "out")
    assert done.to_dict()["total"] is None
    assert merge_text(done).splitlines()[-2] == "1 modules are merged, 0 of them rounded again"


# --- what is refused


def test_a_folder_that_is_no_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    assert fails(base, tmp_path / "out") == f"{base}: is not the folder of an adapter; it has no adapter_config.json"


def test_an_adapter_that_is_not_lora_is_refused(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "ia3", peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert fails(tmp_path / "ia3", tmp_path / "out") == (
        f"{tmp_path / 'ia3'}: is an adapter of kind IA3; only LORA can be merged"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, "has bias='all', which cannot be merged; expected 'none'"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication=[[0, 2]], which cannot be merged; expected None"),
        ({"base_model_name_or_path": None}, "names no base; say which: --model FOLDER"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_merged_is_refused(
    adapter: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    odd = copied(adapter, tmp_path / "odd", **fields)
    assert fails(odd, tmp_path / "out") == f"{odd}: {message}"


def test_an_adapter_without_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    odd = copied(adapter, tmp_path / "odd")
    (odd / "adapter_model.safetensors").write_bytes(b"short")
    assert fails(odd, tmp_path / "out").startswith(
        f"{odd / 'adapter_model.safetensors'}: is not a whole safetensors file: "
    )
    (odd / "adapter_model.safetensors").unlink()
    assert fails(odd, tmp_path / "out") == f"{odd}: has no adapter_model.safetensors"


def test_a_base_that_is_not_wrapped_is_refused(plain: Path, adapter: Path, tmp_path: Path) -> None:
    message = fails(adapter, tmp_path / "out", plain, NothingWrappedError)
    assert message.startswith(f"{plain}: no module is wrapped; its config.json has no quantization_config of qsurgeon.")


def test_a_base_that_is_no_folder_or_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    assert fails(adapter, tmp_path / "out", "nowhere") == "nowhere: no such folder; say where it is: --model FOLDER"
    assert fails(adapter, tmp_path / "out", adapter) == (
        f"{adapter}: is an adapter itself; expected the folder that qsurgeon apply wrote"
    )


def other(make_qwen2: Maker, to: Path, **fields: Any) -> Path:
    make_qwen2(**{"num_hidden_layers": 2, "tie_word_embeddings": False, **fields}).save_pretrained(to / "other-plain")
    qsurgeon.rewrite("w4a4-mxfp4", to / "other-plain", to / "other")
    return to / "other"


def test_an_adapter_of_another_base_is_refused(make_qwen2: Maker, adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    for fields, message in (
        ({"num_hidden_layers": 3}, f"it has no tensor {name.format(2, 'A').replace('mlp.up', 'self_attn.q')}"),
        ({"num_hidden_layers": 1}, f"the model has no place for {name.format(1, 'A')}"),
        ({"intermediate_size": 96}, f"{name.format(0, 'B')} has shape [128, 4], the model takes [96, 4]"),
    ):
        folder = tmp_path / str(next(iter(fields.values())))
        model = other(make_qwen2, folder, **fields)
        assert fails(adapter, tmp_path / "out", model) == f"{adapter} does not fit {model}: {message}"


def test_an_adapter_of_modules_that_the_base_does_not_have_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    odd = copied(adapter, tmp_path / "odd", target_modules=["nothing"])
    message = fails(odd, tmp_path / "out")
    assert message.startswith(f"{odd} does not fit {base}: Target modules {{'nothing'}} not found in the base model.")


@pytest.mark.parametrize(
    ("fields", "name", "kind"),
    [
        ({"use_dora": True}, Q.format(0), "DoraLinear"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, Q.format(0), "ParamWrapper"),
    ],
    ids=str,
)
def test_an_adapter_that_is_not_a_sum_is_refused(
    base: Path, tmp_path: Path, fields: dict[str, Any], name: str, kind: str
) -> None:
    adapter_of(base, tmp_path / "adapter", **fields)
    assert fails(tmp_path / "adapter", tmp_path / "out") == (
        f"{name}: its adapter is a {kind}; only plain LoRA of a Linear or Embedding is merged"
    )


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")  # peft's own, of the same thing
@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [1]}], ids=str)
def test_an_adapter_of_a_tied_module_is_refused(make_qwen2: Maker, tmp_path: Path, fields: dict[str, Any]) -> None:
    model = other(make_qwen2, tmp_path, tie_word_embeddings=True)
    adapter_of(model, tmp_path / "adapter", **fields)
    which = "lm_head" if "target_modules" in fields else "model.embed_tokens"
    assert fails(tmp_path / "adapter", tmp_path / "out") == (
        f"lm_head is tied to model.embed_tokens: merging an adapter of {which} would change both. "
        "Untie them in the recipe (untie: true), or train without it"
    )


def test_an_adapter_that_is_not_finite_is_refused(adapter: Path, tmp_path: Path) -> None:
    odd = copied(adapter, tmp_path / "odd")
    tensors = load_file(odd / "adapter_model.safetensors")
    tensors[f"base_model.model.{UP}.lora_B.weight"][0, 0] = math.nan
    save_file(tensors, odd / "adapter_model.safetensors")
    assert fails(odd, tmp_path / "out") == f"{UP}: W + ΔW is not finite everywhere in torch.float32"


def test_a_base_stored_in_other_dtypes_or_by_other_names_is_refused(
    make_qwen2: Maker, adapter: Path, tmp_path: Path
) -> None:
    model = other(make_qwen2, tmp_path)
    file = model / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {f"{UP}.weight": whole[f"{UP}.weight"].double()}, file, metadata={"format": "pt"})
    assert fails(adapter, tmp_path / "out", model) == (
        f"{file}: {UP}.weight is F64 [128, 64], merged it is torch.float32 [128, 64]"
    )
    renamed = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    assert fails(adapter, tmp_path / "out", model) == (
        f"no file of {model} has a tensor {Q.format(0)}.weight: its tensors go by other names than its modules"
    )


def test_a_folder_in_the_way_or_inside_a_source_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for final, message in (
        (tmp_path, f"{tmp_path} exists; name another folder, or remove it first"),
        (base / "out", f"{base}/out is inside the source {base}; write somewhere else"),
        (adapter / "out", f"{adapter}/out is inside the source {adapter}; write somewhere else"),
        (adapter, f"{adapter} is the source itself; write somewhere else"),
    ):
        with pytest.raises(CheckpointError) as caught:
            merge(adapter, final)
        assert str(caught.value) == message
    assert not (base / "out").exists()
