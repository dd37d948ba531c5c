from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

import qsurgeon
from qsurgeon.errors import PlanError
from qsurgeon.formats import CATALOG, get_format
from qsurgeon.layers import Quantization, quant_layers
from qsurgeon.layers.kinds import LINEAR
from qsurgeon.recipe import FormatSpec, Recipe, Rule, load_recipe
from qsurgeon.surgery import Excluded, Module, Plan, build_plan, inventory, skeleton

Make = Callable[..., Any]


def linear(name: str, **fields: Any) -> Module:
    plain = {"name": name, "path": name, "kind": "Linear", "wraps": LINEAR, "shape": (4, 4), "parameters": 16}
    return Module(**{**plain, "bytes": 64, "tied_weight": "", "adapter": False, "types": ("Linear",), **fields})


def other(name: str, **fields: Any) -> Module:
    return linear(name, **{"kind": "Norm", "wraps": None, **fields})


def rule(*target: str, **fields: Any) -> Rule:
    return Rule(target=target, **({"weight": "mxfp4"} | fields))


def recipe(*rules: Rule, **fields: Any) -> Recipe:
    return Recipe(version=1, rules=rules, **fields)


def fates(plan: Plan) -> dict[str, str]:
    """Return, for each module that has one, the reason for its fate."""
    return {step.module.name: step.why for step in plan.steps if step.why}


def complaint(made: Recipe, modules: Sequence[Module]) -> str:
    with pytest.raises(PlanError) as caught:
        build_plan(made, modules)
    return str(caught.value)


MODEL = (
    other("embed"),
    linear("layers.0.up"),
    linear("layers.0.down"),
    other("layers.0.norm"),
    linear("layers.1.up"),
    linear("layers.1.down"),
    linear("head"),
)


# --- who takes what


def test_the_first_rule_that_names_a_module_takes_it() -> None:
    plan = build_plan(recipe(rule("layers.0", name="first"), rule("layers", name="rest")), MODEL)
    assert [(step.module.name, step.why) for step in plan.wrapped] == [
        ("layers.0.up", "rule 'first'"),
        ("layers.0.down", "rule 'first'"),
        ("layers.1.up", "rule 'rest'"),
        ("layers.1.down", "rule 'rest'"),
    ]


def test_a_rules_formats_and_gradient_are_those_of_its_modules() -> None:
    plan = build_plan(recipe(rule("head", weight="nvfp4", input="mxfp8", gradient="clipped", name="it")), MODEL)
    assert [step.quantization for step in plan.wrapped] == [
        Quantization(get_format("nvfp4"), get_format("mxfp8"), "clipped", "it")
    ]


def test_a_rule_may_quantize_inputs_alone() -> None:
    plan = build_plan(recipe(rule("head", weight=None, input="mxfp4")), MODEL)
    assert [step.quantization for step in plan.wrapped] == [Quantization(None, get_format("mxfp4"), "ste", "rule 1")]


def test_a_format_of_the_recipes_own_is_resolved() -> None:
    made = recipe(rule("head", weight="g8"), formats={"g8": FormatSpec(like="mxfp4", block=8)})
    assert [step.quantization.weight.block for step in build_plan(made, MODEL).wrapped] == [8]  # type: ignore[union-attr]


def test_every_module_has_a_step_in_the_models_order() -> None:
    assert [step.module for step in build_plan(recipe(rule("head")), MODEL).steps] == list(MODEL)


def test_a_module_that_one_rule_excludes_a_later_one_may_take() -> None:
    plan = build_plan(recipe(rule("layers", exclude=("up",)), rule("up", name="later")), MODEL)
    assert fates(plan)["layers.0.up"] == "rule 'later'"


def test_a_module_that_a_rule_took_is_not_said_to_be_excluded_by_a_later_one() -> None:
    plan = build_plan(recipe(rule("up", name="first"), rule("layers", exclude=("up",))), MODEL)
    assert fates(plan)["layers.0.up"] == "rule 'first'"


def test_the_summary_counts_linears_and_no_adapters() -> None:
    modules = (*MODEL, linear("head.lora_A", adapter=True))
    assert "in 4 of 5 Linear modules" in build_plan(recipe(rule("layers")), modules).summary


# --- reasons


