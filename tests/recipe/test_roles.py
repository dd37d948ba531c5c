"""Roles in patterns: a word in angle brackets names what plays a part in the model, whatever it is called there."""

import pytest

from qsurgeon.recipe.select import Namespace, parse_pattern

NAMES = ["model.layers.0.mlp", "proj_out", "lm_heads.0", "lm_heads.1", "output_head"]
SPACE = Namespace(NAMES, {"output_head": ["proj_out", "lm_heads.0"]})


@pytest.mark.parametrize(("text", "optional"), [("<output_head>", False), ("<output_head>?", True)])
def test_a_role_names_what_plays_it_and_no_module_of_that_name(text: str, optional: bool) -> None:
    pattern = parse_pattern(text)
    assert (pattern.role, pattern.optional, pattern.text) == ("output_head", optional, text)
    match = SPACE.match(pattern)
    assert match.names == {"proj_out", "lm_heads.0"}
    assert match.unused == ()
    assert SPACE.match(parse_pattern("output_head")).names == {"output_head"}


def test_a_role_that_nothing_plays_names_nothing_and_says_so() -> None:
    space, pattern = Namespace(NAMES), parse_pattern("<output_head>")
    assert space.match(pattern).names == frozenset()
    assert space.hint(pattern) == (
        "the model says of no module that it is what computes the model's outputs from its last hidden states"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ouput_head>", "angle brackets hold a role; did you mean '<output_head>'?"),
        ("<x>?", "angle brackets hold a role; expected one of: <output_head>"),
        ("<>", "angle brackets hold a role; expected one of: <output_head>"),
        ("<output_head", "angle brackets hold a role; did you mean '<output_head>'?"),
        ("output_head>", "angle brackets hold a role; did you mean '<output_head>'?"),
        ("a.<output_head>", "a role such as <output_head> must be alone, without other components"),
        ("{<output_head>,x}", "a role such as <output_head> must be alone, without other components"),
    ],
)
def test_what_is_wrong_with_a_role_is_said(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match="bad pattern") as caught:
        parse_pattern(text)
    assert str(caught.value) == f"bad pattern '{text}': {expected}"
