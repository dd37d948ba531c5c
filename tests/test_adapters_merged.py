"""``adapters: merged``: under an adapter a layer computes what it would compute with the adapter merged into it."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import qsurgeon
from qsurgeon.errors import GradientError, PlanError, SurgeryError, UsageError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear, product
from qsurgeon.layers.added import Added
from qsurgeon.recipe import Recipe, Rule

Maker = Callable[..., Any]
TOKENS = torch.arange(1, 25).reshape(2, 12)
FORMATS = ["mxfp4", "nvfp4", "mxfp8", "int4_b32", "fp8_e4m3_row"]


def recipe(format: str = "mxfp4", **said: Any) -> Recipe:
    kept = {key: said.pop(key) for key in ("storage",) if key in said}
    rule = Rule(target=("layers?", "h?"), types=("Linear", "Conv1D"), weight=format, input=format, **said)
    return Recipe(version=1, rules=(rule,), **kept)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **fields})


def adapted(model: Any, format: str = "mxfp4", config: LoraConfig | None = None, **said: Any) -> Any:
    wrapped = qsurgeon.apply(recipe(format, **{"adapters": "merged", **said}), model)
    return get_peft_model(wrapped, config or lora(lora_alpha=2))


def gpt2() -> Any:
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


# ---- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*merge.*:UserWarning")
def test_it_computes_what_merging_the_adapter_gives(make_qwen2: Maker, format: str, dtype: torch.dtype) -> None:
    model = adapted(make_qwen2().to(dtype), format).eval()
    with torch.no_grad():
        under, apart = logits(model), logits(adapted(make_qwen2().to(dtype), format, adapters="apart").eval())
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
    assert torch.equal(under, merged)
    assert not torch.equal(under, apart)


def test_so_does_a_conv1d() -> None:
    model = adapted(gpt2(), config=lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)).eval()
    with torch.no_grad():
        under = logits(model)
        model.merge_adapter()
        assert torch.equal(under, logits(model))


def test_so_do_several_adapters_at_once(make_qwen2: Maker) -> None:
    model = adapted(make_qwen2())
    model.add_adapter("second", lora(r=2, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        both = logits(model)
        model.base_model.set_adapter(["default"])
        assert not torch.equal(both, logits(model))
        model.base_model.set_adapter(["default", "second"])
        model.merge_adapter()
        assert torch.equal(both, logits(model))


def test_without_the_adapter_it_is_the_base(make_qwen2: Maker) -> None:
    base = logits(qsurgeon.apply(recipe(), make_qwen2()))
    model = adapted(make_qwen2())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_where_nothing_rounds_it_computes_with_the_sum_too(make_qwen2: Maker) -> None:
    plain = get_peft_model(make_qwen2(), lora(lora_alpha=2, target_modules=["q_proj", "down_proj"]))
    model = adapted(make_qwen2(), config=lora(lora_alpha=2, target_modules=["q_proj", "down_proj"]))
    model.load_state_dict(plain.state_dict())
    with torch.no_grad(), qsurgeon.disabled(model):
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


def test_phases_hold(make_qwen2: Maker) -> None:
    model = adapted(make_qwen2(), phases="rollout")
    with torch.no_grad():
        trained = logits(model)
        with qsurgeon.phase("rollout"):
            assert not torch.equal(trained, logits(model))


# ---- the gradient


def parts(dtype: torch.dtype = torch.float32, **said: Any) -> tuple[nn.Linear, Tensor, Tensor, Added]:
    layer = nn.Linear(64, 48, dtype=dtype)
    layer.requires_grad_(requires_grad=False)
    fmt = get_format("mxfp4")
    QuantLinear.wrap(layer, Quantization(fmt, fmt, adapters="merged", **said), "layer")
    down = torch.randn(4, 64, requires_grad=True)
    up = torch.randn(48, 4, requires_grad=True)
    return layer, down, up, Added(lambda: [up @ down * 0.1], (down, up), (0.1,))


def test_the_gradient_passes_the_rounding_of_the_sum() -> None:
    layer, down, up, added = parts()
    x, grad = torch.randn(6, 64, requires_grad=True), torch.randn(6, 48)
    layer(x, added).backward(grad)
    fmt, weight = get_format("mxfp4"), layer.weight + up.detach() @ down.detach() * 0.1
    of_weight = grad.T @ fmt.as_input.fake_quantize(x.detach())
    torch.testing.assert_close(up.grad, of_weight @ down.detach().T * 0.1)
    torch.testing.assert_close(down.grad, up.detach().T @ of_weight * 0.1)
    torch.testing.assert_close(x.grad, grad @ fmt.as_weight.fake_quantize(weight))


def test_autograd_does_not_keep_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ReferenceType[Tensor]] = []
    add = Added.to

    def to(self: Added, weight: Tensor) -> Tensor:
        found = add(self, weight)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Added, "to", to)
    layer, down, _, added = parts()
    output = layer(torch.randn(6, 64, requires_grad=True), added)
    gc.collect()
    assert [one() for one in made] == [None]
    output.sum().backward()
    assert down.grad is not None
    assert len(made) == 2


@pytest.mark.parametrize("which", ["weight", "adapter", "input"])
def test_what_changes_before_the_backward_pass_is_an_error(which: str) -> None:
    layer, down, _, added = parts()
    if which == "input":  # which is kept itself where it is not rounded
        layer.quantization = Quantization(get_format("mxfp4"), None, adapters="merged")  # type: ignore[assignment]
    x = torch.randn(6, 64, requires_grad=True) * 1
    output = layer(x, added)
    with torch.no_grad():
        {"weight": layer.weight, "adapter": down, "input": x}[which].mul_(2)
    with pytest.raises(
        (GradientError, RuntimeError), match=r"changed in place since the forward pass|inplace operation"
    ):
        output.sum().backward()


def steps(model: Any, count: int = 3) -> list[float]:
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.5), []
    for _ in range(count):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make_qwen2: Maker, reentrant: bool) -> None:
    torch.manual_seed(3)
    model = adapted(make_qwen2()).train()
    again = copy.deepcopy(model)
    again.enable_input_require_grads()
    name = "activation_checkpointing_enable"  # gradient_… until 5.23
    enable = getattr(again, name if hasattr(again, name) else name.replace("activation", "gradient"))
    enable({"use_reentrant": reentrant})
    losses = steps(model)
    assert losses[-1] < losses[0]
    assert steps(again) == losses


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
def test_compiled_it_computes_the_same(make_qwen2: Maker) -> None:
    torch.manual_seed(3)
    model = adapted(make_qwen2(num_hidden_layers=1)).train()
    again = copy.deepcopy(model)
    compiled: Any = torch.compile(again, backend="aot_eager", fullgraph=True)
    compiled(TOKENS, labels=TOKENS).loss.backward()
    model(TOKENS, labels=TOKENS).loss.backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


# ---- generation


def generated(model: Any) -> list[list[int]]:
    found = model.generate(TOKENS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens: list[list[int]] = found.tolist()
    return tokens


def test_a_generation_rounds_each_sum_once(make_qwen2: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rounded = adapted(make_qwen2()).eval(), list[int]()
    once = product.rounded_weight

    def counted(*args: Any) -> Tensor:
        rounded.append(1)
        return once(*args)

    monkeypatch.setattr(product, "rounded_weight", counted)
    tokens = generated(model)
    assert len(rounded) == 2 * 21  # once to use it, once to compare at the end
    model.merge_adapter()
    assert generated(model) == tokens


def test_the_next_generation_sees_what_was_trained(make_qwen2: Maker) -> None:
    model = adapted(make_qwen2())
    with torch.no_grad():
        generated(model.eval())
        before = logits(model)
    steps(model.train())
    after = generated(model.eval())
    with torch.no_grad():
        assert not torch.equal(logits(model), before)
    model.merge_adapter()
    assert generated(model) == after


@pytest.mark.parametrize("change", ["adapter", "scale", "active"])
def test_a_change_inside_of_a_generation_is_seen(make_qwen2: Maker, change: str) -> None:
    model = adapted(make_qwen2(), config=lora(lora_alpha=2, target_modules=["q_proj"]))
    model.add_adapter("second", lora(target_modules=["q_proj"]))
    with torch.no_grad(), qsurgeon.rounded_once():
        before = [logits(model) for _ in range(2)][-1]
        for layer in model.modules():
            if getattr(layer, "lora_A", None) and change == "adapter":
                layer.lora_A["default"].weight.mul_(3)
            elif getattr(layer, "lora_A", None) and change == "scale":
                layer.scale_layer(7.0)
        if change == "active":
            model.set_adapter("second")
        inside = logits(model)
    with torch.no_grad():
        assert torch.equal(inside, logits(model))
    assert not torch.equal(inside, before)


# ---- saved, reported, watched


def test_a_reloaded_base_merges_the_adapter_that_is_put_on_it(make_qwen2: Maker, tmp_path: Path) -> None:
    model = qsurgeon.apply(recipe(adapters="merged"), make_qwen2())
    model.save_pretrained(tmp_path / "base")
    trained = get_peft_model(model, lora(lora_alpha=2)).eval()
    trained.save_pretrained(str(tmp_path / "adapter"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert "adapters merged" in qsurgeon.inspect(again).to_dict()["modules"][1]["why"]
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        under = logits(loaded)
        assert torch.equal(under, logits(trained))
        loaded.merge_adapter()
        assert torch.equal(under, logits(loaded))


def test_an_adapter_that_was_there_first_is_merged_too(make_qwen2: Maker) -> None:
    model = get_peft_model(make_qwen2(), lora(lora_alpha=2))
    qsurgeon.apply(recipe(adapters="merged"), model)
    with torch.no_grad():
        under = logits(model)
        model.merge_adapter()
        assert torch.equal(under, logits(model))


def test_a_watch_knows_the_sum(make_qwen2: Maker) -> None:
    model = adapted(make_qwen2()).train()
    with qsurgeon.Watch(model, every=1) as watch:
        steps(model, 1)
        numbers = watch.step()
    assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 1.0)


# ---- what it refuses


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"use_dora": True}, "no plain LoRA"),
        ({"lora_dropout": 0.1}, "set lora_dropout=0"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "set lora_bias=False"),
    ],
)
def test_what_cannot_be_merged_is_refused(make_qwen2: Maker, fields: dict[str, Any], why: str) -> None:
    model = make_qwen2()
    plain = [name for name, _ in qsurgeon.apply(recipe(adapters="merged"), model).named_modules()]
    with pytest.raises(SurgeryError, match=rf"adapters: merged, and have adapters that cannot be.*{why}"):
        get_peft_model(model, lora(**fields))
    assert [name for name, _ in model.named_modules()] == plain


def test_apply_refuses_such_an_adapter_that_was_there_first(make_qwen2: Maker) -> None:
    model = get_peft_model(make_qwen2(), lora(lora_dropout=0.1))
    with pytest.raises(SurgeryError, match="set lora_dropout=0"):
        qsurgeon.apply(recipe(adapters="merged"), model)
    assert qsurgeon.apply(recipe(), model) is model


def test_a_packed_weight_has_nothing_to_add_to(make_qwen2: Maker) -> None:
    with pytest.raises(PlanError, match="a packed weight is codes, which an adapter cannot be added to"):
        qsurgeon.plan(recipe(adapters="merged", storage="packed"), make_qwen2())


def test_a_batch_with_several_adapters_is_refused(make_qwen2: Maker) -> None:
    model = adapted(make_qwen2()).eval()
    with pytest.raises(UsageError, match=r"q_proj: a batch with an adapter for each row \(adapter_names\)"):
        model(TOKENS, adapter_names=["default", "default"])


def test_a_tuner_without_a_peft_model_merges_too(make_qwen2: Maker) -> None:
    model = qsurgeon.apply(recipe(adapters="merged"), make_qwen2())
    tuned = LoraModel(model, lora(lora_alpha=2), "default")
    with torch.no_grad():
        under = logits(tuned)
        tuned.merge_adapter()
        assert torch.equal(under, logits(tuned))