def test_every_module_with_parameters_has_a_reason() -> None:
    plan = build_plan(recipe(rule("layers", name="all", exclude=("layers.1", "down"))), MODEL)
    assert fates(plan) == {
        "embed": "not a Linear",
        "layers.0.up": "rule 'all'",
        "layers.0.down": "excluded by 'down' of rule 'all'",
        "layers.0.norm": "not a Linear",
        "layers.1.up": "excluded by 'layers.1' of rule 'all'",
        "layers.1.down": "excluded by 'layers.1' of rule 'all'",
        "head": "no rule names it",
    }


def test_a_module_that_only_holds_others_needs_no_reason() -> None:
    plan = build_plan(recipe(rule("head")), (*MODEL, other("holder", parameters=0, shape=())))
    assert "holder" not in fates(plan)


def test_the_first_exclude_pattern_is_the_reason() -> None:
    plan = build_plan(recipe(rule("layers", exclude=("up", "layers.0"))), MODEL)
    assert plan.steps[1].fate == Excluded("rule 1", "up")


def test_a_pattern_excludes_only_what_its_rule_targets() -> None:
    plan = build_plan(recipe(rule("layers", exclude=("head", "up"))), MODEL)
    assert fates(plan)["head"] == "no rule names it"


def test_an_adapter_stays_in_full_precision_and_says_so() -> None:
    modules = (linear("q"), linear("q.lora_A", adapter=True))
    assert fates(build_plan(recipe(rule("**")), modules)) == {
        "q": "rule 'rule 1'",
        "q.lora_A": "adapter of peft: stays in full precision",
    }


# --- patterns that do not fit


def test_a_target_that_names_nothing_is_an_error_with_a_guess() -> None:
    assert complaint(recipe(rule("layer")), MODEL) == (
        "rules[0].target[0]: 'layer' names no module; did you mean 'layers'?"
    )


def test_an_exclude_that_names_nothing_is_an_error_with_a_guess() -> None:
    assert complaint(recipe(rule("layers", exclude=("up", "heads"))), MODEL) == (
        "rules[0].exclude[1]: 'heads' names no module; did you mean 'head'?"
    )


def test_a_number_that_is_not_there_is_an_error_with_the_nearest_that_are() -> None:
    assert complaint(recipe(rule("layers.7")), MODEL) == (
        "rules[0].target[0]: 'layers.7' names no module; nearest: layers.1, layers.0"
    )


def test_a_word_in_braces_that_names_nothing_is_an_error() -> None:
    assert complaint(recipe(rule("{up,gate}")), MODEL) == ("rules[0].target[0]: '{up,gate}': nothing is named by gate")


def test_numbers_past_the_end_are_an_error() -> None:
    assert complaint(recipe(rule("layers", exclude=("layers.{1..3}",))), MODEL) == (
        "rules[0].exclude[0]: 'layers.{1..3}': nothing is named by 2, 3"
    )


def test_words_that_stand_above_each_other_all_name_something() -> None:
    modules = (other("layers.0.attn", parameters=0), linear("layers.0.attn.q"), linear("layers.0.up"))
    plan = build_plan(recipe(rule("layers.**.{attn,q}")), modules)
    assert [step.module.name for step in plan.wrapped] == ["layers.0.attn.q"]


@pytest.mark.parametrize("pattern", ["router?", "{up,gate}?", "layers.{0,9}?"])
def test_an_optional_pattern_may_name_nothing(pattern: str) -> None:
    assert len(build_plan(recipe(rule("head", pattern)), MODEL).wrapped) >= 1


def test_a_target_without_a_linear_is_an_error_that_says_what_it_names() -> None:
    assert complaint(recipe(rule("embed", "head")), MODEL) == (
        "rules[0].target[0]: 'embed' names no Linear, only Norm; only nn.Linear itself is wrapped"
    )


def test_a_target_of_adapters_alone_names_no_linear() -> None:
    modules = (
        linear("q"),
        linear("q.lora_A.default", adapter=True),
        other("q.lora_A", adapter=True, kind="ModuleDict"),
    )
    assert complaint(recipe(rule("q", "lora_A")), modules) == (
        "rules[0].target[1]: 'lora_A' names no Linear, only Linear (adapter), ModuleDict (adapter); only nn.Linear "
        "itself is wrapped"
    )


def test_an_optional_target_without_a_linear_is_no_mistake() -> None:
    assert len(build_plan(recipe(rule("head", "embed?")), MODEL).wrapped) == 1


def test_an_exclude_may_name_what_is_no_linear() -> None:
    assert len(build_plan(recipe(rule("layers", exclude=("norm", "embed"))), MODEL).wrapped) == 4


