"""The model card: what it says, and that what others said on it stays."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import qsurgeon
from qsurgeon.checkpoint.card import with_record
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import CATALOG
from qsurgeon.recipe import Recipe
from qsurgeon.surgery import Record, record_of

COMMIT = "8faed761d45a263340a0528343f099c05c9a4323"
PINNED = f"Qwen/Qwen2.5-1.5B@{COMMIT}"
SUMMARY = "half of the parameters are wrapped: 9 with weight mxfp4, input nvfp4"
RECIPE = Recipe.model_validate(
    {
        "version": 1,
        "formats": {"dither": {"like": "mxfp8", "rounding": "stochastic"}},
        "rules": [
            {"name": "mlp", "target": ["mlp"], "exclude": ["layers.0"], "weight": "mxfp4", "input": "nvfp4"},
            {"target": ["q_proj"], "weight": "dither", "gradient": "clipped", "phases": "training"},
        ],
    }
)


@pytest.fixture
def record(tiny_qwen2: Any) -> Record:
    return record_of(qsurgeon.plan(RECIPE, tiny_qwen2), "1.2.3", PINNED)


def test_a_card_of_its_own_says_all_of_it(record: Record) -> None:
    assert (
        with_record("", record, SUMMARY)
        == f"""\
---
library_name: transformers
tags:
- qsurgeon
- dither
- mxfp4
- nvfp4
base_model: Qwen/Qwen2.5-1.5B
base_model_relation: quantized
---

<!-- qsurgeon -->
# Qwen2.5-1.5B in dither, mxfp4 and nvfp4

## Number formats

