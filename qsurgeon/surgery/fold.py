"""Group module names that differ only in a number into one pattern."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.|\Z)")


def folded(
    items: Iterable[Item], name: Callable[[Item], str], alike: Callable[[Item], object]
) -> list[tuple[str, list[Item]]]:
    """Return (name, items) of those that are alike, and whose names are but for the numbers in them.

    A name is a pattern that names its items and no other number: where layers differ in which numbers they have, there
    are several.
    """
    groups: dict[tuple[tuple[str, ...], object], dict[tuple[int, ...], list[Item]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for one in items:
        parts = _NUMBER.split(name(one))  # what is between the numbers, and every other part a number
        groups[tuple(parts[::2]), alike(one)][tuple(map(int, parts[1::2]))].append(one)
    return [
        (
            _with_numbers(texts, product),
            [one for numbers in sorted(those) if _is_in(numbers, product) for one in those[numbers]],
        )
        for (texts, _), those in groups.items()
        for product in _products(set(those))
    ]


def _products(rows: set[tuple[int, ...]]) -> list[tuple[frozenset[int], ...]]:
    """Return the sets of numbers, one for each column, whose products are ``rows``, all of them and nothing else."""
    if rows == {()}:
        return [()]
    rest: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for first, *more in rows:
        rest[first].add(tuple(more))
    sharing: dict[tuple[frozenset[int], ...], set[int]] = defaultdict(set)
    for first in sorted(rest):
        for product in _products(rest[first]):
            sharing[product].add(first)
    return [(frozenset(firsts), *product) for product, firsts in sharing.items()]


def _is_in(numbers: tuple[int, ...], product: tuple[frozenset[int], ...]) -> bool:
    return all(number in column for number, column in zip(numbers, product, strict=True))


def _with_numbers(texts: Sequence[str], product: tuple[frozenset[int], ...]) -> str:
    """Return the one pattern for names that differ only in their numbers: ``layers.{0..27}.mlp``."""
    spans = [_spans(sorted(column)) for column in product]
    return texts[0] + "".join(span + text for span, text in zip(spans, texts[1:], strict=True))


def _spans(numbers: list[int]) -> str:
    """Return numbers as a pattern writes them: 3, {1..26}, {0,27}."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
