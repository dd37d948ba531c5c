"""Every adapter method of peft on wrapped layers: it calls them, or it is refused."""

import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import peft.tuners
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from versions import adapter_config, adapts, at_least, part

import qsurgeon
from qsurgeon import installed as versions
from qsurgeon.errors import SurgeryError
from qsurgeon.hf import adapting
from qsurgeon.layers import Quantization, QuantLinear, quant_layers
from qsurgeon.recipe import Recipe, Rule, load_recipe
from qsurgeon.surgery import adapters, bypassed

# FRoD's own.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")

TOKENS = torch.arange(1, 13).reshape(2, 6)
TARGETS = ["q_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"

Maker = Callable[..., Any]
Make = Callable[[], Any]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep BOFT from building its CUDA extension, which no CPU can load; without it, it computes in torch."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)


@pytest.fixture
def model(make_qwen2: Maker) -> Maker:
    """Return a maker of models of one layer, whose output head is its own."""
    return lambda **fields: make_qwen2(**{"num_hidden_layers": 1, "tie_word_embeddings": False, **fields})


def made(kind: str, **fields: Any) -> Make:
    return lambda: adapter_config(kind, **{"target_modules": TARGETS, **fields})


def lora(**fields: Any) -> Make:
    return made("LoraConfig", **{"r": 4, **fields})


CALL = {
    "lora": lora(),
    "lora with dropout": lora(lora_dropout=0.5),
    "lora with bias": lora(target_modules=["q_proj"], lora_bias=True),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "mica": lora(init_lora_weights="mica"),
    "target_parameters": lora(target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]),
    "trainable_token_indices": lora(trainable_token_indices=[1, 2]),
    "qalora": lora(use_qalora=True, qalora_group_size=16),
    "alora": lora(alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    "velora": lora(velora_config=part("VeloraConfig", num_groups=8)),
    "kasa": lora(kasa_config=part("KasaConfig")),
    "monteclora": lora(monteclora_config=part("MontecloraConfig")),
    "bdlora": lora(
        use_bdlora=part("BdLoraConfig", nblocks=2, target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"])
    ),
    "adalora": made("AdaLoraConfig", init_r=4, target_r=2, total_step=100),
    "adamss": made("AdamssConfig"),
    "beft": made("BeftConfig", target_modules=["q_proj"]),  # a bias, and q_proj alone has one
    "boft": made("BOFTConfig", boft_block_size=8),
    "c3a": made("C3AConfig", block_size=8),
    "deft": made("DeftConfig"),
    "delora": made("DeloraConfig", r=4),
    "fourierft": made("FourierFTConfig", n_frequency=10),
    "gralora": made("GraloraConfig", r=4, gralora_k=2),
    "hira": made("HiraConfig", r=4),
    "ia3": made("IA3Config", feedforward_modules=["down_proj"]),
    "lily": made("LilyConfig"),
    "loha": made("LoHaConfig", r=4),
    "lokr": made("LoKrConfig", r=4),
    "miss": made("MissConfig", r=4),
    "oft": made("OFTConfig", r=0, oft_block_size=8),
    "osf": made("OSFConfig", effective_rank=4),
    "peanut": made("PeanutConfig"),
    "psoft": made("PsoftConfig"),
    "pvera": made("PveraConfig", r=4),
    "randlora": made("RandLoraConfig", r=4),
    "road": made("RoadConfig"),
    "tinylora": made("TinyLoraConfig"),
    "unilora": made("UniLoraConfig"),
    "vblora": made("VBLoRAConfig", num_vectors=8, vector_length=8, r=4, topk=2),
    "vera": made("VeraConfig", r=4),
    "waveft": made("WaveFTConfig", n_frequency=10),
}

ITSELF = "the adapter on it ({}) multiplies with its weight itself and never calls it"
PAST = {
    "frod": (made("FrodConfig"), ITSELF.format("Linear of peft's frod")),
    "hra": (made("HRAConfig", r=4), ITSELF.format("HRALinear of peft's hra")),
    "miss, bat": (made("MissConfig", r=4, init_weights="bat"), ITSELF.format("MissLinear, init_weights='bat'")),
    "shira": (made("ShiraConfig", r=4), ITSELF.format("Linear of peft's shira")),
    "supertuning": (made("SupertuningConfig"), ITSELF.format("Linear of peft's supertuning")),
}
DORA = lora(use_dora=True, lora_dropout=0.5)
DORA_PAST = (
    "the adapter on it (DoRA with lora_dropout) multiplies with its weight itself while it trains; set lora_dropout=0"
)

# Those that put no layer around a Linear; and poly and xlora, whose forward wants to be told of tasks or experts, and
# which are made of LoRA layers.
NO_LAYER = {
    "adaption_prompt", "cartridge", "cpt", "ln_tuning", "lora", "mixed", "multitask_prompt_tuning", "p_tuning", "poly",
    "prefix_tuning", "prompt_tuning", "shadow", "trainable_tokens", "xlora",
}  # fmt: skip


def test_every_method_of_peft_is_tried() -> None:
    methods = {found.name for found in pkgutil.iter_modules(peft.tuners.__path__) if found.ispkg}
    tried = {name.split(",")[0] for name in [*CALL, *PAST]} | {"glora", "bone"}  # which have tests of their own
    assert methods - NO_LAYER - tried == set()


@pytest.mark.filterwarnings("ignore:Bone will be removed:UserWarning")
@pytest.mark.parametrize("storage", ["master", "packed"])
def test_bone_of_older_peft_calls_its_layer_or_is_refused(model: Maker, storage: str) -> None:
    recipe = load_recipe("w4a4-mxfp4").model_copy(update={"storage": storage})
    on = adapter_config("BoneConfig", r=4, target_modules=["q_proj"])
    assert bypassed(peft.get_peft_model(qsurgeon.apply(recipe, model()), on)) == {}
    wrapped = qsurgeon.apply(recipe, model())
    with pytest.raises(SurgeryError) as caught:
        peft.get_peft_model(wrapped, adapter_config("BoneConfig", r=4, target_modules=["q_proj"], init_weights="bat"))
    assert str(caught.value) == (
        f"{Q} cannot have this adapter: bone with init_weights='bat' multiplies with its weight itself and never calls "
        "it"
    )


def trained(model: Any) -> Any:
    """Give what the adapters train other values than those they start with."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let peft put on what would be refused, to see what it does."""
    for name in ("_check", "refuse_adapters"):
        monkeypatch.setattr(adapting, name, lambda *_: None)


def on(model: Any, config: Any) -> Any:
    return trained(peft.get_peft_model(model, config))


def layers_of(model: nn.Module) -> Iterator[tuple[Any, QuantLinear]]:
    """Yield the layers of peft that hold a wrapped one, and that."""
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if isinstance(base, QuantLinear):
            yield layer, base


def output(layer: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)  # of dropout
    result: Tensor = layer(x)
    return result


def unrounded(layer: Any, held: QuantLinear, x: Tensor) -> Tensor:
    """Return what ``layer`` computes if the layer it holds rounds nothing."""
    how, held.quantization = held.quantization, Quantization(None, None)
    try:
        return output(layer, x)
    finally:
        held.quantization = how


UNTIL_0_21 = ("osf", "adamss")  # are refused with peft before 0.21


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("before", [True, False], ids=["adapter first", "surgery first"])
@pytest.mark.parametrize("name", CALL)
def test_an_adapter_calls_the_layer_it_sits_on(model: Maker, name: str, before: bool, training: bool) -> None:
    def both() -> Any:
        if before:
            return qsurgeon.apply("w4a4-mxfp4", on(model(), CALL[name]()))
        return on(qsurgeon.apply("w4a4-mxfp4", model()), CALL[name]())

    if name in UNTIL_0_21 and not at_least("peft", "0.21"):
        with pytest.raises(SurgeryError, match=r"computes past it in peft before 0\.21$"):
            both()
        return
    adapted = both()
    adapted.train(training)
    report = qsurgeon.inspect(adapted, {"input_ids": TOKENS})
    assert [row.module for row in report.rows if row.called is False or row.bypassed] == []
    assert report.wrapped == 7
    pairs = list(layers_of(adapted))
    assert pairs
    for layer, held in pairs:
        torch.manual_seed(2)
        x = torch.randn(3, 4, held.in_features)
        assert not torch.equal(output(layer, x), unrounded(layer, held, x))
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(held.weight.grad is None for _, held in pairs)


ADDS = (
    "lora", "lora with dropout", "rslora", "pissa", "olora", "adalora", "fourierft", "hira", "loha", "lokr", "miss",
    "vblora", "vera",
)  # fmt: skip


@pytest.mark.parametrize("name", ADDS)
def test_what_an_adapter_adds_sees_the_unrounded_input(model: Maker, name: str) -> None:
    adapted = on(qsurgeon.apply("w4a4-mxfp4", model()), CALL[name]()).train()
    pairs = list(layers_of(adapted))
    assert len(pairs) == len(TARGETS)
    for layer, held in pairs:
        torch.manual_seed(2)
        x = torch.randn(3, 4, held.in_features)
        with_rounding = output(layer, x) - held(x)
        without = unrounded(layer, held, x) - unrounded(held, held, x)
        torch.testing.assert_close(with_rounding, without, rtol=1e-5, atol=1e-5)
        assert without.norm() > 0


def test_dora_scales_what_was_rounded(model: Maker) -> None:
    adapted = on(qsurgeon.apply("w4a4-mxfp4", model()), CALL["dora"]())
    pairs = list(layers_of(adapted))
    assert len(pairs) == len(TARGETS)
    for layer, held in pairs:
        x = torch.randn(3, 4, held.in_features)
        added = layer.get_delta_weight("default")
        magnitude = layer.lora_magnitude_vector["default"].weight
        scale = magnitude / (held.weight + added).norm(dim=1)
        bias = 0 if held.bias is None else held.bias
        expected = scale * (held(x) - bias) + bias + scale * nn.functional.linear(x, added)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_target_parameters_are_added_before_rounding(model: Maker) -> None:
    adapted = on(qsurgeon.apply("w4a4-mxfp4", model()), CALL["target_parameters"]())
    layer, held = next(layers_of(adapted))
    x = torch.randn(3, 4, held.in_features)
    added = layer.get_delta_weight("default")
    mxfp4 = held.quantization.weight
    assert mxfp4 is not None
    weight = mxfp4.fake_quantize((held.weight + added).detach())
    expected = nn.functional.linear(mxfp4.fake_quantize(x), weight, held.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAST)
def test_an_adapter_that_computes_past_its_layer_is_refused_by_surgery(model: Maker, name: str) -> None:
    config, how = PAST[name]
    adapted = peft.get_peft_model(model(), config())
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", adapted)
    assert str(caught.value) == f"{Q} cannot be wrapped: {how}"
    assert quant_layers(adapted) == {}


SAYS = {
    "glora": "glora multiplies with its weight itself and never calls it",
    "frod": "frod multiplies with its weight itself and never calls it",
    "hra": "hra multiplies with its weight itself and never calls it",
    "shira": "shira multiplies with its weight itself and never calls it",
    "supertuning": "supertuning multiplies with its weight itself and never calls it",
    "miss, bat": "miss with init_weights='bat' multiplies with its weight itself and never calls it",
    "dora": "DoRA with lora_dropout multiplies with its weight itself and never calls it while it trains; "
    "set lora_dropout=0",
}


def past(name: str, **fields: Any) -> Any:
    make = {"dora": DORA, "glora": made("GloraConfig")}.get(name)
    config = PAST[name][0]() if make is None else make()
    for field, value in fields.items():
        setattr(config, field, value)
    return config


@pytest.mark.parametrize("name", SAYS)
def test_on_a_wrapped_model_it_is_refused_and_changes_nothing(model: Maker, name: str) -> None:
    wrapped = qsurgeon.apply("w4a4-mxfp4", model())
    before, modules = {key: one.clone() for key, one in wrapped.state_dict().items()}, list(wrapped.named_modules())
    olora = {"init_lora_weights": "olora"} if name == "dora" else {}  # which would write into weights
    with pytest.raises(SurgeryError) as caught:
        peft.get_peft_model(wrapped, past(name, **olora))
    assert str(caught.value) == f"{Q} cannot have this adapter: {SAYS[name]}"
    assert list(wrapped.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in wrapped.parameters())
    after = wrapped.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert on(wrapped, CALL["lora"]())(input_ids=TOKENS, labels=TOKENS).loss > 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # transformers' own way
@pytest.mark.parametrize("whose", ["peft", pytest.param("transformers", marks=adapts)])
def test_a_second_adapter_that_is_refused_leaves_the_first(model: Maker, whose: str, tmp_path: Path) -> None:
    wrapped = qsurgeon.apply("w4a4-mxfp4", model())
    adapted: Any = wrapped
    if whose == "peft":
        adapted = peft.get_peft_model(wrapped, CALL["lora"](), "first")
    else:
        adapted.add_adapter(CALL["lora"](), "first")

    def add(config: Any) -> None:
        adapted.add_adapter(*(("second", config) if whose == "peft" else (config, "second")))

    trained(adapted).eval()
    expected = adapted(input_ids=TOKENS).logits
    trains = [parameter.requires_grad for parameter in adapted.parameters()]
    for _ in range(2):
        with pytest.raises(SurgeryError, match="cannot have this adapter"):
            add(DORA())
    assert list(adapted.peft_config) == ["first"]
    assert [parameter.requires_grad for parameter in adapted.parameters()] == trains
    assert bypassed(adapted) == {}
    assert torch.equal(adapted(input_ids=TOKENS).logits, expected)
    adapted.save_pretrained(tmp_path)
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    add(CALL["lora"]())


@adapts
@pytest.mark.parametrize("name", sorted(SAYS.keys() - {"frod", "glora"}))  # which peft takes from get_peft_model alone
def test_transformers_forgets_a_first_adapter_that_is_refused(model: Maker, name: str, tmp_path: Path) -> None:
    wrapped = qsurgeon.apply("w4a4-mxfp4", model())
    with pytest.raises(SurgeryError, match="cannot have this adapter"):
        wrapped.add_adapter(past(name))
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    wrapped.add_adapter(CALL["lora"]())


@pytest.mark.parametrize("name", SAYS)
def test_it_may_sit_on_what_is_not_wrapped(model: Maker, name: str) -> None:
    rule = Rule(name="up", target=("up_proj",), weight="mxfp4", input="mxfp4")
    adapted = peft.get_peft_model(qsurgeon.apply(Recipe(version=1, rules=(rule,)), model()), past(name))
    assert [path.rsplit(".", 1)[-1] for path in quant_layers(adapted)] == ["up_proj"]
    on_it = [path for path, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    assert {path.rsplit(".", 1)[-1] for path in on_it} >= set(TARGETS)


def test_dora_with_dropout_infers_on_a_wrapped_base(model: Maker, tmp_path: Path) -> None:
    peft.get_peft_model(model(), DORA()).save_pretrained(str(tmp_path))
    adapted = peft.PeftModel.from_pretrained(qsurgeon.apply("w4a4-mxfp4", model()), tmp_path)
    report = qsurgeon.inspect(adapted.eval(), {"input_ids": TOKENS})
    assert [row.module for row in report.rows if row.called is False or row.bypassed] == []
    with pytest.raises(SurgeryError, match="set lora_dropout=0"):
        peft.PeftModel.from_pretrained(qsurgeon.apply("w4a4-mxfp4", model()), tmp_path, is_trainable=True)


def test_tokens_that_train_in_a_wrapped_head_are_refused(model: Maker) -> None:
    rule = Rule(name="head", target=("lm_head",), weight="mxfp4", input="mxfp4")
    head = Recipe(version=1, rules=(rule,))
    with pytest.raises(SurgeryError, match="lm_head cannot have this adapter: trainable_tokens multiplies"):
        peft.get_peft_model(
            qsurgeon.apply(head, model(tie_word_embeddings=False)),
            peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=[1, 2]),
        )
    config = CALL["lora"]()
    config.trainable_token_indices = {"lm_head": [1, 2]}
    with pytest.raises(SurgeryError, match=r"such as lm_head\.token_adapter\.base_layer: the adapter on it"):
        peft.get_peft_model(qsurgeon.apply(head, model(tie_word_embeddings=False)), config)


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("name", PAST)
def test_on_a_wrapped_model_it_computes_past_it_indeed_and_inspect_says_so(model: Maker, name: str) -> None:
    config, how = PAST[name]
    adapted = on(qsurgeon.apply("w4a4-mxfp4", model()), config())
    for layer, held in layers_of(adapted):
        x = torch.randn(3, 4, held.in_features)
        assert torch.equal(output(layer, x), unrounded(layer, held, x))
    report = qsurgeon.inspect(adapted)
    past = {row.module: row.why for row in report.rows if row.bypassed}
    assert past == dict.fromkeys((Q, "model.layers.0.mlp.down_proj"), f"rule 'linears'; {how}")
    assert report.summary.endswith("; past 2 of them adapters compute in full precision")


def test_glora_is_refused_by_surgery(model: Maker) -> None:
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", peft.get_peft_model(model(), made("GloraConfig")()))
    assert str(caught.value) == f"{Q} cannot be wrapped: " + ITSELF.format("GloraLinear of peft's glora")


@pytest.mark.usefixtures("unguarded")
def test_dora_with_dropout_computes_past_its_layer_while_it_trains(model: Maker) -> None:
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", peft.get_peft_model(model(), DORA()))
    assert str(caught.value) == f"{Q} cannot be wrapped: {DORA_PAST}"
    adapted = on(qsurgeon.apply("w4a4-mxfp4", model()), DORA()).train()
    assert set(bypassed(adapted).values()) == {DORA_PAST}
    layer, held = next(layers_of(adapted))
    x = torch.randn(3, 4, held.in_features)
    # Of the two products with the weight only one was rounded: the difference is the layer's alone, not scaled.
    difference = output(layer, x) - unrounded(layer, held, x)
    torch.testing.assert_close(difference, held(x) - unrounded(held, held, x), rtol=1e-4, atol=1e-5)


def test_a_norm_tuner_of_a_linear_trains_a_copy_and_is_refused_if_that_stays_in_full_precision(model: Maker) -> None:
    config = made("LNTuningConfig")
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", peft.get_peft_model(model(), config()))
    assert str(caught.value) == (
        f"{Q} cannot be wrapped: the adapter on it (LNTuningLayer) trains a copy of it in full precision, "
        "and calls that instead"
    )
    adapted = peft.get_peft_model(qsurgeon.apply("w4a4-mxfp4", model()), config())
    assert bypassed(adapted) == {}
    assert sorted(name.rsplit(".", 1)[1] for name in quant_layers(adapted) if "ln_tuning" in name) == ["default"] * 2


def test_load_refuses_an_adapter_that_computes_past_its_base(model: Maker, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model().save_pretrained(base)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), PAST["hra"][0]()).save_pretrained(str(adapter))
    shutil.rmtree(base)
    qsurgeon.apply("w4a4-mxfp4", model()).save_pretrained(base)
    says = f"{Q} cannot have this adapter: {SAYS['hra']}"
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.load(adapter)
    assert str(caught.value) == f"{adapter}: {says}"
    for load in (AutoModelForCausalLM.from_pretrained, peft.AutoPeftModelForCausalLM.from_pretrained):
        with pytest.raises(SurgeryError) as caught:
            load(adapter)
        assert str(caught.value) == says


# --- LoRA before and after surgery, and trained


EVERY: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "lora_alpha": 8}


