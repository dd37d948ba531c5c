"""The pattern language: which modules a dotted glob matches. A pure function of names.

A pattern is a dotted run of component globs. It names a module when it equals consecutive whole components
anywhere in the module's full name, and with it everything beneath: ``layers.1`` is never ``layers.10``, ``gate`` is
never ``gate_proj``, and ``lm_head`` finds ``language_model.lm_head``.

A role in angle brackets, ``<output_head>``, names what plays that role in the model, whatever it is called there. The
model knows which modules these are, and whoever makes a Namespace tells it.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qsurgeon.errors import nearest
from qsurgeon.recipe.translate import from_regex, is_negated, is_regex, several, variants

_COMPONENT = re.compile(r"(?:[^.{}]|\{[^{}]*\})+")  # dots inside braces belong to a range
_WORD = re.compile(r"[\w*-]+")
# Python refuses to read a number of thousands of digits, and no model has so many modules.
_INTEGER = re.compile(r"-?\d{1,9}")
_RANGE = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})")
_MOST_NUMBERS = 10_000
_ROLE = re.compile(r"<([^<>]*)>")
OUTPUT_HEAD = "output_head"
ROLES = {OUTPUT_HEAD: "what computes the model's outputs from its last hidden states"}
_LEFT = "what a rule should skip belongs in its 'exclude'"
_MOST_TRANSLATED = 200  # characters of a text that is no pattern


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
    """A parsed pattern: for each component, the ways it may read; or the role that it names, and no component."""

    text: str
    components: tuple[Component, ...]
    optional: bool
    role: str | None = None


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """Return the pattern that ``text`` spells.

    Raises: ValueError that says what is wrong with it.
    """
    body = text.removesuffix("?")
    if not body:
        raise ValueError(f"bad pattern '{text}': it is empty")
    try:
        return _parsed(text, body)
    except ValueError as error:
        raise ValueError(f"bad pattern '{text}': {_complained(text, str(error))}") from error


def _parsed(text: str, body: str) -> Pattern:
    if body.startswith("re:") or re.search(r"[\\^$()|+\[\]]", body):
        raise ValueError("patterns are globs, not regular expressions; '*', '**' and '{a,b}' are known")
    if "<" in body or ">" in body:
        return Pattern(text, (), text.endswith("?"), _role(body))
    parts = _COMPONENT.findall(body)
    if ".".join(parts) != body:
        raise ValueError(_complaint(body))
    # Any number and any number again is any number; to try each pair of them would take a model's time many times over.
    before = [None, *parts]
    parts = [part for part, one in zip(parts, before, strict=False) if not part == one == ANY_DEPTH.text]
    return Pattern(text, tuple(_component(part) for part in parts), optional=text.endswith("?"))


def _complained(text: str, complaint: str) -> str:
    """Return what is wrong with a text that is no pattern, and what to write instead, if that can be told."""
    if len(text) > _MOST_TRANSLATED:
        return complaint
    parts = several(text)
    if parts and all(map(is_pattern, parts)):
        return f"{complaint}; write a list: [{', '.join(map(in_yaml, parts))}]"
    if is_negated(text):
        return f"{complaint}; {_LEFT}"
    if is_regex(text):
        return f"patterns are globs, not regular expressions; {_from_regex(text)}"
    better = next((one for one in variants(text) if one != text and is_pattern(one)), None)
    return f"{complaint}; did you mean '{better}'?" if better else complaint


def _from_regex(text: str) -> str:
    """Return the end of a message: what to write for a regular expression."""
    found = from_regex(text)
    if found is None or not all(map(is_pattern, found)):
        return "'*', '**' and '{a,b}' are known"
    wide, whole = found
    also = "" if wide == whole else f", or '{whole}' if that is the whole name"
    every = ", which names every module" if wide == ANY_DEPTH.text else ""
    return f"write '{wide}'{also}{every}"


def is_pattern(text: str) -> bool:
    """Say whether ``text`` is a pattern."""
    body = text.removesuffix("?")
    try:
        return bool(body and _parsed(text, body))
    except ValueError:
        return False


def in_yaml(text: str) -> str:
    """Return a pattern as an item of a list in YAML: in quotes, where YAML would read it otherwise."""
    return text if text.replace("_", "").replace(".", "").isalnum() else f"'{text}'"


def check_pattern(text: str) -> str:
    """Return ``text`` if it is a pattern. Raises: ValueError as ``parse_pattern``."""
    return parse_pattern(text).text


def _role(body: str) -> str:
    known = {f"<{name}>": name for name in ROLES}
    if _ROLE.search(body) and not _ROLE.fullmatch(body):
        raise ValueError(f"a role such as <{OUTPUT_HEAD}> must be alone, without other components")
    if body not in known:
        raise ValueError(f"angle brackets hold a role; {nearest(body, known)}")
    return known[body]


def _complaint(body: str) -> str:
    if body.count("{") != body.count("}"):
        return "a brace is not closed" if body.count("{") > body.count("}") else "a brace is not opened"
    return "braces cannot be nested" if re.search(r"\{[^}]*\{", body) else "a component is empty"


def _component(part: str) -> Component:
    if part == ANY_DEPTH.text:
        return (ANY_DEPTH,)
    if whole := re.fullmatch(r"\{([^{}]*)\}", part):
        items = [item.strip() for item in whole[1].split(",")]
        return tuple(_span(item) or Alternative(_word(item)) for item in items)
    return tuple(Alternative(_word(word)) for word in _spelled_out(part))


def _spelled_out(part: str) -> list[str]:
    """Return the words that the braces inside a component stand for: ``{q,k}_proj`` is two."""
    before, brace, rest = part.partition("{")
    if not brace:
        return [part]
    inside, _, after = rest.partition("}")
    tails = _spelled_out(after)
    words = [word for item in inside.split(",") for word in _numbers(item.strip())]
    if len(words) * len(tails) > _MOST_NUMBERS:
        raise ValueError(f"'{part}' stands for more than {_MOST_NUMBERS} words")
    return [before + word + tail for word in words for tail in tails]


def _numbers(item: str) -> list[str]:
    span = _span(item)
    if span is None:
        return [item]
    if span.first < 0 or span.last < 0:
        raise ValueError(f"{item} counts from the end, which only a whole component can")
    return [str(number) for number in range(span.first, span.last + 1)]


def _span(item: str) -> Span | None:
    ends = _RANGE.fullmatch(item)
    if ends is None:
        return None
    first, last = int(ends[1]), int(ends[2])
    if (first < 0) == (last < 0) and first > last:
        raise ValueError(f"the range {item} is empty; did you mean {last}..{first}?")
    if last - first >= _MOST_NUMBERS:
        raise ValueError(f"the range {item} has more than {_MOST_NUMBERS} numbers")
    return Span(first, last)


def _word(word: str) -> str:
    if not _WORD.fullmatch(word):
        raise ValueError(f"'{word}' is not a name, a number or a glob" if word else "a component is empty")
    if ANY_DEPTH.text in word:
        raise ValueError("'**' must be a component of its own")
    return word


@dataclass(frozen=True)
class Match:
    """What a pattern names: modules, and the alternatives of its braces that name nothing."""

    names: frozenset[str]
    unused: tuple[str, ...]


class Namespace:
    """The module names of one model, to select from; ``roles`` says which of them play which role."""

    def __init__(self, names: Sequence[str], roles: Mapping[str, Iterable[str]] | None = None) -> None:
        self.names = tuple(names)
        self._roles = {role: frozenset(those) for role, those in (roles or {}).items()}
        self._split = [tuple(name.split(".")) for name in self.names]
        self._sizes: dict[tuple[str, ...], int] = defaultdict(int)
        for parts in self._split:
            for place, part in enumerate(parts):
                if part.isdecimal():
                    parent = parts[:place]
                    self._sizes[parent] = max(self._sizes[parent], int(part) + 1)

    def match(self, pattern: Pattern) -> Match:
        """Return the modules ``pattern`` names, in no order, and which of its alternatives name none."""
        if pattern.role is not None:
            return Match(self._roles.get(pattern.role, frozenset()), ())
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
        if pattern.role is not None:
            return f"the model says of no module that it is {ROLES[pattern.role]}"
        known = {part for parts in self._split for part in parts if not part.isdecimal()}
        better = self._better(pattern.text, known)
        if better is not None:
            return better
        for component in pattern.components:
            for way in component:
                strange = isinstance(way, Alternative) and way.number is None and way != ANY_DEPTH
                if strange and not any(way.accepts(part, 0) for part in known):
                    return nearest(way.text, known)
        length = len(pattern.components)
        runs = {".".join(parts[at : at + length]) for parts in self._split for at in range(len(parts) - length + 1)}
        close = difflib.get_close_matches(pattern.text, runs, n=3)
        return f"nearest: {', '.join(close)}" if close else f"no module has {length} such names in a row"

    def _better(self, text: str, known: set[str]) -> str | None:
        """Return the end of a message that offers what ``text`` may mean, if that is a pattern that names something."""
        if is_negated(text):
            return _LEFT
        for one in dict.fromkeys(variants(text[:_MOST_TRANSLATED])):
            parts = _COMPONENT.findall(one)
            strange = bool(parts) and _WORD.fullmatch(parts[0]) is not None and parts[0].strip("*") not in known
            for at in range(len(parts) if strange else 1):  # what another program puts before the plain model's names
                tried = ".".join(parts[at:])
                if tried == text or not is_pattern(tried) or (at and "." not in one):
                    continue
                match = self.match(parse_pattern(tried))
                if match.names and not match.unused:
                    every = " It names every module" if tried == ANY_DEPTH.text else ""
                    return f"did you mean '{tried}'?{every}"
        return None


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
