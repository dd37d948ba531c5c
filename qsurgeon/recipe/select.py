"""The pattern language: which modules a dotted glob names. A pure function of names.

A pattern is a dotted run of component globs. It names a module when it equals consecutive whole components
anywhere in the module's full name, and with it everything beneath: ``layers.1`` is never ``layers.10``, ``gate`` is
never ``gate_proj``, and ``lm_head`` finds ``language_model.lm_head``.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qsurgeon.errors import nearest

_COMPONENT = re.compile(r"(?:[^.{}]|\{[^{}]*\})+")  # dots inside braces belong to a range
_WORD = re.compile(r"[\w*-]+")
# Python refuses to read a number of thousands of digits, and no model has so many modules.
_INTEGER = re.compile(r"-?\d{1,9}")
_RANGE = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})")
_MOST_NUMBERS = 10_000


@dataclass(frozen=True)
class Alternative:
    """One way a component may read: a glob, or a whole number that may count from the end."""

    text: str

    @cached_property
    def number(self) -> int | None:
        """The number it is, if it is one."""
        return int(self.text) if _INTEGER.fullmatch(self.text) else None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(".*".join(map(re.escape, self.text.split("*"))))

    def accepts(self, component: str, size: int) -> bool:
        """Say whether it names ``component``, one of ``size`` numbered siblings."""
        if self.number is None:
            return self._regex.fullmatch(component) is not None
        return component == str(self.number + size if self.number < 0 else self.number)


@dataclass(frozen=True)
class Span:
    """A range of numbers, both ends included; a negative end counts from the end of the container."""

    first: int
    last: int

    @property
    def text(self) -> str:
        """The range as it was written."""
        return f"{self.first}..{self.last}"

    def accepts(self, component: str, size: int) -> bool:
        """Say whether ``component``, one of ``size`` numbered siblings, is in the range."""
        first, last = (end + size if end < 0 else end for end in (self.first, self.last))
        return component.isdecimal() and first <= int(component) <= last

    def missing(self, seen: Iterable[str]) -> list[str]:
        """Return the numbers the range spells out that are not among ``seen``, as far as it can be told."""
        if self.first < 0 or self.last < 0:
            return [] if any(seen) else [self.text]
        present = set(seen)
        return [str(number) for number in range(self.first, self.last + 1) if str(number) not in present]


Component = tuple[Alternative | Span, ...]
ANY_DEPTH = Alternative("**")


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: for each component, the ways it may read."""

    text: str
    components: tuple[Component, ...]
    optional: bool


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """Return the pattern that ``text`` spells.

    Raises: ValueError that says what is wrong with it.
    """
    body = text.removesuffix("?")
    if not body:
        raise ValueError(f"bad pattern '{text}': it is empty")
    if body.startswith("re:") or re.search(r"[\\^$()|+\[\]]", body):
        raise ValueError(
            f"bad pattern '{text}': patterns are globs, not regular expressions; '*', '**' and '{{a,b}}' are known"
        )
    parts = _COMPONENT.findall(body)
    if ".".join(parts) != body:
        raise ValueError(f"bad pattern '{text}': {_complaint(body)}")
    # Any number and any number again is any number; to try each pair of them would take a model's time many times over.
    before = [None, *parts]
    parts = [part for part, one in zip(parts, before, strict=False) if not part == one == ANY_DEPTH.text]
    return Pattern(text, tuple(_component(part, text) for part in parts), optional=text.endswith("?"))


def check_pattern(text: str) -> str:
    """Return ``text`` if it is a pattern. Raises: ValueError as ``parse_pattern``."""
    return parse_pattern(text).text


def _complaint(body: str) -> str:
    if body.count("{") != body.count("}"):
        return "a brace is not closed" if body.count("{") > body.count("}") else "a brace is not opened"
    return "braces cannot be nested" if re.search(r"\{[^}]*\{", body) else "a component is empty"


def _component(part: str, text: str) -> Component:
    if part == ANY_DEPTH.text:
        return (ANY_DEPTH,)
    if whole := re.fullmatch(r"\{([^{}]*)\}", part):
        items = [item.strip() for item in whole[1].split(",")]
        return tuple(_span(item, text) or Alternative(_word(item, text)) for item in items)
    return tuple(Alternative(_word(word, text)) for word in _spelled_out(part, text))


def _spelled_out(part: str, text: str) -> list[str]:
    """Return the words that the braces inside a component stand for: ``{q,k}_proj`` is two."""
    before, brace, rest = part.partition("{")
    if not brace:
        return [part]
    inside, _, after = rest.partition("}")
    tails = _spelled_out(after, text)
    words = [word for item in inside.split(",") for word in _numbers(item.strip(), text)]
    if len(words) * len(tails) > _MOST_NUMBERS:
        raise ValueError(f"bad pattern '{text}': '{part}' stands for more than {_MOST_NUMBERS} words")
    return [before + word + tail for word in words for tail in tails]


