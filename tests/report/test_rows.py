"""What a report says of a whole model: the headline, what is large, what was reached besides, and a table that fits."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.cells import cell_len
from torch import nn

import qsurgeon
from qsurgeon.checkpoint.card import with_record
from qsurgeon.report.formats import format_rows, formats_text
from qsurgeon.report.inspection import report_of
from qsurgeon.report.rows import Report, Row, mark_large, report_text
from qsurgeon.surgery import Part, headline, percent, record_of

LONG = "a_module_with_a_name_that_is_longer_than_any_terminal_is_wide_because_somebody_liked_it_so_and_nobody_minded"


class Named(nn.Module):
    """A model with long names, and many small modules that no rule can take."""

    def __init__(self) -> None:
        super().__init__()
        deep = nn.ModuleDict({LONG: nn.ModuleDict({"a": nn.Linear(32, 32)})})
        self.layers = nn.ModuleList([deep for _ in range(2)])
        self.tables = nn.ModuleDict({f"table_{name}": nn.Embedding(8, 32) for name in "abcdefghij"})


@cache
def model(name: str) -> Any:
    configs: dict[str, Any] = {
        "dense": hf.Qwen2Config(num_hidden_layers=2),
        "moe": hf.Qwen3MoeConfig(num_hidden_layers=2, num_experts=8, head_dim=64),  # type: ignore[call-arg]
        "vision": hf.Gemma3Config(),
    }
    classes: dict[str, Any] = {
        "dense": hf.Qwen2ForCausalLM,
        "moe": hf.Qwen3MoeForCausalLM,
        "vision": hf.Gemma3ForConditionalGeneration,
    }
    with torch.device("meta"):
        return Named() if name == "named" else classes[name]._from_config(configs[name])


@cache
def report(name: str) -> Report:
    return report_of(qsurgeon.plan("w4a4-mxfp4", model(name)))


# --- the headline


def part(parameters: int, how: str = "", **fields: Any) -> Part:
    return Part(parameters, **{"kind": "Linear", "type": "Linear", "adapter": False, **fields}, how=how)


def test_the_headline_leads_with_the_share_of_the_parameters() -> None:
    experts = part(970, kind="Experts", type="")
    assert headline([part(10, "x"), part(10, "y"), part(10), experts]) == (
        "2.0% of the parameters are wrapped, in 2 of 3 Linear modules (97.0% are in no Linear, most in Experts): "
        "1 with x; 1 with y"
    )
    assert headline([part(10), experts]) == "full precision: none of 1 Linear modules is wrapped"


def test_the_headline_says_no_more_than_is_true() -> None:
    kinds = [part(40, kind=kind, type="") for kind in "ABC"]
    assert "(100.0% are in no Linear, the largest part in A)" in headline([part(0, "x"), *kinds])
    assert headline([part(1, "x"), part(9, adapter=True, type="")], ["so it is"]) == (
        "10.0% of the parameters are wrapped, in 1 of 1 Linear modules: 1 with x; so it is"
    )


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "0.0%"), (1e-9, "under 0.1%"), (0.0004, "under 0.1%"), (0.5, "50.0%"), (0.9999, "over 99.9%"), (1, "100.0%")],
)
def test_a_share_is_never_rounded_to_none_or_all(share: float, expected: str) -> None:
    assert percent(share) == expected


def test_everybody_says_the_same_headline(tiny_folder: Path, tmp_path: Path) -> None:
    plan = qsurgeon.plan("w4a4-mxfp4", tiny_folder)
    assert report_of(plan).summary == plan.summary
    assert plan.summary.startswith("94.4% of the parameters are wrapped, in 21 of 22 Linear modules (5.6% are in no ")
    done = qsurgeon.rewrite("w4a4-mxfp4", tiny_folder, tmp_path / "out")
    loaded = qsurgeon.load(tmp_path / "out")
    said = {done.summary, qsurgeon.inspect(tmp_path / "out").summary, qsurgeon.inspect(loaded).summary}
    assert said == {plan.summary}
    assert json.loads(qsurgeon.inspect(loaded).to_json())["summary"] == plan.summary
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card == with_record("", record_of(done, qsurgeon.__version__, tiny_folder.name), plan.summary)
    assert f": {plan.summary}. The weights of wrapped modules are" in card


# --- what is large


def row(module: str, parameters: int, kind: str = "Expert") -> Row:
    return Row(module, kind, (1, parameters), "-", "-", None, "not a Linear", parameters, 16, 2 * parameters, "")


def test_small_modules_that_are_large_together_are_pointed_out() -> None:
    experts = [row(f"layers.{layer}.experts.{place}", 1) for layer in range(20) for place in range(20)]
    odd = [row(f"odd_{place:c}", 1, "Odd") for place in range(97, 107)]
    rows = [*experts, *odd, row("small", 1, "Small"), row("decided", 500)]
    marked = mark_large(rows, [True] * (len(rows) - 1) + [False])
    assert {one.module for one in marked if one.large} == {one.module for one in [*experts, *odd]}
    made = Report(tuple(marked), "master")
    assert [vars(one) for one in made.large] == [
        {"module": "layers.{0..19}.experts.{0..19}", "kind": "Expert", "count": 400, "share": 400 / 911},
        {"module": "", "kind": "Odd", "count": 10, "share": 10 / 911},
    ]
    assert report_text(made).splitlines()[-2:] == [
        "large, and stays as it is: layers.{0..19}.experts.{0..19} (400 Expert, 43.9% of the parameters)",
        "large together, and stays as it is: 10 Odd (1.1% of the parameters)",
    ]


def test_experts_that_a_recipe_does_not_take_are_named() -> None:
    rules = [{"target": ["**"], "exclude": ["<output_head>", "gate?"], "weight": "mxfp4"}]
    made = report_of(qsurgeon.plan(qsurgeon.Recipe.model_validate({"version": 1, "rules": rules}), model("moe")))
    assert "8 of 13 Linear and Experts modules" in made.summary
    assert re.search(r"\(\d\d\.\d% are in no Linear or Experts, most in Embedding\)", made.summary)
    parameters = {f"model.layers.{{0..1}}.mlp.experts.{one}" for one in ("gate_up_proj", "down_proj")}
    assert parameters < {one.module for one in made.large if one.count == 2} | {"model.embed_tokens"}
    assert "12 of 13 Linear and Experts modules" in report("moe").summary


def test_a_part_that_reads_images_is_remarked_with_its_share() -> None:
    (tower,) = report("vision").towers
    assert (tower.module, tower.kind, tower.reads) == ("model.vision_tower", "SiglipVisionModel", "image")
    assert 0 < tower.wrapped == tower.wrappable
    assert (
        report_text(report("vision")).count("\nwrapped with the rest: model.vision_tower (SiglipVisionModel, which ")
        == 1
    )
    assert report("vision").to_dict()["towers"] == [vars(tower)]
    rules = [{"target": ["**"], "exclude": ["vision_tower", "<output_head>"], "weight": "mxfp4"}]
    without = qsurgeon.plan(qsurgeon.Recipe.model_validate({"version": 1, "rules": rules}), model("vision"))
    assert report_of(without).towers == ()


# --- the table


@pytest.mark.parametrize("name", ["dense", "moe", "vision", "named"])
@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "all"])
def test_a_table_is_no_wider_than_the_terminal_and_loses_no_name(name: str, width: int, fold: bool) -> None:
    made = report(name)
    table, *rest = report_text(made, fold=fold, width=width).split("\n\n")
    assert max(map(cell_len, table.splitlines())) <= width
    assert max(map(cell_len, "\n".join(rest).splitlines())) <= max(width, len(LONG) + 60)
    names = [line[: table.index("  n  ")] for line in table.splitlines()]  # the first column, broken or not
    whole = "".join(one.strip() for one in names)
    for module in [one.module for one in made.rows] if not fold else ["embed_tokens"] * (name != "named"):
        assert module in whole


@pytest.mark.parametrize("name", ["dense", "moe", "vision", "named"])
def test_where_nobody_looks_nothing_is_cut_broken_or_left_out(name: str) -> None:
    made = report(name)
    table, totals = report_text(made, fold=False).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == len(made.rows) + 1
    for line, one in zip(lines[1:], made.rows, strict=True):
        assert line.split()[0] == one.module
        assert line.endswith(one.why)
    assert totals.splitlines()[0] == made.summary


def test_letters_stand_for_the_reasons_and_their_gradients() -> None:
    text = report_text(report("dense"), width=80)
    assert re.search(r"\nlm_head +1  -  +-  +32 +\d+\.\d  c\n", text)
    assert (
        "\na  not a Linear\nb  rule 'linears', gradient ste\nc  excluded by '<output_head>?' of rule 'linears'\n"
        in text
    )
    assert "\nnot shown at this width: shape, kind; a wider terminal, a file or a pipe gets\n  them\n" in text


@pytest.mark.parametrize("width", [80, 100, 200, None])
def test_the_formats_fit_the_terminal_too(width: int | None) -> None:
    table = formats_text(format_rows(), width).split("\n\n")[0]
    widest = max(map(cell_len, table.splitlines()))
    assert widest <= (width or 200)
    assert ("tensor scale" in table) == (width != 80)
