"""Packed weights from end to end: a recipe, a folder, transformers' own load and save."""

import functools
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qsurgeon
from qsurgeon import adapting
from qsurgeon.errors import CheckpointError, PlanError, ShapeError, SurgeryError
from qsurgeon.formats import get_format
from qsurgeon.formats.quality import sqnr
from qsurgeon.formats.stored import stored_bytes
from qsurgeon.layers import PackedLinear, QuantLinear, pack, packed_linears, quant_linears
from qsurgeon.quantizer import QSurgeonConfig
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.report.inspection import report_of

TOKENS = torch.arange(1, 13).reshape(2, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
# What a GPU's memory would not hold; on this CPU the first layer is on the disk.
SPLIT = {
    "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip

Maker = Callable[..., Any]


def recipe(storage: str = "packed", **fields: Any) -> Recipe:
    rules = [{"target": ["layers"], "exclude": ["layers.0.mlp?"], "weight": "nvfp4", "input": "mxfp4"}]
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": rules, **fields})


@pytest.fixture(scope="module")
def small_model(make_qwen2: Maker) -> Maker:
    """Return a maker of Qwen2 models of two layers, whose output head is its own unless told otherwise."""
    return lambda **fields: make_qwen2(**{"num_hidden_layers": 2, "tie_word_embeddings": False, **fields})


@pytest.fixture(scope="module")
def plain(small_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "plain"
    small_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(small_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "packed"
    qsurgeon.apply(recipe(), small_model()).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def different(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the names whose tensors are not the same to the bit."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return [key for key in first if first[key].dtype != second[key].dtype or not torch.equal(first[key], second[key])]


# --- in memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_model_computes_what_its_master_does_to_the_bit(plain: Path, dtype: torch.dtype) -> None:
    load = functools.partial(hf.AutoModelForCausalLM.from_pretrained, plain, dtype=dtype)
    master, packed = qsurgeon.apply(recipe("master"), load()), qsurgeon.apply(recipe(), load())
    assert len(packed_linears(packed)) == len(quant_linears(master)) == 11
    assert type(packed.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(packed), logits(master))
    outputs = [one(input_ids=TOKENS, labels=TOKENS) for one in (packed, master)]
    for output in outputs:
        output.loss.backward()
    grads = [{name: p.grad for name, p in one.named_parameters() if p.grad is not None} for one in (packed, master)]
    assert sorted(set(grads[1]) - set(grads[0])) == sorted(f"{name}.weight" for name in quant_linears(master))
    assert [name for name, grad in grads[0].items() if not torch.equal(grad, grads[1][name])] == []


def test_modules_and_biases_stay_the_objects_that_they_were(small_model: Maker) -> None:
    model = small_model()
    before = dict(model.named_modules())
    bias = model.get_submodule(Q).bias
    qsurgeon.apply(recipe(), model)
    assert all(module is before[name] for name, module in model.named_modules())
    assert model.get_submodule(Q).bias is bias
    assert bias.requires_grad


def test_a_rule_for_inputs_alone_keeps_its_weights(small_model: Maker) -> None:
    rules = [
        {"target": ["mlp"], "input": "mxfp4", "phases": "training"},
        {"target": ["self_attn"], "weight": "mxfp4"},
    ]
    model = qsurgeon.apply(recipe(rules=rules), small_model())
    kinds = {name.split(".")[3]: type(layer) for name, layer in quant_linears(model).items()}
    assert kinds == {"mlp": QuantLinear, "self_attn": PackedLinear}
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad


def test_no_second_copy_of_the_weights_is_alive_while_they_are_packed(
    small_model: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wrap = small_model(), PackedLinear.wrap.__func__  # type: ignore[attr-defined]
    weights = {name: weakref.ref(model.get_parameter(f"{name}.weight")) for name in (Q, DOWN)}
    alive: list[list[str]] = []

    def wrapped(cls: Any, linear: nn.Module, how: Any) -> None:
        wrap(cls, linear, how)
        alive.append([name for name, weight in weights.items() if weight() is not None])

    monkeypatch.setattr(PackedLinear, "wrap", classmethod(wrapped))
    qsurgeon.apply(recipe(), model)
    assert alive[0] == [DOWN]
    assert alive[-1] == []


@pytest.mark.parametrize("phases", ["training", "rollout"])
def test_a_packed_weight_that_some_phase_wants_unrounded_is_refused_at_its_line(
    plain: Path, tmp_path: Path, phases: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\nstorage: packed\nrules:\n"
        f"  - {{target: [self_attn], input: mxfp4, phases: {phases}}}\n"
        f"  - {{target: [mlp], weight: mxfp4, phases: {phases}}}\n"
    )
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(load_recipe(file), plain)
    assert str(caught.value).splitlines()[0] == (
        f"{file}:5:44: rule 'rule 2' rounds in {phases} only: a packed weight is rounded in every phase; say "
        "'storage: master', or leave the weight out of the rule"
    )
    assert len(caught.value.mistakes) == 1


def test_a_packed_weight_cannot_wait_for_its_static_scale(plain: Path) -> None:
    formats = {"late": {"like": "nvfp4", "tensor_scale": "static"}}
    rules = [{"target": ["mlp"], "weight": "late", "input": "late"}]
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(recipe(formats=formats, rules=rules), plain)
    assert str(caught.value) == (
        "rules[0].weight: format 'late' of rule 'rule 1' has a static tensor scale without a number: a weight is "
        "packed before any calibration; give it a static_scale, or say 'tensor_scale: tensor'"
    )


def test_full_precision_cannot_be_asked_for(small_model: Maker) -> None:
    model = qsurgeon.apply(recipe(), small_model())
    with pytest.raises(SurgeryError, match="11 weights of Qwen2ForCausalLM are packed"), qsurgeon.disabled(model):
        pass


def test_packed_weights_of_a_qwen2_5_1_5b_take_less_than_0_30_of_its_bfloat16() -> None:
    shapes = [(1536, 1536)] * 2 + [(256, 1536)] * 2 + [(8960, 1536)] * 2 + [(1536, 8960)]
    wrapped = 28 * sum(rows * columns for rows, columns in shapes)
    packed = 28 * sum(stored_bytes(get_format("nvfp4").as_weight, rows, columns) for rows, columns in shapes)
    assert packed / (2 * wrapped) == pytest.approx(0.28125, abs=1e-5)
    rest = 151936 * 1536 + 28 * (2 * 1536 + 1536 + 2 * 256) + 1536  # embeddings (tied), norms, biases
    assert (packed + 2 * rest) / (2 * (wrapped + rest)) == pytest.approx(0.390, abs=1e-3)


# --- load


def test_it_reloads_to_the_bit(folder: Path, small_model: Maker) -> None:
    expected = qsurgeon.apply(recipe(), small_model())
    for model in (qsurgeon.load(folder), hf.AutoModelForCausalLM.from_pretrained(folder)):
        assert len(packed_linears(model)) == 11
        assert different(model, expected) == []
        assert torch.equal(logits(model), logits(expected))
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        assert frozen == {f"{name}.{key}" for name, layer in packed_linears(model).items() for key in layer.stored}


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", SPLIT], ids=["none", "cpu", "auto", "disk"])
@pytest.mark.parametrize("dtype", ["auto", None, *DTYPES], ids=str)
def test_it_loads_anywhere_and_in_any_dtype(
    plain: Path, folder: Path, tmp_path: Path, device_map: Any, dtype: Any
) -> None:
    asked = torch.float32 if dtype in ("auto", None) else dtype
    # The codes are of the float32 weight, whatever the rest is loaded as.
    expected = hf.AutoModelForCausalLM.from_pretrained(plain, dtype=asked)
    codes = load_file(folder / "model.safetensors")
    for name, layer in packed_linears(qsurgeon.apply(recipe(), expected)).items():
        for key, one in layer.stored.items():
            one.copy_(codes[f"{name}.{key}"])
    options = {"offload_folder": tmp_path} if isinstance(device_map, dict) else {}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=dtype, **options)
    assert {layer.compute_dtype for layer in packed_linears(model).values()} == {asked}
    assert torch.equal(logits(model), logits(expected))


def test_it_can_be_offloaded_to_a_cpu(folder: Path) -> None:
    model = qsurgeon.load(folder)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_submodule(Q).weight.is_meta
    assert torch.equal(logits(model), expected)


def test_its_base_model_loads_without_the_head(folder: Path) -> None:
    base = hf.AutoModel.from_pretrained(folder)
    assert len(packed_linears(base)) == 11
    whole = qsurgeon.load(folder)
    assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_a_base_model_s_folder_loads_under_a_new_head(small_model: Maker, tmp_path: Path) -> None:
    base = qsurgeon.apply(recipe(), small_model().model)
    base.save_pretrained(tmp_path)
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert len(packed_linears(model)) == 11
    assert type(model.score) is nn.Linear
    assert model.score.weight.dtype == torch.float32
    assert torch.equal(model.model(TOKENS).last_hidden_state, base(TOKENS).last_hidden_state)


def test_shards_reload_to_the_bit(folder: Path, tmp_path: Path) -> None:
    model = qsurgeon.load(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert different(qsurgeon.load(tmp_path), model) == []


def test_a_packed_head_is_untied_from_its_embedding(small_model: Maker, tmp_path: Path) -> None:
    rules = [{"target": ["lm_head"], "weight": "mxfp4"}]
    model = qsurgeon.apply(recipe(untie=True, rules=rules), small_model(tie_word_embeddings=True))
    assert model.model.embed_tokens.weight.dtype == torch.float32
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.uint8
    again = qsurgeon.load(tmp_path)
    assert not again.config.tie_word_embeddings
    assert different(again, model) == []
    assert torch.equal(logits(again), logits(model))


def change(folder: Path, name: str, make: Callable[[Tensor], Tensor | None]) -> None:
    """Put what ``make`` returns in place of a tensor, or nothing."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    made = make(tensors.pop(name))
    save_file(tensors if made is None else {**tensors, name: made}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("device_map", [None, SPLIT], ids=["none", "disk"])
@pytest.mark.parametrize("key", ["weight", "weight_scale", "weight_tensor_scale", "bias"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "the checkpoint has no tensor {}"),
        (lambda one: one[..., :-1].contiguous(), "{} has shape {}; the packed layer takes {}"),
        (
            lambda one: one.to(torch.uint8 if one.is_floating_point() else torch.float32),
            "{} is {}; the packed layer takes {}",
        ),
        (lambda one: one.to(torch.int8) if one.dtype == torch.uint8 else one.to(torch.int32), "{} is {}; the packed"),
    ],
    ids=["missing", "misshapen", "another dtype", "signed"],
)
def test_a_tensor_that_is_missing_or_of_another_kind_is_named(
    copy: Path, tmp_path: Path, key: str, make: Any, message: str, device_map: Any
) -> None:
    name = f"{Q}.{key}"
    change(copy, name, make)
    options = {"offload_folder": tmp_path / "offload"} if device_map else {}
    for load in (qsurgeon.load, hf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            load(copy, device_map=device_map, **options)
        assert str(caught.value).startswith(message.split("{}", maxsplit=1)[0] + name)
        assert all(part in str(caught.value) for part in message.split("{}"))


def test_a_record_that_a_packed_weight_cannot_follow_is_refused(copy: Path) -> None:
    file = copy / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["rules"][0]["phases"] = "rollout"
    file.write_text(json.dumps(config))
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.load(copy)
    assert str(caught.value) == (
        f"{copy}: {Q} cannot be wrapped: a packed weight is rounded in every phase, not in rollout only"
    )


def test_without_qsurgeon_a_packed_folder_does_not_load(folder: Path) -> None:
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()


# --- packed on the way


def config_of(model: Any) -> QSurgeonConfig:
    config: QSurgeonConfig = model.config.quantization_config
    return config


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plain_checkpoint_is_packed_while_it_loads(plain: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    load = functools.partial(hf.AutoModelForCausalLM.from_pretrained, plain, dtype=dtype)
    expected = qsurgeon.apply(recipe(), load())
    model = load(quantization_config=config_of(expected))
    assert different(model, expected) == []
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path)
    assert different(qsurgeon.load(tmp_path, dtype=dtype), expected) == []


def test_what_stays_on_a_disk_is_not_packed_on_the_way(plain: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf.AutoModelForCausalLM.from_pretrained(
            plain, device_map=SPLIT, offload_folder=tmp_path, quantization_config=config_of(qsurgeon.load(folder))
        )
    assert str(caught.value) == (
        "a weight that is offloaded to disk is not packed on the way: write a packed checkpoint first (qsurgeon "
        "apply), and load that"
    )


@pytest.mark.parametrize("make", [lambda _: None, lambda one: one[..., :-1].contiguous()], ids=["missing", "misshapen"])
def test_a_plain_checkpoint_that_does_not_fit_is_not_packed(
    plain: Path, folder: Path, tmp_path: Path, make: Any
) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    change(copy, f"{Q}.weight", make)
    with pytest.raises((CheckpointError, RuntimeError), match=r"q_proj|conver"):
        hf.AutoModelForCausalLM.from_pretrained(copy, quantization_config=config_of(qsurgeon.load(folder)))


# --- save


def test_a_state_dict_that_is_given_is_what_is_saved(folder: Path, tmp_path: Path) -> None:
    model = qsurgeon.load(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    for place, save in enumerate(
        (
            lambda path: model.save_pretrained(path, state_dict=state),
            lambda path: model.save_pretrained(path, True, state),
        )
    ):
        save(tmp_path / str(place))
        again = qsurgeon.load(tmp_path / str(place))
        assert different(again, model) == ["model.norm.weight"]
        assert torch.equal(again.state_dict()["model.norm.weight"], state["model.norm.weight"])
    model.save_pretrained(tmp_path / "own")
    assert different(qsurgeon.load(tmp_path / "own"), model) == []


# --- what it is said to be


def test_a_plan_says_what_packing_will_take_and_inspect_what_it_takes(
    plain: Path, folder: Path, small_model: Maker
) -> None:
    planned = qsurgeon.inspect(small_model())
    before = planned.bytes
    report = report_of(qsurgeon.plan(recipe(), plain))
    live, there = qsurgeon.inspect(qsurgeon.load(folder)), qsurgeon.inspect(folder)
    assert report.bytes == before
    assert report.bytes_after == live.bytes == there.bytes < before
    assert live.bytes == sum(one.nbytes for one in qsurgeon.load(folder).parameters())
    assert {one.storage for one in (report, live, there)} == {"packed"}
    line = f"\nsize: {before / 1e6:.1f} MB now, {live.bytes / 1e6:.1f} MB with packed weights\n"
    assert line in f"{report}\n"
    assert f"\nsize: {live.bytes / 1e6:.1f} MB\n" in f"{live}\n"
    for one, other, planned_row in zip(live.rows, there.rows, report.rows, strict=True):
        assert (one.module, one.shape, one.parameters, one.bits) == (
            planned_row.module, planned_row.shape, planned_row.parameters, planned_row.bits,
        )  # fmt: skip
        assert (one.bytes, one.linear) == (other.bytes, other.linear)
    row = next(row for row in live.rows if row.module == DOWN)
    assert (row.kind, row.shape, row.parameters) == ("PackedLinear", (64, 128), 64 * 128)
    assert row.bytes == stored_bytes(get_format("nvfp4").as_weight, 64, 128)


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_plan_counts_a_weight_that_is_untied(small_model: Maker, storage: str) -> None:
    rules = [{"target": ["lm_head"], "weight": "mxfp4"}]
    model = small_model(tie_word_embeddings=True)
    report = report_of(qsurgeon.plan(recipe(storage, untie=True, rules=rules), model))
    assert report.bytes == sum(one.nbytes for one in model.parameters())
    qsurgeon.apply(recipe(storage, untie=True, rules=rules), model)
    assert report.bytes_after == sum(one.nbytes for one in model.parameters()) > report.bytes


# --- adapters


ADAPTER = {"r": 4, "target_modules": "all-linear", "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def adapted(model: Any, autocast: bool = True, **fields: Any) -> Any:
    """Return ``model`` with a LoRA adapter, always the same, and not the zero that peft begins with."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{**ADAPTER, **fields})
    return moved(peft.get_peft_model(model, config, autocast_adapter_dtype=autocast))


def moved(model: Any) -> Any:
    """Return ``model``, what it trains moved away from where it began."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert [name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])] == []
    assert all(grad.abs().max() > 0 for grad in one[1].values())


@pytest.mark.parametrize("before", [True, False], ids=["adapter first", "surgery first"])
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32", "bf16"])
def test_lora_on_packed_is_lora_on_the_master_to_the_bit(small_model: Maker, before: bool, autocast: bool) -> None:
    def make(storage: str) -> Any:
        model = small_model().bfloat16()
        if before:
            return qsurgeon.apply(recipe(storage), adapted(model, autocast))
        return adapted(qsurgeon.apply(recipe(storage), model), autocast)

    packed, master = make("packed"), make("master")
    adapters = [one for name, one in packed.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 14
    assert {one.dtype for one in adapters} == {torch.float32 if autocast else torch.bfloat16}
    assert_equal_steps(step(packed), step(master))


def test_an_adapter_reloads_on_its_packed_base_to_the_bit(folder: Path, tmp_path: Path) -> None:
    model = adapted(qsurgeon.load(folder))
    model.save_pretrained(tmp_path)
    for again in (
        peft.PeftModel.from_pretrained(qsurgeon.load(folder), tmp_path),
        qsurgeon.load(tmp_path),
        hf.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert len(packed_linears(again)) == 11
        assert torch.equal(logits(again), logits(model))


def test_the_base_of_a_trained_adapter_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = adapted(qsurgeon.load(folder))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    step(model)
    optimizer.step()
    model.unload().save_pretrained(tmp_path)
    assert different(qsurgeon.load(tmp_path), qsurgeon.load(folder)) == []


@pytest.mark.parametrize("weight", ["mxfp4", "mxfp8", "int8"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_peft_does_not_merge_into_codes(small_model: Maker, weight: str, safe_merge: bool) -> None:
    rule = {"target": ["layers"], "weight": weight, "input": "mxfp8"}
    model = adapted(qsurgeon.apply(recipe(rules=[rule]), small_model()))
    before, says = logits(model), f"{Q}.base_layer is packed, and peft would add 'default' to its codes: save the "
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(SurgeryError, match=says):
            merge(safe_merge=safe_merge)
    assert torch.equal(logits(model), before)
    assert logits(model.unload()).isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_recomputing_changes_no_bit(folder: Path, reentrant: bool) -> None:
    expected = step(adapted(qsurgeon.load(folder)).train())
    model = adapted(qsurgeon.load(folder)).train()
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal_steps(step(model), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler and traces
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_packed_model_trains_its_adapter_without_a_break(folder: Path, backend: str) -> None:
    expected = step(adapted(qsurgeon.load(folder)))
    model = adapted(qsurgeon.load(folder))
    torch._dynamo.reset()
    found = step(torch.compile(model, backend=backend, fullgraph=True))
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in found[1].items()}
    assert grads.keys() == expected[1].keys()
    if backend == "aot_eager":
        assert_equal_steps((found[0], grads), expected)
    # inductor fuses sums: a value on the edge between two numbers of a format may move by one.
    assert (found[0] - expected[0]).norm() < 1e-2 * expected[0].norm()


REFUSED = {
    "dora": (peft.LoraConfig(use_dora=True), "DoRA) computes with"),
    "kasa": (peft.LoraConfig(kasa_config=peft.KasaConfig()), "KaSA) replaces"),
    "velora": (peft.LoraConfig(velora_config=peft.VeloraConfig(num_groups=8)), "VeLoRA) takes the dtype of"),
    "target_parameters": (
        peft.LoraConfig(target_parameters=["q_proj.weight"]),
        "LoRA's target_parameters) adds to",
    ),
    "hira": (peft.HiraConfig(r=4), "Linear of peft's hira) computes with"),
    "loha": (peft.LoHaConfig(r=4), "Linear of peft's loha) computes with"),
    "lokr": (peft.LoKrConfig(r=4), "Linear of peft's lokr) computes with"),
    "peanut": (peft.PeanutConfig(), "Linear of peft's peanut) computes with"),
    "unilora": (peft.UniLoraConfig(), "Linear of peft's unilora) takes the dtype of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_takes_codes_for_values_is_refused_by_surgery(small_model: Maker, name: str) -> None:
    config, how = REFUSED[name]
    config = deepcopy(config)
    config.target_modules = [] if name == "target_parameters" else ["q_proj"]
    model = peft.get_peft_model(small_model(), config)
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply(recipe(), model)
    assert str(caught.value) == f"{Q} cannot be wrapped: the adapter on it ({how} its weight, which is packed"
    assert quant_linears(model) == {}


@pytest.mark.parametrize("name", REFUSED)
def test_on_packed_weights_it_is_refused_and_changes_nothing(small_model: Maker, name: str) -> None:
    config = deepcopy(REFUSED[name][0])
    config.target_modules = [] if name == "target_parameters" else ["q_proj"]
    model = qsurgeon.apply(recipe(), small_model())
    before, modules = {key: one.clone() for key, one in model.state_dict().items()}, list(model.named_modules())
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(SurgeryError) as caught:
        peft.get_peft_model(model, config)
    method = {"dora": "DoRA", "kasa": "KaSA", "velora": "VeLoRA", "target_parameters": "LoRA with target_parameters"}
    assert str(caught.value) == (
        f"{Q} cannot have this adapter: {method.get(name, name)} computes with the weight of what it sits on, "
        "which is packed"
    )
    assert list(model.named_modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("name", ["kasa", "velora", "unilora"])
def test_put_on_packed_weights_it_is_wrong_in_silence_indeed_and_inspect_says_so(
    small_model: Maker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(storage: str) -> Any:
        config = deepcopy(REFUSED[name][0])
        config.target_modules = ["q_proj"]
        torch.manual_seed(2)
        return moved(peft.get_peft_model(qsurgeon.apply(recipe(storage), small_model()), config))

    for guard in ("_check", "refuse_adapters"):
        monkeypatch.setattr(adapting, guard, lambda *_: None)
    packed, master = make("packed"), make("master")
    (logits_, grads), (expected, expected_grads) = step(packed), step(master)
    wrong = [one for one in grads if not torch.equal(grads[one], expected_grads[one])]
    assert wrong or not torch.equal(logits_, expected)
    report = qsurgeon.inspect(packed)
    assert [row.module for row in report.rows if row.misread] == [Q, Q.replace("0", "1")]
    assert report.summary.endswith("; on 2 of them adapters take codes for values")
    assert qsurgeon.inspect(master).summary.endswith("input mxfp4")


def test_load_refuses_an_adapter_that_takes_codes_for_values(small_model: Maker, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    qsurgeon.apply(recipe("master"), small_model()).save_pretrained(base)
    peft.get_peft_model(qsurgeon.load(base), peft.HiraConfig(r=4, target_modules=["q_proj"])).save_pretrained(adapter)
    shutil.rmtree(base)
    qsurgeon.apply(recipe(), small_model()).save_pretrained(base)
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.load(adapter)
    assert str(caught.value) == (
        f"{adapter}: {Q} cannot have this adapter: hira computes with the weight of what it sits on, which is packed"
    )


# --- merged, calibrated, watched


OWN = {
    "turned": {"like": "nvfp4", "hadamard": 16, "seed": 3},
    "square": {"like": "nvfp4", "block": [16, 16]},
}


@pytest.mark.parametrize("weight", ["nvfp4", "mxfp4", "turned", "square"])
def test_an_adapter_is_merged_into_codes(small_model: Maker, tmp_path: Path, weight: str) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    rules = [{"target": ["layers"], "weight": weight, "input": "turned" if weight == "turned" else "mxfp4"}]
    qsurgeon.apply(recipe(formats=OWN, rules=rules), small_model()).save_pretrained(base, max_shard_size="40KB")
    model = adapted(qsurgeon.load(base), target_modules=["q_proj", "down_proj"])
    model.save_pretrained(adapter)
    done = qsurgeon.merge(adapter, out)
    merged, before = qsurgeon.load(out), packed_linears(qsurgeon.load(base))
    assert len(packed_linears(merged)) == 14
    assert [one.module for one in done.changes] == [
        f"model.layers.{layer}.{one}" for layer in range(2) for one in ("self_attn.q_proj", "mlp.down_proj")
    ]
    for change_ in done.changes:
        layer, old = packed_linears(merged)[change_.module], before[change_.module]
        delta = model.base_model.model.get_submodule(change_.module).get_delta_weight("default").detach()
        rotation = layer.quantization.rotation
        trained = old.opened() + (delta if rotation is None else rotation(delta))
        assert torch.equal(layer.opened(), layer.grid.fake_quantize(trained))
        changed = int((layer.codes() != old.codes()).sum())
        assert (change_.shape, change_.codes, change_.changed) == (tuple(delta.shape), delta.numel(), changed)
        assert changed > 0
        assert change_.sqnr == pytest.approx(sqnr(trained, layer.opened()), abs=1e-6)
        assert 5 < change_.sqnr < 60
    changed_names = {
        name
        for name, one in merged.state_dict().items()
        if not torch.equal(one, qsurgeon.load(base).state_dict()[name])
    }
    assert {name.rpartition(".")[0] for name in changed_names} == {one.module for one in done.changes}
    assert {file.name for file in out.iterdir()} >= {file.name for file in base.iterdir()}
    # What the adapter's model computed, but for what rounding the sum anew changes.
    far, near = logits(qsurgeon.load(base)) - logits(model.eval()), logits(merged) - logits(model.eval())
    assert near.norm() < far.norm()


def test_merging_opens_one_weight_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(qsurgeon.load(folder)).save_pretrained(tmp_path / "adapter")
    alive: list[int] = []
    opened: list[weakref.ref[Tensor]] = []
    open_ = PackedLinear.opened

    def counted(self: PackedLinear, dtype: Any = None) -> Tensor:
        alive.append(len({one.untyped_storage()._cdata for ref in opened if (one := ref()) is not None}))
        values = open_(self, dtype)
        opened.append(weakref.ref(values))
        return values

    monkeypatch.setattr(PackedLinear, "opened", counted)
    qsurgeon.merge(tmp_path / "adapter", tmp_path / "out")
    assert len(alive) == 2 * 11  # before and after
    assert max(alive) == 1  # the weight before, while the one after is opened


def test_static_scales_of_inputs_are_found_on_packed_weights(small_model: Maker, tmp_path: Path) -> None:
    formats = {
        "late": {"like": "nvfp4", "tensor_scale": "static"},
        "known": {"like": "nvfp4", "tensor_scale": "static", "static_scale": 0.001},
    }
    rules = [{"target": ["layers"], "weight": "known", "input": "late"}]
    model = qsurgeon.apply(recipe(formats=formats, rules=rules), small_model())
    before = {name: one.clone() for name, one in model.state_dict().items()}
    qsurgeon.calibrate(model, [{"input_ids": TOKENS}])
    scales = {name: one.quantization.static_scales for name, one in quant_linears(model).items()}
    assert all(one["weight"] == 0.001 and one["input"] > 0 for one in scales.values())
    assert len({one["input"] for one in scales.values()}) > 4
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, before[name])] == []
    model.save_pretrained(tmp_path)
    again = qsurgeon.load(tmp_path)
    assert {name: one.quantization.static_scales for name, one in quant_linears(again).items()} == scales
    assert torch.equal(logits(again), logits(model))

    found = _found_by_the_master(small_model, formats, scales)
    assert found == {name: one["input"] for name, one in scales.items()}


def _found_by_the_master(small_model: Maker, formats: dict[str, Any], scales: Any) -> dict[str, float]:
    """Return the inputs' scales that calibrating a master model finds whose weights are those that were packed."""
    rules = [{"target": ["layers"], "input": "late"}]
    model = qsurgeon.apply(recipe("master", formats=formats, rules=rules), small_model())
    known = get_format("nvfp4").with_fields("known", tensor_scale="static", static_scale=0.001)
    for layer in quant_linears(model).values():
        layer.weight.data = known.fake_quantize(layer.weight.detach())
    qsurgeon.calibrate(model, [{"input_ids": TOKENS}])
    return {name: one.quantization.static_scales["input"] for name, one in quant_linears(model).items()}


STORAGES = ("master", "packed")


@pytest.mark.parametrize("weight", ["nvfp4", "turned", "square"])
def test_watching_says_what_it_can_of_packed_weights(small_model: Maker, weight: str) -> None:
    rules = [{"target": ["layers"], "weight": weight, "input": "turned" if weight == "turned" else "mxfp4"}]
    numbers = {}
    for storage in STORAGES:
        model = adapted(qsurgeon.apply(recipe(storage, formats=OWN, rules=rules), small_model())).train()
        with qsurgeon.Watch(model, every=1) as watch:
            step(model)
            numbers[storage] = watch.step()
    assert numbers["packed"]["qsurgeon/called"] == numbers["packed"]["qsurgeon/active"] == 1
    assert numbers["packed"] == {key: one for key, one in numbers["master"].items() if "weight_sqnr" not in key}
    assert len(numbers["packed"]) == 2 + 7


def test_watching_sees_an_input_that_is_not_rounded(small_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(qsurgeon.apply(recipe(), small_model())).train()
    monkeypatch.setattr("qsurgeon.layers.product._input_grid", lambda how: None)
    with qsurgeon.Watch(model, every=1) as watch:
        step(model)
        assert watch.step()["qsurgeon/active"] < 0.2


def test_packing_on_the_way_holds_one_weight_at_a_time(
    plain: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def counted(weight: Tensor, how: Any) -> dict[str, Tensor]:
        alive.append(sum(one() is not None for one in read))
        read.append(weakref.ref(weight))
        return pack(weight, how)

    monkeypatch.setattr("qsurgeon.quantizer.pack", counted)
    config = config_of(qsurgeon.load(folder))
    model = hf.AutoModelForCausalLM.from_pretrained(plain, device_map="auto", quantization_config=config)
    assert different(model, qsurgeon.load(folder)) == []
    assert len(alive) == 11
    assert max(alive) == 0


def test_a_model_that_casts_its_input_to_its_weights_dtype_is_told() -> None:
    config = hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    tokens = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    rules = [{"target": ["block"], "weight": "mxfp4"}]
    model = qsurgeon.apply(recipe(rules=rules), hf.T5ForConditionalGeneration(config).eval())
    with pytest.raises(ShapeError, match=r"^a packed layer was called with torch\.uint8; expected floating point"):
        model(**tokens)
    rules[0]["exclude"] = ["wo"]
    model = qsurgeon.apply(recipe(rules=rules), hf.T5ForConditionalGeneration(config).eval())
    assert model(**tokens).logits.isfinite().all()