def _numbers(item: str, text: str) -> list[str]:
    span = _span(item, text)
    if span is None:
        return [item]
    if span.first < 0 or span.last < 0:
        raise ValueError(f"bad pattern '{text}': {item} counts from the end, which only a whole component can")
    return [str(number) for number in range(span.first, span.last + 1)]


def _span(item: str, text: str) -> Span | None:
    ends = _RANGE.fullmatch(item)
    if ends is None:
        return None
    first, last = int(ends[1]), int(ends[2])
    if (first < 0) == (last < 0) and first > last:
        raise ValueError(f"bad pattern '{text}': the range {item} is empty; did you mean {last}..{first}?")
    if last - first >= _MOST_NUMBERS:
        raise ValueError(f"bad pattern '{text}': the range {item} has more than {_MOST_NUMBERS} numbers")
    return Span(first, last)


def _word(word: str, text: str) -> str:
    if not _WORD.fullmatch(word):
        raise ValueError(
            f"bad pattern '{text}': '{word}' is not a name, a number or a glob"
            if word
            else f"bad pattern '{text}': a component is empty"
        )
    if ANY_DEPTH.text in word:
        raise ValueError(f"bad pattern '{text}': '**' must be a component of its own")
    return word


@dataclass(frozen=True)
class Match:
    """What a pattern names: modules, and the alternatives of its braces that name nothing."""

    names: frozenset[str]
    unused: tuple[str, ...]


class Namespace:
    """The module names of one model, to select from."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._split = [tuple(name.split(".")) for name in self.names]
        self._sizes: dict[tuple[str, ...], int] = defaultdict(int)
        for parts in self._split:
            for place, part in enumerate(parts):
                if part.isdecimal():
                    parent = parts[:place]
                    self._sizes[parent] = max(self._sizes[parent], int(part) + 1)

    def match(self, pattern: Pattern) -> Match:
        """Return the modules ``pattern`` names, in no order, and which of its alternatives name none."""
        found: set[str] = set()
        used: list[set[tuple[Alternative | Span, str]]] = [set() for _ in pattern.components]
        for name, parts in zip(self.names, self._split, strict=True):
            for start in range(len(parts)):
                steps = self._run(parts, start, pattern.components, 0)
                if steps is None:
                    continue
                found.add(name)
                for place, way, component in steps:
                    used[place].add((way, component))
        return Match(frozenset(found), tuple(_unused(pattern, used)))

    def _run(
        self, parts: tuple[str, ...], at: int, components: Sequence[Component], place: int
    ) -> list[tuple[int, Alternative | Span, str]] | None:
        """Return how ``components`` from ``place`` on read ``parts`` from ``at`` on, or None if they do not."""
        if place == len(components):
            return []
        if components[place] == (ANY_DEPTH,):
            tries = [self._run(parts, end, components, place + 1) for end in range(at, len(parts) + 1)]
            found = [steps for steps in tries if steps is not None]
            return [step for steps in found for step in steps] if found else None
        if at == len(parts):
            return None
        size = self._sizes.get(parts[:at], 0)
        here = [(place, way, parts[at]) for way in components[place] if way.accepts(parts[at], size)]
        rest = self._run(parts, at + 1, components, place + 1) if here else None
        return None if rest is None else here + rest

    def hint(self, pattern: Pattern) -> str:
        """Return the end of a message on a pattern that names nothing: the nearest names there are."""
        known = {part for parts in self._split for part in parts if not part.isdecimal()}
        for component in pattern.components:
            for way in component:
                strange = isinstance(way, Alternative) and way.number is None and way != ANY_DEPTH
                if strange and not any(way.accepts(part, 0) for part in known):
                    return nearest(way.text, known)
        length = len(pattern.components)
        runs = {".".join(parts[at : at + length]) for parts in self._split for at in range(len(parts) - length + 1)}
        close = difflib.get_close_matches(pattern.text, runs, n=3)
        return f"nearest: {', '.join(close)}" if close else f"no module has {length} such names in a row"


def _unused(pattern: Pattern, used: Sequence[set[tuple[Alternative | Span, str]]]) -> Iterable[str]:
    for component, seen in zip(pattern.components, used, strict=True):
        if len(component) == 1 and isinstance(component[0], Alternative):
            continue
        for way in component:
            read_as = {part for one, part in seen if one == way}
            if isinstance(way, Span):
                yield from way.missing(read_as)
            elif not read_as:
                yield way.text
