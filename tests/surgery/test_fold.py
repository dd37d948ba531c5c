"""Names that differ in a number become one pattern, which names them and no other."""

import random

import pytest

from qsurgeon.recipe.select import Namespace, parse_pattern
from qsurgeon.surgery.fold import folded


def names(items: list[str]) -> list[tuple[str, list[str]]]:
    return folded(items, lambda one: one, lambda one: None)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["layers.0.up", "layers.2.up", "layers.1.up"], ["layers.{0..2}.up"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"], ["l.{0..1}.e.{0..1}"]),
        (["l.0.e.0", "l.1.e.1"], ["l.0.e.0", "l.1.e.1"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], ["l.0.e.{0..1}", "l.1.e.0"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.7", "l.2.e.0", "l.2.e.1"], ["l.{0,2}.e.{0..1}", "l.1.e.7"]),
        (["0.fc1", "1.fc1", "0.fc2"], ["0.fc1", "1.fc1", "0.fc2"]),
    ],
)
def test_a_pattern_says_what_is_there(items: list[str], expected: list[str]) -> None:
    assert sorted(name for name, _ in names(items)) == sorted(expected)


def test_patterns_name_their_items_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(200):
        every = [f"layers.{a}.experts.{b}.up" for a in range(4) for b in range(4)]
        items = rng.sample(every, rng.randint(1, 16))
        space = Namespace(every)
        found = names(items)
        assert sorted(one for _, group in found for one in group) == sorted(items)
        for pattern, group in found:
            assert space.match(parse_pattern(pattern)).names == set(group)