def both_orders(model: Maker) -> tuple[Any, Any]:
    torch.manual_seed(4)
    first = qsurgeon.apply("w4a4-mxfp4", on(model(), peft.LoraConfig(**EVERY)))
    torch.manual_seed(4)
    return first, on(qsurgeon.apply("w4a4-mxfp4", model()), peft.LoraConfig(**EVERY))


def test_lora_before_and_after_surgery_are_the_same_to_the_bit(model: Maker) -> None:
    first, second = both_orders(model)
    assert list(quant_layers(first)) == list(quant_layers(second))
    losses = [one(input_ids=TOKENS, labels=TOKENS).loss for one in (first, second)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    grads = [{name: p.grad for name, p in one.named_parameters() if p.requires_grad} for one in (first, second)]
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 2 * 7
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name])
        assert grad.norm() > 0


def test_all_linear_takes_the_wrapped_layers_and_not_the_head(model: Maker) -> None:
    adapted: Any = peft.get_peft_model(qsurgeon.apply("w4a4-mxfp4", model()), peft.LoraConfig(**EVERY))
    assert len(list(layers_of(adapted))) == len(quant_layers(adapted)) == 7
    assert type(adapted.base_model.model.lm_head) is nn.Linear


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=str)
def test_adapters_of_a_bf16_model_keep_their_dtype_and_learn(model: Maker, autocast: bool, dtype: torch.dtype) -> None:
    wrapped = qsurgeon.apply("w4a4-mxfp4", model().bfloat16())
    adapted = trained(peft.get_peft_model(wrapped, peft.LoraConfig(**EVERY), autocast_adapter_dtype=autocast))
    adapters = {name: one for name, one in adapted.named_parameters() if "lora_" in name}
    assert {one.dtype for one in adapters.values()} == {dtype}
    logits = adapted(input_ids=TOKENS, labels=TOKENS)
    assert logits.logits.dtype == torch.bfloat16
    logits.loss.backward()
    assert all(one.grad is not None and one.grad.norm() > 0 for one in adapters.values())
    assert not [name for name in quant_layers(adapted) if "lora_" in name]


