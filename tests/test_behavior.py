"""How a layer uses its formats is one value: a new field of it is said by recipes, records, reports and cards."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qsurgeon
from qsurgeon.errors import CheckpointError, PlanError
from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.surgery import read_record
from qsurgeon.words import FIELDS, Behavior

TINY_MATH = Path(__file__).parents[1] / "examples/models/tiny-math"

# Adds a field to Behavior in the one file where its fields stand, before anything of qsurgeon is imported.
PROGRAM = """
import importlib.machinery, importlib.util, json, sys
from pathlib import Path

model, out = map(Path, sys.argv[1:])
FIELDS = '''
    noise: Annotated[float, Shown(forward=True, others=("jitter",))] = Field(
        default=0.0, description="What is added to a weight."
    )
    dither: Annotated[str, Shown(column=True)] = Field(default="no", description="How inputs are dithered.")

'''

class Altered(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        source = self.get_data(self.path).decode()
        before, mark, after = source.partition("    @classmethod\\n    def of(")
        assert mark
        return compile(before + FIELDS.lstrip("\\n") + mark + after, self.path, "exec")

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name != "qsurgeon.words":
            return None
        file = str(Path(path[0]) / "words.py")
        return importlib.util.spec_from_file_location(name, file, loader=Altered(name, file))

sys.meta_path.insert(0, Finder)
import qsurgeon
from qsurgeon.errors import RecipeError
from qsurgeon.layers import quant_layers
from qsurgeon.recipe import Recipe

TEXT = '''version: 1
rules:
- target: ["layers.0"]
  weight: mxfp4
  noise: 0.25
- target: ["layers.1"]
  weight: mxfp4
'''
said = {}
(out / "mine.yaml").write_text(TEXT)
recipe = qsurgeon.load_recipe(out / "mine.yaml")
said["schema"] = Recipe.model_json_schema()["$defs"]["Rule"]["properties"]["noise"]
(out / "other.yaml").write_text(TEXT.replace("noise", "jitter"))
try:
    qsurgeon.load_recipe(out / "other.yaml")
except RecipeError as error:
    said["misspelt"] = error.mistakes[0].message
plan = qsurgeon.plan(recipe, model)
said["why"] = sorted({step.why for step in plan.wrapped})
said["plan"] = plan.summary
qsurgeon.rewrite(recipe, model, out / "noisy")
said["record"] = json.loads((out / "noisy/config.json").read_text())["quantization_config"]
said["card"] = (out / "noisy/README.md").read_text()
loaded = qsurgeon.load(out / "noisy")
layers = quant_layers(loaded)
said["layers"] = {name.split(".")[2]: layer.quantization.behavior.noise for name, layer in layers.items()}
said["repr"] = repr(next(iter(layers.values())))
report = qsurgeon.inspect(loaded)
said["table"] = str(report)
said["report"] = {row["module"]: {key: row[key] for key in ("noise", "dither")} for row in report.to_dict()["modules"]}
loaded.save_pretrained(out / "again")
said["again"] = json.loads((out / "again/config.json").read_text())["quantization_config"]
print(json.dumps(said))
"""


def rehearse(folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(TINY_MATH), str(folder)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_a_new_field_of_a_rule_is_said_everywhere(tmp_path: Path) -> None:
    said = rehearse(tmp_path)
    assert said["schema"] == {
        "default": 0.0,
        "description": "What is added to a weight.",
        "title": "Noise",
        "type": "number",
    }
    assert said["misspelt"] == "unknown key 'jitter'; here it is called 'noise'"
    assert said["why"] == ["rule 'rule 1', noise 0.25", "rule 'rule 2'"]
    assert "weight mxfp4, input -, noise 0.25; 7 with weight mxfp4, input -" in said["plan"]
    assert [rule.get("noise") for rule in said["record"]["rules"]] == [0.25, None]
    assert said["again"]["rules"] == said["record"]["rules"]
    assert "rule `rule 1`, noise 0.25" in said["card"]
    assert said["layers"] == {"0": 0.25, "1": 0.0}
    assert said["repr"].endswith("weight=mxfp4, input=-, gradient=ste, dither=no, noise=0.25)")
    assert "rule 'rule 1', noise 0.25" in said["table"]
    # A field with a column.
    assert "| modules | n | weight | input | gradient | dither | why |" in said["card"]
    assert "Dither: how inputs are dithered." in said["card"]
    head = said["table"].splitlines()[0].split()
    assert head[head.index("gradient") + 1] == "dither"
    assert said["report"]["model.layers.0.mlp.up_proj"] == {"noise": 0.25, "dither": "no"}
    assert said["report"]["model.embed_tokens"] == {"noise": "-", "dither": "-"}
    # Here the field does not exist.
    fields = {key: value for key, value in said["record"].items() if key != "quant_method"}
    fields["qsurgeon_version"] = "99.1.0"
    with pytest.raises(CheckpointError) as caught:
        read_record(fields, "config.json")
    assert str(caught.value) == (
        "config.json: quantization_config.rules.0.noise: unknown key (written by qsurgeon 99.1.0, and this is "
        f"{qsurgeon.__version__}: install qsurgeon 99.1.0 or newer)"
    )


def test_every_field_is_told_and_has_a_default() -> None:
    for field in FIELDS:
        assert field.description.endswith("."), field.name
        assert getattr(Behavior(), field.name) == field.default


def test_a_recipe_may_say_once_what_its_rules_do_not() -> None:
    rules = (
        Rule(target=("a",), weight="mxfp4"),
        Rule(target=("b",), weight="mxfp4", saved_inputs="packed"),
    )
    recipe = Recipe(version=1, saved_inputs="full", rules=rules)
    assert [recipe.behavior(place) for place in (0, 1)] == [Behavior(saved_inputs="full"), Behavior()]


def test_a_quantization_takes_a_behavior_its_gradient_or_its_fields() -> None:
    mxfp4 = get_format("mxfp4")
    whole = Quantization(mxfp4, None, Behavior(gradient="clipped", phases="training"), "mine")
    assert Quantization(mxfp4, None, "clipped", "mine", phases="training") == whole
    assert replace(whole, weight=None).behavior == whole.behavior
    assert replace(whole, behavior=Behavior(), rule="") == Quantization(mxfp4, None)


def test_a_packed_weight_cannot_be_rounded_in_some_phases(tiny_qwen2: Any) -> None:
    rule = Rule(target=("layers",), weight="mxfp4", phases="rollout")
    with pytest.raises(PlanError) as caught:
        qsurgeon.plan(Recipe(version=1, storage="packed", rules=(rule,)), tiny_qwen2)
    assert str(caught.value) == (
        "rules[0].phases: rule 'rule 1': a packed weight is rounded in every phase, not in rollout only; say "
        "'storage: master', or leave the weight out of the rule"
    )