def test_a_rule_that_excludes_all_it_targets_is_an_error() -> None:
    assert complaint(recipe(rule("head"), rule("layers.0", exclude=("layers",), name="none")), MODEL) == (
        "rules[1]: rule 'none' excludes every Linear that it targets; what it also "
        "names is not nn.Linear itself and never wrapped: 1 Norm"
    )


def test_a_rule_whose_targets_are_optional_may_exclude_them_all() -> None:
    assert (
        "in 1 of 5 Linear modules"
        in build_plan(recipe(rule("head"), rule("layers?", exclude=("layers",))), MODEL).summary
    )


def test_a_recipe_that_wraps_nothing_is_an_error() -> None:
    assert complaint(recipe(rule("heads?"), rule("layrs?")), MODEL) == (
        "rules: the recipe wraps nothing: each target ends in '?', and the model has none of them"
    )


def test_a_rule_that_decides_nothing_is_an_error() -> None:
    assert complaint(recipe(rule("layers"), rule("up", name="late")), MODEL) == (
        "rules[1]: rule 'late' decides nothing: earlier rules took all it names"
    )


def test_an_unknown_format_is_an_error_at_its_place() -> None:
    assert complaint(recipe(rule("head", input="mxpf4")), MODEL) == (
        "rules[0].input: no format 'mxpf4'; did you mean 'mxfp4'?"
    )


def test_all_mistakes_are_told_in_one_run() -> None:
    made = recipe(rule("layer", exclude=("heads",)), rule("embed"), rule("layers", weight="q8"))
    assert complaint(made, MODEL) == (
        "rules[0].target[0]: 'layer' names no module; did you mean 'layers'?\n"
        "rules[0].exclude[0]: 'heads' names no module; did you mean 'head'?\n"
        "rules[1].target[0]: 'embed' names no Linear, only Norm; only nn.Linear itself is wrapped\n"
        "rules[2].weight: no format 'q8'; expected one of: " + ", ".join(sorted(CATALOG))
    )


def test_a_mistake_in_a_recipe_from_a_file_is_shown_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("version: 1\nrules:\n  - target: [head, layer]\n    weight: mxfp4\n")
    assert complaint(load_recipe("mine.yaml"), MODEL) == (
        "mine.yaml:3:20: 'layer' names no module; did you mean 'layers'?\n"
        "      - target: [head, layer]\n"
        "                       ^^^^^"
    )


# --- ties


TIED = (
    other("embed", kind="Embedding"),
    linear("up"),
    linear("head", parameters=0, bytes=0, tied_weight="embed.weight"),
)


def test_a_rule_that_reaches_a_tied_weight_is_an_error() -> None:
    assert complaint(recipe(rule("**", name="all")), TIED) == (
        "rules[0].target: rule 'all' reaches head, whose weight is tied to embed: exclude head, or say 'untie: true'"
    )


def test_a_rule_that_reaches_the_owner_of_a_tied_weight_is_an_error() -> None:
    modules = (linear("first"), linear("second", tied_weight="first.weight"))
    assert complaint(recipe(rule("first")), modules) == (
        "rules[0].target: rule 'rule 1' reaches first, whose weight is tied to second: "
        "exclude first, or say 'untie: true'"
    )


def test_a_tied_weight_may_be_excluded() -> None:
    assert fates(build_plan(recipe(rule("**", exclude=("head",))), TIED))["head"] == (
        "excluded by 'head' of rule 'rule 1'"
    )


def test_a_tied_weight_may_be_untied() -> None:
    assert fates(build_plan(recipe(rule("**"), untie=True), TIED))["head"] == "rule 'rule 1'"


# --- real models


def test_a_plan_of_a_config_is_the_plan_of_its_model(make_qwen2: Make, qwen2_config: Make) -> None:
    assert qsurgeon.plan("w4a4-mxfp4", qwen2_config()).steps == qsurgeon.plan("w4a4-mxfp4", make_qwen2()).steps


def test_a_plan_of_a_folder_is_the_plan_of_its_model(tiny_folder: Path, tiny_qwen2: Any) -> None:
    from_folder = qsurgeon.plan("w4a4-mxfp4", tiny_folder)
    assert [step.why for step in from_folder.steps] == [
        step.why for step in qsurgeon.plan("w4a4-mxfp4", tiny_qwen2).steps
    ]


def test_the_names_of_a_live_model_are_guessed_from(tiny_qwen2: Any) -> None:
    assert complaint(recipe(rule("layers.*.self_atn.q_proj", exclude=("lm_heads",))), inventory(tiny_qwen2)) == (
        "rules[0].target[0]: 'layers.*.self_atn.q_proj' names no module; did you mean 'self_attn'?\n"
        "rules[0].exclude[0]: 'lm_heads' names no module; did you mean 'lm_head'?"
    )