def test_modules_to_save_of_a_wrapped_model_are_wrapped_copies(model: Maker) -> None:
    wrapped = qsurgeon.apply("w4a4-mxfp4", model())
    adapted: Any = peft.get_peft_model(wrapped, lora(target_modules=["q_proj"], modules_to_save=["down_proj"])())
    copy = adapted.base_model.model.model.layers[0].mlp.down_proj.modules_to_save["default"]
    assert type(copy) is QuantLinear
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert copy.weight.grad is not None
    assert copy.weight.grad.norm() > 0


def test_switching_an_adapter_off_leaves_the_wrapped_model(model: Maker) -> None:
    plain = qsurgeon.apply("w4a4-mxfp4", model())
    expected = plain(TOKENS).logits
    adapted = on(plain, peft.LoraConfig(**EVERY))
    assert not torch.equal(adapted(TOKENS).logits, expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted(TOKENS).logits, expected)


@pytest.mark.parametrize(("installed", "refused"), [("0.20.0", True), ("0.21.0", False)])
def test_adapters_that_older_peft_computes_past_the_layer_are_refused_by_version(
    monkeypatch: pytest.MonkeyPatch, installed: str, refused: bool
) -> None:
    monkeypatch.setattr(versions, "version", lambda _: installed)
    expected = {name: f"{name} computes past it in peft before 0.21" for name in ("osf", "adamss")}
    for config in (peft.OSFConfig(), peft.AdamssConfig()):
        found = adapters.objection(config, is_packed=False)
        assert found == (expected[adapters.method_of(config)] if refused else None)
