from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import chain, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsurgeon.recipe.select import Namespace, check_pattern, parse_pattern


def named(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that ``pattern`` names, in their order."""
    names = list(names)
    found = Namespace(names).match(parse_pattern(pattern)).names
    return [name for name in names if name in found]


def unused(pattern: str, names: Iterable[str]) -> tuple[str, ...]:
    return Namespace(list(names)).match(parse_pattern(pattern)).unused


def hint(pattern: str, names: Iterable[str]) -> str:
    return Namespace(list(names)).hint(parse_pattern(pattern))


def layers(count: int, of: str = "layers") -> list[str]:
    return [f"{of}.{number}" for number in range(count)]


# Two towers of different length, as vision-language models have them.
TOWERS = [*layers(4, "vision.blocks"), *layers(12, "text.blocks")]


# --- whole components


def test_a_number_names_that_layer_and_never_one_that_begins_with_it() -> None:
    assert named("layers.1", layers(12)) == ["layers.1"]


def test_a_word_never_names_a_component_that_only_begins_with_it() -> None:
    assert named("gate", ["mlp.gate", "mlp.gate_proj", "mlp.up_gate"]) == ["mlp.gate"]


def test_a_word_is_found_anywhere_in_the_name() -> None:
    assert named("lm_head", ["model.norm", "lm_head", "language_model.lm_head"]) == [
        "lm_head",
        "language_model.lm_head",
    ]


def test_components_must_follow_one_another() -> None:
    assert named("layers.q_proj", ["layers.0.q_proj", "layers.q_proj"]) == ["layers.q_proj"]


def test_a_pattern_names_everything_beneath_what_it_names() -> None:
    names = ["model.layers", "model.layers.0", "model.layers.0.mlp", "model.layers.0.mlp.up_proj", "model.norm"]
    assert named("layers.0", names) == ["model.layers.0", "model.layers.0.mlp", "model.layers.0.mlp.up_proj"]


def test_a_pattern_does_not_name_what_lies_above() -> None:
    assert named("mlp.up_proj", ["model", "model.mlp", "model.mlp.up_proj"]) == ["model.mlp.up_proj"]


def test_case_matters() -> None:
    assert named("lora_A", ["q.lora_A", "q.lora_a"]) == ["q.lora_A"]


def test_a_full_name_names_its_module() -> None:
    assert named("model.layers.0.mlp", ["model.layers.0.mlp", "model.layers.1.mlp"]) == ["model.layers.0.mlp"]


def test_a_hyphen_is_part_of_a_name() -> None:
    assert named("a-b", ["x.a-b", "x.a", "x.b"]) == ["x.a-b"]


# --- stars


def test_a_star_is_any_text_within_one_component() -> None:
    assert named("*_proj", ["mlp.up_proj", "mlp.act", "mlp.proj"]) == ["mlp.up_proj"]


def test_a_star_may_stand_for_no_text() -> None:
    assert named("layer*", ["layer", "layers", "player"]) == ["layer", "layers"]


def test_a_star_does_not_cross_a_dot() -> None:
    assert named("layers.*.up", ["layers.0.up", "layers.0.mlp.up"]) == ["layers.0.up"]


def test_a_star_is_at_least_one_component() -> None:
    assert named("layers.*", ["layers", "layers.0"]) == ["layers.0"]


def test_several_stars_may_stand_in_one_component() -> None:
    assert named("*gate*proj*", ["gate_up_proj", "gate_proj_2", "proj_gate"]) == ["gate_up_proj", "gate_proj_2"]


def test_two_stars_are_any_number_of_components() -> None:
    names = ["layers.up", "layers.0.up", "layers.0.mlp.up", "norm.up"]
    assert named("layers.**.up", names) == ["layers.up", "layers.0.up", "layers.0.mlp.up"]


def test_two_stars_alone_name_everything() -> None:
    assert named("**", ["model", "model.norm", "lm_head"]) == ["model", "model.norm", "lm_head"]


def test_two_stars_at_the_end_name_the_module_itself_too() -> None:
    assert named("layers.**", ["model", "model.layers", "model.layers.0"]) == ["model.layers", "model.layers.0"]


# --- braces


def test_words_in_braces_are_alternatives() -> None:
    names = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj"]
    assert named("{q,k}_proj", names) == ["attn.q_proj", "attn.k_proj"]


def test_a_whole_component_may_be_alternatives() -> None:
    assert named("{mlp,norm}", ["0.mlp", "0.norm", "0.attn"]) == ["0.mlp", "0.norm"]


def test_alternatives_may_be_globs() -> None:
    assert named("{up*,*norm}", ["up_proj", "post_norm", "down_proj"]) == ["up_proj", "post_norm"]


def test_braces_may_stand_twice_in_one_component() -> None:
    names = ["q_a", "q_b", "k_a", "k_b", "v_a"]
    assert named("{q,k}_{a,b}", names) == ["q_a", "q_b", "k_a", "k_b"]


def test_spaces_around_alternatives_do_not_count() -> None:
    assert named("layers.{ 0 , 2 }", layers(4)) == ["layers.0", "layers.2"]


def test_the_first_and_the_last_layer_are_zero_and_minus_one() -> None:
    assert named("layers.{0,-1}", layers(28)) == ["layers.0", "layers.27"]


def test_a_range_includes_both_its_ends() -> None:
    assert named("layers.{1..26}", layers(28)) == [f"layers.{number}" for number in range(1, 27)]


def test_a_range_may_end_from_the_end() -> None:
    assert named("layers.{1..-2}", layers(5)) == ["layers.1", "layers.2", "layers.3"]


def test_a_range_may_begin_and_end_from_the_end() -> None:
    assert named("layers.{-3..-2}", layers(12)) == ["layers.9", "layers.10"]


def test_ranges_and_numbers_mix() -> None:
    assert named("layers.{0,2..3,-1}", layers(6)) == ["layers.0", "layers.2", "layers.3", "layers.5"]


def test_a_range_inside_a_component_is_spelled_out() -> None:
    assert named("fc{1..2}", ["mlp.fc1", "mlp.fc2", "mlp.fc3", "mlp.fc12"]) == ["mlp.fc1", "mlp.fc2"]


def test_a_range_names_only_numbers() -> None:
    assert named("experts.{0..9}", ["experts.0", "experts.gate"]) == ["experts.0"]


# --- numbers from the end


def test_a_negative_number_counts_from_the_end_of_each_container() -> None:
    assert named("blocks.-1", TOWERS) == ["vision.blocks.3", "text.blocks.11"]


def test_a_range_from_the_end_is_of_each_container() -> None:
    assert named("blocks.{2..-2}", TOWERS) == ["vision.blocks.2", *[f"text.blocks.{number}" for number in range(2, 11)]]


def test_a_container_that_is_too_short_has_no_such_module() -> None:
    assert named("blocks.-5", TOWERS) == ["text.blocks.7"]


def test_each_layer_counts_its_own_experts() -> None:
    names = [*layers(2, "layers.0.experts"), *layers(4, "layers.1.experts")]
    assert named("experts.-1", names) == ["layers.0.experts.1", "layers.1.experts.3"]


# --- a question mark at the end


def test_a_question_mark_at_the_end_makes_a_pattern_optional() -> None:
    assert parse_pattern("lora_A?").optional


def test_a_pattern_without_a_question_mark_is_not_optional() -> None:
    assert not parse_pattern("lora_A").optional


def test_an_optional_pattern_names_what_is_there() -> None:
    assert named("lora_A?", ["q_proj", "q_proj.lora_A"]) == ["q_proj.lora_A"]


# --- what is no pattern


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        pytest.param("", "it is empty", id="empty"),
        pytest.param("?", "it is empty", id="only-a-question-mark"),
        pytest.param("a..b", "a component is empty", id="two-dots"),
        pytest.param(".a", "a component is empty", id="dot-first"),
        pytest.param("a.", "a component is empty", id="dot-last"),
        pytest.param("{}", "a component is empty", id="empty-braces"),
        pytest.param("{a,}", "a component is empty", id="empty-alternative"),
        pytest.param("a??", "'a?' is not a name, a number or a glob", id="two-question-marks"),
        pytest.param("a?b", "'a?b' is not a name, a number or a glob", id="question-mark-inside"),
        pytest.param("a b", "'a b' is not a name, a number or a glob; write a list: [a, b]", id="space"),
        pytest.param("a/b", "'a/b' is not a name, a number or a glob; did you mean 'a.b'?", id="slash"),
        pytest.param(
            "lm_head, norm",
            "'lm_head, norm' is not a name, a number or a glob; write a list: [lm_head, norm]",
            id="list-in-one-text",
        ),
        pytest.param("{1..}", "'1..' is not a name, a number or a glob", id="range-without-an-end"),
        pytest.param("{..3}", "'..3' is not a name, a number or a glob", id="range-without-a-beginning"),
        pytest.param("{a..c}", "'a..c' is not a name, a number or a glob", id="range-of-letters"),
        pytest.param("{0,1.5}", "'1.5' is not a name, a number or a glob", id="fraction"),
        pytest.param("{a.b}", "'a.b' is not a name, a number or a glob", id="dot-inside-braces"),
        pytest.param("{a", "a brace is not closed", id="brace-not-closed"),
        pytest.param("a}", "a brace is not opened", id="brace-not-opened"),
        pytest.param("{a,{b,c}}", "braces cannot be nested", id="nested-braces"),
        pytest.param("**_proj", "'**' must be a component of its own; did you mean '*_proj'?", id="two-stars-and-text"),
        pytest.param("***", "'**' must be a component of its own", id="three-stars"),
        pytest.param("{a,**}", "'**' must be a component of its own", id="two-stars-in-braces"),
        pytest.param("{3..1}", "the range 3..1 is empty; did you mean 1..3?", id="empty-range"),
        pytest.param("{-1..-3}", "the range -1..-3 is empty; did you mean -3..-1?", id="empty-range-from-the-end"),
        pytest.param("x{3..1}", "the range 3..1 is empty; did you mean 1..3?", id="empty-range-inside"),
        pytest.param("{0..10000}", "the range 0..10000 has more than 10000 numbers", id="range-too-long"),
        pytest.param(
            "x{1..-2}", "1..-2 counts from the end, which only a whole component can", id="from-the-end-inside"
        ),
    ],
)
def test_a_bad_pattern_is_refused_with_what_is_wrong_with_it(pattern: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^bad pattern") as caught:
        parse_pattern(pattern)
    assert str(caught.value) == f"bad pattern '{pattern}': {complaint}"


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        ("re:.*proj", "write '*proj', or 'proj' if that is the whole name"),
        ("^layers", "write 'layers'"),
        ("proj$", "write '*proj', or 'proj' if that is the whole name"),
        ("(q|k)_proj", "write '{q,k}_proj'"),
        ("a|b", "write '{a,b}'"),
        ("a+", "'*', '**' and '{a,b}' are known"),
        ("fc[12]", "write 'fc{1,2}'"),
        (r"a\.b", "write 'a.b'"),
        (r".*\.layers\.\d+\.mlp\.(up|down)_proj$", "write 'layers.*.mlp.{up,down}_proj'"),
        ("(?!lm_head).*", "'*', '**' and '{a,b}' are known; what a rule should skip belongs in its 'exclude'"),
    ],
)
def test_a_regular_expression_is_refused_with_its_equal_here(pattern: str, instead: str) -> None:
    with pytest.raises(ValueError, match=r"^bad pattern") as caught:
        parse_pattern(pattern)
    assert str(caught.value) == (f"bad pattern '{pattern}': patterns are globs, not regular expressions; {instead}")


def test_ranges_inside_a_component_that_multiply_past_the_most_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^bad pattern") as caught:
        parse_pattern("x{0..199}{0..199}")
    assert str(caught.value).endswith("'x{0..199}{0..199}' stands for more than 10000 words")


def test_the_longest_range_is_accepted() -> None:
    assert named("{0..9999}", ["9999", "10000"]) == ["9999"]


def test_a_good_pattern_is_returned_as_it_was_written() -> None:
    assert check_pattern("layers.{ 0,-1 }.*?") == "layers.{ 0,-1 }.*?"


# --- alternatives that name nothing


def test_a_number_that_names_nothing_is_noted() -> None:
    assert unused("layers.{0,99}", layers(12)) == ("99",)


def test_a_word_that_names_nothing_is_noted() -> None:
    assert unused("{q,z}_proj", ["q_proj", "k_proj"]) == ("z_proj",)


def test_the_numbers_of_a_range_past_the_end_are_noted() -> None:
    assert unused("layers.{10..13}", layers(12)) == ("12", "13")


def test_a_number_from_the_end_that_names_nothing_is_noted() -> None:
    assert unused("layers.{0,-13}", layers(12)) == ("-13",)


def test_a_range_from_the_end_that_names_nothing_is_noted_as_it_was_written() -> None:
    assert unused("layers.{0,12..-1}", layers(12)) == ("12..-1",)


def test_a_range_to_the_end_that_names_something_is_used() -> None:
    assert unused("layers.{1..-2}", layers(12)) == ()


def test_alternatives_that_all_name_something_are_used() -> None:
    assert unused("{q,k}_proj", ["q_proj", "k_proj"]) == ()


def test_an_alternative_that_only_one_container_has_is_used() -> None:
    assert unused("blocks.{0,11}", TOWERS) == ()


def test_an_alternative_beneath_another_is_used() -> None:
    names = ["layers.0", "layers.0.attn", "layers.0.attn.q_proj"]
    assert unused("layers.**.{attn,q_proj}", names) == ()


def test_an_alternative_is_used_only_where_the_whole_pattern_fits() -> None:
    assert unused("{a,b}.x", ["a.x", "b.y"]) == ("b",)


# --- hints


MODEL = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "model.layers.2.mlp.gate_proj", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("layer", "did you mean 'layers'?", id="near-word"),
        pytest.param("Lm_head", "did you mean 'lm_head'?", id="other-case"),
        pytest.param("layers.*.gate", "did you mean 'gate_proj'?", id="near-word-among-good-ones"),
        pytest.param("router", "expected one of: gate_proj, layers, lm_head, mlp, model", id="strange-word"),
        pytest.param("layers.9", "nearest: layers.2, layers.1, layers.0", id="number-past-the-end"),
        pytest.param(
            "layers.9.mlp",
            "nearest: layers.2.mlp, layers.1.mlp, layers.0.mlp",
            id="number-past-the-end-above",
        ),
        pytest.param("gate_proj.mlp", "nearest: mlp.gate_proj", id="known-words-in-another-order"),
        pytest.param("lm_head.model", "no module has 2 such names in a row", id="known-words-far-from-any"),
    ],
)
def test_a_hint_names_what_is_nearest(pattern: str, expected: str) -> None:
    assert hint(pattern, MODEL) == expected


# --- properties


WORDS = st.sampled_from(["a", "b", "ab", "aab", "layers", "0", "1", "10"])
NAMES = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)
GLOBS = st.sampled_from(["a", "ab", "layers", "0", "1", "10", "*", "a*", "*b", "*a*", "**"])
PATTERNS = st.lists(GLOBS, min_size=1, max_size=4).map(".".join)


def naive(pattern: str, name: str) -> bool:
    """Try each ``**`` as zero to all components, at each place of the name."""
    parts = name.split(".")
    stars = [("*",) * count for count in range(len(parts) + 1)]
    for spelled in product(*(stars if glob == "**" else [(glob,)] for glob in pattern.split("."))):
        globs = list(chain.from_iterable(spelled))
        for start in range(len(parts) - len(globs) + 1):
            if all(map(fnmatchcase, parts[start:], globs)):
                return True
    return False


@settings(deadline=None)
@given(PATTERNS, NAMES)
def test_a_pattern_without_braces_names_what_a_naive_matcher_names(pattern: str, names: list[str]) -> None:
    assert named(pattern, names) == [name for name in names if naive(pattern, name)]


@settings(deadline=None)
@given(PATTERNS, NAMES, WORDS)
def test_what_is_named_is_named_with_anything_beneath(pattern: str, names: list[str], word: str) -> None:
    beneath = [f"{name}.{word}" for name in named(pattern, names)]
    assert set(beneath) <= set(named(pattern, {*names, *beneath}))


@settings(deadline=None)
@given(NAMES, st.data())
def test_any_run_of_a_names_components_names_it(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    parts = name.split(".")
    start = data.draw(st.integers(0, len(parts) - 1))
    end = data.draw(st.integers(start + 1, len(parts)))
    assert name in named(".".join(parts[start:end]), names)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_a_number_from_the_end_is_the_size_of_its_container_less_that(one: int, other: int, back: int) -> None:
    expected = [f"{of}.layers.{size - back}" for of, size in (("a", one), ("b", other)) if size >= back]
    assert named(f"layers.-{back}", [*layers(one, "a.layers"), *layers(other, "b.layers")]) == expected


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 30))
def test_a_range_names_and_misses_just_what_its_numbers_do(first: int, length: int, size: int) -> None:
    numbers = range(first, first + length + 1)
    pattern = f"layers.{{{first}..{first + length}}}"
    assert named(pattern, layers(size)) == [f"layers.{number}" for number in numbers if number < size]
    assert unused(pattern, layers(size)) == tuple(str(number) for number in numbers if number >= size)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_pattern_or_is_refused_as_one(text: str) -> None:
    try:
        assert parse_pattern(text).text == text
    except ValueError as error:
        assert str(error).startswith(f"bad pattern '{text}': ")  # noqa: PT017