class OwnLinear(nn.Linear):
    """A subclass may have a forward of its own."""


def test_a_subclass_of_linear_is_never_taken() -> None:
    plan = qsurgeon.plan(recipe(rule("**")), nn.Sequential(nn.Linear(4, 4), OwnLinear(4, 4)))
    assert fates(plan) == {"0": "rule 'rule 1'", "1": "not a Linear"}


def test_a_target_of_a_subclass_alone_is_an_error_that_names_its_class() -> None:
    assert complaint(recipe(rule("1")), inventory(nn.Sequential(nn.Linear(4, 4), OwnLinear(4, 4)))) == (
        "rules[0].target[0]: '1' names no Linear, only OwnLinear; only nn.Linear itself is wrapped"
    )


# --- the seed experiments: Qwen2.5-1.5B, whose 28 layers hold 196 of the 197 Linear modules

E13 = ["e13/e13g-nvfp4-w4a4", "e13/e13h-mxfp4-w4a4"]


@pytest.fixture
def seed_model(qwen2_config: Make) -> nn.Module:
    """Qwen2.5-1.5B without its weights."""
    config = qwen2_config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    )
    return skeleton(config)


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("name", E13)
def test_the_seed_recipe_wraps_182_of_197(seed_model: nn.Module, name: str) -> None:
    assert "in 182 of 197 Linear modules" in qsurgeon.plan(name, seed_model).summary


@pytest.mark.parametrize("name", E13)
def test_the_seed_recipe_leaves_the_first_and_last_layer_and_the_head(seed_model: nn.Module, name: str) -> None:
    left = [step for step in qsurgeon.plan(name, seed_model).steps if step.module.type and not step.quantization]
    assert {step.module.name.partition(".self_attn")[0].partition(".mlp")[0]: step.why for step in left} == {
        "model.layers.0": "excluded by 'layers.0' of rule 'decoder'",
        "model.layers.27": "excluded by 'layers.27' of rule 'decoder'",
        "lm_head": "excluded by '<output_head>' of rule 'decoder'",
    }


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", E13)
def test_the_seed_recipe_wraps_the_same_182_inside_peft(seed_model: nn.Module, name: str) -> None:
    before = [step.module.name for step in qsurgeon.plan(name, seed_model).wrapped]
    model = qsurgeon.apply(name, with_lora(seed_model))
    wrapped = [path.removeprefix("base_model.model.").removesuffix(".base_layer") for path in quant_layers(model)]
    assert (len(wrapped), wrapped) == (182, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", E13)
def test_peft_around_a_wrapped_seed_model_leaves_182_wrapped(seed_model: nn.Module, name: str) -> None:
    model = with_lora(qsurgeon.apply(name, seed_model))
    assert len(quant_layers(model)) == 182
    assert sum("lora_" not in path for path in quant_layers(model)) == 182


def test_extends_in_a_recipe_made_in_python_is_refused_and_not_ignored() -> None:
    made = Recipe.model_validate({"version": 1, "extends": "w4a4-mxfp4"})
    assert complaint(made, MODEL) == "extends: a recipe made in Python is not merged with another; write a file"


def test_a_rotation_that_does_not_divide_the_inputs_is_an_error_that_names_the_module() -> None:
    made = Recipe(
        version=1,
        formats={"turned": FormatSpec(like="mxfp4", hadamard=64)},
        rules=(Rule(target=("layers",), weight="turned"),),
    )
    modules = [linear("layers.0.up", shape=(8, 128)), linear("layers.0.down", shape=(8, 96))]
    with pytest.raises(PlanError) as caught:
        build_plan(made, modules)
    assert str(caught.value) == (
        "rules[0].target: rule 'rule 1' rotates 64 values at a time, which does not divide the 96 inputs of "
        "layers.0.down"
    )


def test_formats_that_no_product_can_have_are_an_error_of_their_rule() -> None:
    made = Recipe(version=1, rules=(Rule(target=("layers",), weight="mxfp4", input="fp8_e4m3_128x128"),))
    with pytest.raises(PlanError) as caught:
        build_plan(made, [linear("layers.0.up")])
    assert str(caught.value) == (
        "rules[0]: rule 'rule 1': block 128×128 of format 'fp8_e4m3_128x128' spans rows: an input's rows are tokens, "
        "whose values must not depend on each other; such a block is for weights"
    )
