"""Names of modules that differ only in a number, written as one pattern."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def folded(
    items: Iterable[Item], name: Callable[[Item], str], alike: Callable[[Item], object]
) -> list[tuple[str, list[Item]]]:
    """Return (name, items) of those that are alike, and whose names are but for the numbers in them."""
    groups: dict[tuple[str, object], list[Item]] = defaultdict(list)
    for one in items:
        groups[_NUMBER.sub("#", name(one)), alike(one)].append(one)
    return [(_shared_name([name(one) for one in group]), group) for group in groups.values()]


def _shared_name(names: list[str]) -> str:
    """Return the one pattern for names that differ only in their numbers: ``layers.{0..27}.mlp``."""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    spans = iter([_spans(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(spans), names[0])


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
