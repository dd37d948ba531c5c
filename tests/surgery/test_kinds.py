"""A kind that no file of the package knows: two weights of different shapes in one module."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import CalibrationError, PlanError, RecipeError, SurgeryError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLayer, Weight, quant_layers
from qsurgeon.layers.kinds import KINDS, Kind, kind_of, listed, register
from qsurgeon.layers.product import quantized_linear
from qsurgeon.recipe import FormatSpec, Recipe, Rule, load_recipe
from qsurgeon.surgery import inventory, operate, read_record

IDS = torch.arange(12).view(2, 6)
MX = get_format("mxfp4")


class Pair(nn.Module):
    """Up and down in one module, as experts have them: one weight is (inputs, outputs), the other (outputs, inputs)."""

    def __init__(self, size: int = 64, inner: int = 96) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(size, inner) * 0.1)
        self.down = nn.Parameter(torch.randn(size, inner) * 0.1)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.up).relu() @ self.down.mT + self.bias


class QuantPair(QuantLayer, Pair):
    source = Pair
    weights = (Weight("up", contraction=-2), Weight("down", takes_input=False))

    def forward(self, hidden: Tensor) -> Tensor:
        hows = self.quantizations
        inner = quantized_linear(hidden, self.up.mT, None, hows["up"]) if "up" in hows else hidden @ self.up
        inner = inner.relu()
        if "down" in hows:
            return quantized_linear(inner, self.down, self.bias, hows["down"])
        plain: Tensor = inner @ self.down.mT + self.bias
        return plain


class Toy(hf.PreTrainedModel):
    config_class = hf.LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList([Pair(), Pair()])
        self.head = nn.Linear(64, 32)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        head: Tensor = self.head(x)
        return head


def toy(config: Any) -> Any:
    made: Any = Toy(config)
    return made.eval()


@pytest.fixture(autouse=True)
def known() -> Iterator[Kind]:
    kind = register(Kind("Pair", QuantPair))
    yield kind
    del KINDS["Pair"]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return toy(hf.LlamaConfig(tie_word_embeddings=False))


def rule(*target: str, **fields: Any) -> Rule:
    return Rule(**{"target": target, "types": ("Pair",), "weight": "mxfp4", "input": "mxfp4", "name": "it", **fields})


def recipe(*rules: Rule, **fields: Any) -> Recipe:
    return Recipe(version=1, rules=rules, **fields)


def whys(steps: Any) -> dict[str, str]:
    return {step.module.name: step.why for step in steps if step.why}


def both() -> Recipe:
    return recipe(rule("blocks", exclude=("blocks.1.down",)))


# --- plan


def test_each_weight_is_a_step_of_its_own(model: Any) -> None:
    plan = qsurgeon.plan(both(), model)
    assert whys(plan.steps) == {
        "embed": "not a Linear or Pair",
        "blocks.0.up": "rule 'it'",
        "blocks.0.down": "rule 'it'",
        "blocks.1.up": "rule 'it'",
        "blocks.1.down": "excluded by 'blocks.1.down' of rule 'it'",
        "head": "no rule names it",
    }
    assert plan.summary == (
        "64.4% of the parameters are wrapped, in 3 of 5 Linear and Pair modules (7.1% are in no Linear or Pair, most "
        "in Embedding): 3 with weight mxfp4, input mxfp4"
    )


def test_the_weights_of_a_module_are_listed_with_what_belongs_to_it_once(model: Any) -> None:
    found = {one.name: one for one in inventory(model) if one.type == "Pair"}
    up, down = found["blocks.0.up"], found["blocks.0.down"]
    assert (up.path, up.parameter, up.shape, up.row_shape) == ("blocks.0", "blocks.0.up", (64, 96), (96, 64))
    assert (down.path, down.parameter, down.shape, down.row_shape) == ("blocks.0", "blocks.0.down", (64, 96), (64, 96))
    assert (up.parameters, down.parameters) == (64 * 96 + 64, 64 * 96)
    assert sum(one.parameters for one in inventory(model)) == model.num_parameters()
    assert sum(one.bytes for one in inventory(model)) == 4 * model.num_parameters()


def test_rules_share_out_the_weights_of_a_module(model: Any) -> None:
    plan = qsurgeon.plan(recipe(rule("up", weight="nvfp4", name="first"), rule("blocks", name="rest")), model)
    assert whys(plan.wrapped) == {
        "blocks.0.up": "rule 'first'",
        "blocks.0.down": "rule 'rest'",
        "blocks.1.up": "rule 'first'",
        "blocks.1.down": "rule 'rest'",
    }


def test_a_rotation_has_to_divide_the_inputs_of_each_weight() -> None:
    turned = {"turned": FormatSpec(like="mxfp4", hadamard=64)}
    made = recipe(rule("blocks", weight="turned", input="turned"), formats=turned)
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(made, Toy(hf.LlamaConfig()))
    assert str(caught.value) == (
        "rules[0].target: rule 'it' rotates 64 values at a time, which does not divide the 96 inputs of blocks.0.down"
    )


def test_a_kind_that_cannot_be_packed_is_refused_by_the_plan(model: Any) -> None:
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(recipe(rule("blocks"), storage="packed"), model)
    assert str(caught.value) == (
        "rules[0].types: rule 'it' takes blocks.0.up, a Pair, whose weights cannot be packed: say 'storage: master', "
        "or exclude it"
    )


def test_and_by_the_operation(model: Any) -> None:
    with pytest.raises(SurgeryError) as caught:
        operate(model, {"blocks.0.up": Quantization(MX, None)}, storage="packed")
    assert str(caught.value) == (
        "blocks.0 cannot be wrapped: the weights of a Pair cannot be packed; use storage: master"
    )
    assert not quant_layers(model)


def test_a_rule_of_another_type_says_how_it_is_taken(model: Any) -> None:
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(recipe(rule("blocks", types=("Linear",))), model)
    assert str(caught.value) == (
        "rules[0].target[0]: 'blocks' names no Linear, only ModuleList, Pair; say 'types: [Pair]' to take the "
        "Pair modules"
    )


def test_a_recipes_file_may_name_it_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nrules:\n- target: [blocks]\n  types: [Pair]\n  weight: mxfp4\n")
    assert load_recipe(file).rules[0].types == ("Pair",)
    assert "Pair" in Recipe.model_json_schema()["$defs"]["Rule"]["properties"]["types"]["items"]["enum"]
    file.write_text(file.read_text().replace("[Pair]", "[Pairs]"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert caught.value.mistakes[0].message == "'types' cannot be 'Pairs'; did you mean 'Pair'?"


# --- apply, record, inspect


def test_it_computes_with_the_weights_that_the_plan_names(model: Any) -> None:
    first, second = model.blocks
    ups = [one.up.detach().clone() for one in (first, second)]
    x = torch.randn(3, 64)
    plain = [one(x) for one in (first, second)]
    qsurgeon.apply(both(), model)
    assert first is model.blocks[0]
    assert [type(one) for one in model.blocks] == [QuantPair, QuantPair]
    assert list(first.quantizations) == ["up", "down"]
    assert list(second.quantizations) == ["up"]
    for one, up, before, rounds in zip((first, second), ups, plain, (True, False), strict=True):
        inner = (MX.fake_quantize(x) @ MX.fake_quantize(up.mT.contiguous()).mT).relu()
        down = MX.fake_quantize(one.down.detach()) if rounds else one.down
        expected = (MX.fake_quantize(inner) if rounds else inner) @ down.mT + one.bias
        assert torch.allclose(one(x), expected, atol=1e-6)
        assert not torch.allclose(one(x), before, atol=1e-3)
    model(IDS).sum().backward()
    assert all(one.grad is not None for one in model.blocks.parameters())


def test_the_record_names_each_weight_and_wraps_another_model_alike(model: Any) -> None:
    plain = toy(model.config)
    plain.load_state_dict(model.state_dict())
    data = qsurgeon.apply(both(), model).config.quantization_config.to_dict()
    (written,) = data["rules"]
    assert written["modules"] == ["blocks.0.up", "blocks.0.down", "blocks.1.up"]
    assert written["excluded"] == {"blocks.1.down": ["blocks.1.down"]}
    operate(plain, read_record(data, "config.json").quantizations())
    assert torch.equal(plain(IDS), model(IDS))


def test_it_is_saved_and_opened_again(model: Any, tmp_path: Path) -> None:
    qsurgeon.apply(both(), model).save_pretrained(tmp_path)
    again: Any = Toy.from_pretrained(tmp_path)
    again.eval()
    assert torch.equal(again(IDS), model(IDS))
    assert qsurgeon.inspect(again).to_dict() == qsurgeon.inspect(model).to_dict()


def test_inspect_lists_each_weight(model: Any) -> None:
    rows = {row.module: row for row in qsurgeon.inspect(qsurgeon.apply(both(), model), {"input_ids": IDS}).rows}
    found = {name: (row.weight, row.type, row.rounds, row.called) for name, row in rows.items() if row.type == "Pair"}
    assert found == {
        "blocks.0.up": ("mxfp4", "Pair", True, True),
        "blocks.0.down": ("mxfp4", "Pair", True, True),
        "blocks.1.up": ("mxfp4", "Pair", True, True),
        "blocks.1.down": ("-", "Pair", None, None),
    }
    assert rows["blocks.1.down"].why == "excluded by 'blocks.1.down' of rule 'it'"


def test_a_static_scale_is_found_for_what_the_module_is_called_with(model: Any) -> None:
    static = {"static": FormatSpec(like="nvfp4", tensor_scale="static")}
    made = recipe(rule("blocks.0.up", weight="static", input="static"), formats=static)
    qsurgeon.calibrate(qsurgeon.apply(made, model), [{"input_ids": IDS}])
    seen: Mapping[str, float] = model.blocks[0].quantizations["up"].static_scales
    format = get_format("nvfp4").with_fields("static", tensor_scale="static")
    assert seen["input"] == pytest.approx(model.embed(IDS).abs().max().item() / format.top)
    assert seen["weight"] == pytest.approx(model.blocks[0].up.abs().max().item() / format.top)


def test_a_static_scale_of_what_is_made_inside_is_refused(model: Any) -> None:
    static = {"static": FormatSpec(like="nvfp4", tensor_scale="static")}
    made = recipe(rule("blocks", weight="nvfp4", input="static"), formats=static)
    with pytest.raises(CalibrationError) as caught:
        qsurgeon.calibrate(qsurgeon.apply(made, model), [{"input_ids": IDS}])
    assert str(caught.value) == "what blocks.0.down is multiplied with is made inside of its module, and not seen"


def test_watch_measures_each_weight(model: Any) -> None:
    qsurgeon.apply(both(), model)
    with qsurgeon.Watch(model, every=1) as watch:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(IDS).square().sum().backward()
        optimizer.step()
        numbers = watch.step()
    assert {key for key in numbers if "sqnr" in key} == {
        "qsurgeon/weight_sqnr_db/up",
        "qsurgeon/weight_sqnr_db/down",
    }
    assert numbers["qsurgeon/flip_rate/up"] > 0


# --- the registry


def test_a_module_is_of_its_kind_plain_and_wrapped_and_a_subclass_is_of_none(known: Kind, model: Any) -> None:
    class Own(Pair):
        pass

    assert kind_of(Pair()) is known
    assert kind_of(qsurgeon.apply(both(), model).blocks[0]) is known
    assert kind_of(Own()) is None


@pytest.mark.parametrize(
    ("names", "words"), [((), "Linear"), (("a",), "a"), (("a", "b"), "a or b"), (("a", "b", "c"), "a, b or c")]
)
def test_names_are_listed_in_words(names: tuple[str, ...], words: str) -> None:
    assert listed(names) == words


def test_inputs_are_found_by_position_and_by_name(known: Kind) -> None:
    x = torch.ones(1)
    assert known.input((x,), {}) is x
    assert known.input((), {"hidden": x}) is x
    assert KINDS["Linear"].input((), {"input": x}) is x