Rewritten by qsurgeon 1.2.3 from [Qwen/Qwen2.5-1.5B](https://huggingface.co/Qwen/Qwen2.5-1.5B/tree/{COMMIT}) at commit \
`8faed761d45a`: {SUMMARY}. The weights of wrapped modules are stored in full precision and rounded in every forward \
pass, so that they can be trained (`storage: master`). All other modules are in full precision.

| modules | n | weight | input | gradient | why |
| --- | ---: | --- | --- | --- | --- |
| `model.layers.{{0..2}}.self_attn.q_proj` | 3 | dither | - | clipped | rule `rule 2`, in training only |
| `model.layers.{{1..2}}.mlp.gate_proj` | 2 | mxfp4 | nvfp4 | ste | rule `mlp` |
| `model.layers.{{1..2}}.mlp.up_proj` | 2 | mxfp4 | nvfp4 | ste | rule `mlp` |
| `model.layers.{{1..2}}.mlp.down_proj` | 2 | mxfp4 | nvfp4 | ste | rule `mlp` |
| `model.layers.0.mlp.gate_proj` | 1 | - | - | - | excluded by `layers.0` of rule `mlp` |
| `model.layers.0.mlp.up_proj` | 1 | - | - | - | excluded by `layers.0` of rule `mlp` |
| `model.layers.0.mlp.down_proj` | 1 | - | - | - | excluded by `layers.0` of rule `mlp` |

| format | element | block | scale | tensor scale | bits |
| --- | --- | --- | --- | --- | ---: |
| dither | e4m3, rounded stochastic | 32 | e8m0, floor | none | 8.25 |
| mxfp4 | e2m1 | 32 | e8m0, floor | none | 4.25 |
| nvfp4 | e2m1 | 16 | e4m3, nearest | by_role | 4.5 |

Bits are per value, block scales counted. Gradient: how the gradient passes the rounding.

To load it:

```python
import qsurgeon

model = qsurgeon.load("folder or hub id of this model")
```

After `import qsurgeon` a plain `from_pretrained` does the same; without it transformers warns and computes in full \
precision.

The recipe:

```yaml
{RECIPE.text.rstrip()}
```
<!-- /qsurgeon -->
"""
    )


def test_the_hub_reads_its_front_matter(record: Record) -> None:
    data: Any = ModelCard(with_record("", record, SUMMARY)).data
    assert (data.base_model, data.library_name) == ("Qwen/Qwen2.5-1.5B", "transformers")
    assert data.tags == ["qsurgeon", "dither", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("source", ["", "tiny-math"])
def test_a_model_of_no_hub_has_no_base_there(record: Record, source: str) -> None:
    card = with_record("", record.model_copy(update={"source": source}), SUMMARY)
    assert "base_model" not in card
    assert f"# {source or 'A model'} in dither, mxfp4 and nvfp4\n" in card
    assert f"Rewritten by qsurgeon 1.2.3{' from `tiny-math`' if source else ''}: {SUMMARY}. " in card


SOURCE = """\
---
license: apache-2.0
language:
- en
- no
tags:
- chat
base_model: Qwen/Qwen2.5-1.5B-pretrained
model-index:
- name: x
  results: []
---

# Qwen

It does sums: ünï.

| a | b |
|---|---|
"""


def test_what_was_on_the_card_stays(record: Record) -> None:
    card = with_record(SOURCE, record, SUMMARY)
    head, _, text = card.partition("\n---\n")
    assert (
        head
        == """\
---
library_name: transformers
license: apache-2.0
language:
- en
- 'no'
tags:
- chat
- qsurgeon
- dither
- mxfp4
- nvfp4
base_model: Qwen/Qwen2.5-1.5B
model-index:
- name: x
  results: []
base_model_relation: quantized"""
    )
    notice, _, rest = text.partition("# Qwen\n")
    assert (
        notice
        == f"""
<!-- qsurgeon: notice -->
> **Qwen/Qwen2.5-1.5B, rewritten by qsurgeon:** {SUMMARY}. See [Number formats](#number-formats). \
Unless it says otherwise, what is written here, and what was measured, is about the model before that.
<!-- /qsurgeon: notice -->

"""
    )
    assert rest.startswith("\nIt does sums: ünï.\n\n| a | b |\n|---|---|\n\n<!-- qsurgeon -->\n## Number formats\n")
    assert card.endswith("```\n<!-- /qsurgeon -->\n")


@pytest.mark.parametrize("card", ["", SOURCE, "# Title\n", "---\nlicense: mit\n---\n"])
def test_saying_it_twice_says_it_once(record: Record, card: str) -> None:
    once = with_record(card, record, SUMMARY)
    assert with_record(once, record, SUMMARY) == once


def test_what_is_said_anew_replaces_what_was_said_before(record: Record, tiny_qwen2: Any) -> None:
    after = "\n\nMy own words below.\n"
    once = with_record(SOURCE, record, SUMMARY) + after
    plan = qsurgeon.plan("w8a8-mxfp8", tiny_qwen2)
    card = with_record(once, record_of(plan, "1.2.4", "me/other"), plan.summary)
    assert card.count("## Number formats") == card.count("qsurgeon: notice -->") // 2 == 1
    assert f"Rewritten by qsurgeon 1.2.4 from [me/other](https://huggingface.co/me/other): {plan.summary}. " in card
    assert card.endswith("<!-- /qsurgeon -->\n" + after)
    assert "nvfp4" not in card.partition("\n---\n")[2]
    data: Any = ModelCard(card).data
    assert data.base_model == "me/other"


def test_a_fence_in_a_recipe_does_not_end_it(record: Record) -> None:
    card = with_record("", record.model_copy(update={"recipe": "# ```\nversion: 1\n"}), SUMMARY)
    assert "\n````yaml\n# ```\nversion: 1\n````\n" in card


def test_weights_that_no_rule_rounds_are_said_to_be_as_they_were(tiny_qwen2: Any) -> None:
    recipe = Recipe.model_validate({"version": 1, "rules": [{"target": ["mlp"], "input": "mxfp4"}]})
    card = with_record("", record_of(qsurgeon.plan(recipe, tiny_qwen2), "1.2.3"), SUMMARY)
    assert f"{SUMMARY}. The weights of wrapped modules are in full precision (`storage: master`)." in card


def test_a_record_that_knows_no_recipe_shows_none(record: Record) -> None:
    card = with_record("", record.model_copy(update={"recipe": ""}), SUMMARY)
    assert card.endswith("computes in full precision.\n<!-- /qsurgeon -->\n")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        pytest.param(
            "---\na: [\n---\n",
            "README.md: its front matter is not YAML: while parsing a flow node expected the node content, but found "
            "'<stream end>'",
            id="not-yaml",
        ),
        pytest.param(
            "---\n- a\n---\n", "README.md: its front matter is list; expected keys and values", id="not-a-mapping"
        ),
    ],
)
def test_front_matter_that_cannot_be_kept_is_an_error(record: Record, card: str, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        with_record(card, record, SUMMARY)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("name", CATALOG)
def test_every_format_of_the_catalogue_has_a_row(name: str, tiny_qwen2: Any) -> None:
    recipe = Recipe.model_validate({"version": 1, "rules": [{"target": ["mlp"], "weight": name}]})
    card = with_record("", record_of(qsurgeon.plan(recipe, tiny_qwen2), "1.2.3"), SUMMARY)
    row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    assert row.count("|") == 7
    assert row.endswith(f" {CATALOG[name].bits:.4g} |")


def test_a_card_lies_beside_the_weights_that_are_rewritten(tiny_folder: Path, tmp_path: Path) -> None:
    qsurgeon.rewrite("w4a4-mxfp4", tiny_folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `model.layers.{0..2}.mlp.up_proj` | 3 | mxfp4 | mxfp4 | ste | rule `linears` |" in card
    assert qsurgeon.load_recipe("w4a4-mxfp4").text in card
