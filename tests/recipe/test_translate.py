"""What is offered for a regular expression names what the expression finds, on the names of real models."""

import itertools
import re

import pytest

from qsurgeon.recipe.select import Namespace, parse_pattern
from qsurgeon.recipe.translate import from_regex, is_regex, several, variants

LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in (
        *(f"self_attn.{one}_proj" for one in "qkvo"),
        *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
        "mlp.gate",
    )
]
NAMES = [*LAYERS, "model.embed_tokens", "model.norm", "lm_head"]

BEGINS = ["re:.*", ".*", r".*\.", "re:.*\\.", r"model\.layers\.\d+\..*", r"^model\.layers\.[0-9]+\..*self_attn\."]
NAMED = ["q_proj", "mlp", "(q|k)_proj", "(?:up_proj|down_proj)", "self_attn", "[qk]_proj", "gate", "proj", "_proj"]
ENDS = ["", "$", ".*", r"\..*"]


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("named", NAMED)
def test_the_pattern_for_a_regular_expression_names_what_it_finds(begin: str, named: str) -> None:
    for end in ENDS:
        text = begin + named + end
        found = from_regex(text)
        assert found is not None, text
        assert is_regex(text), text
        # A name beneath one that is found is named too: a pattern takes with it what lies beneath.
        expression = re.compile(text.removeprefix("re:").removesuffix("$").removesuffix(r"\..*").removesuffix(".*"))
        deeper = r"(?:[^.]*)" if end == ".*" else ""
        wanted = {name for name in NAMES if re.fullmatch(f"(?:{expression.pattern}){deeper}(?:\\..*)?", name)}
        assert Namespace(NAMES).match(parse_pattern(found[0])).names == wanted, (text, found)


@pytest.mark.parametrize(("first", "last"), [*itertools.combinations(range(5), 2)])
@pytest.mark.parametrize("form", ["layers.{{{0}-{1}}}", "layers.{0}-{1}", "layers.{0}:{1}", "layers.{{{0} - {1}}}"])
def test_a_range_of_other_tools_is_offered_as_ours(form: str, first: int, last: int) -> None:
    assert f"layers.{{{first}..{last}}}" in list(variants(form.format(first, last)))


@pytest.mark.parametrize(
    ("text", "offered"),
    [("layers[3]", "layers.3"), ("layers[-1]", "layers.-1"), ("layers[:4]", "layers.{0..3}"),
     ("layers[2:4]", "layers.{2..3}"), ("layers[4:]", "layers.{4..-1}"), ("layers[:-1]", "layers.{0..-2}"),
     ("layers.[3]", "layers.3"), ("a/b", "a.b"), ("mlp.weight", "mlp"), ("mlp.bias?", "mlp?"),
     ("all-linear", "**"), ("nn.Linear", "**"), ("'mlp'", "mlp")],
)  # fmt: skip
def test_what_a_text_may_mean_is_among_its_variants(text: str, offered: str) -> None:
    assert offered in list(variants(text))


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a,b", ["a", "b"]), ("a, b; c", ["a", "b", "c"]), ("a b", ["a", "b"]), ("a", []), ("a, (b|c)", [])],
)
def test_several_patterns_in_one_text_are_told_apart(text: str, parts: list[str]) -> None:
    assert several(text) == parts
