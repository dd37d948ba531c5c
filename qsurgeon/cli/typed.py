"""A command line as it was typed: the command, its words, its options, and those that do not exist."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qsurgeon.cli.habits import OPTIONS, Habit
from qsurgeon.errors import UsageError, guess

DASHES = "–—−"  # what a word processor makes of two hyphens


@dataclass(frozen=True)
class Verb:
    """A command of ours: its options by each of their names, each with its first name and whether it has a value."""

    name: str
    arguments: int
    options: Mapping[str, tuple[str, bool]]


@dataclass(frozen=True)
class Line:
    """What stands behind a command: words, options with their values, and options that the command has not."""

    verb: Verb
    words: tuple[str, ...] = ()
    options: tuple[tuple[str, str | None], ...] = ()
    strange: tuple[tuple[str, str | None], ...] = field(default=())

    def value(self, name: str) -> str | None:
        """Return the value of an option, if it is there."""
        return next((value for one, value in self.options if one == name), None)


def verb_of(name: str, command: Any) -> Verb:
    """Return a command as click has it."""
    options = [one for one in command.params if one.param_type_name == "option"]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    names = {name: (option.opts[0], not option.is_flag) for option in options for name in option.opts}
    return Verb(name, len(arguments), names)


def read(words: Sequence[str], verb: Verb) -> Line:
    """Return what stands behind a command, in its order."""
    line = Line(verb)
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return replace(line, words=(*line.words, *rest))
        line = _option(line, word, rest) if _is_option(word, verb) else replace(line, words=(*line.words, word))
    return line


def _is_option(word: str, verb: Verb) -> bool:
    if len(word) > 1 and (word.startswith("-") or word[0] in DASHES):
        return True
    key, equals, _ = word.partition("=")  # as other programs have it: model=FOLDER
    return bool(equals) and not Path(word).exists() and f"--{plain(key)}" in {*verb.options, "--recipe", "--output"}


def _option(line: Line, word: str, rest: list[str]) -> Line:
    """Return the line with the option ``word``; its value is taken from ``rest``."""
    name, equals, value = word.partition("=")
    found = line.verb.options.get(name)
    if found is None and word[:2] in line.verb.options and not meant(name, line.verb)[0]:  # -mFOLDER
        found, value = line.verb.options[word[:2]], word[2:]
        equals = value
    if found is not None:
        own, takes = found
        said = value if equals else _next(own, rest, line.verb) if takes else None
        return replace(line, options=(*line.options, (own, said)))
    takes = not equals and bool(rest) and not _is_option(rest[0], line.verb) and _takes(name, line.verb)
    return replace(line, strange=(*line.strange, (name, value if equals else rest.pop(0) if takes else None)))


def _next(own: str, rest: list[str], verb: Verb) -> str:
    if rest and rest[0].partition("=")[0] in verb.options:
        raise UsageError(f"{own} needs a value but is followed by {rest[0]}")
    if not rest:
        raise UsageError(f"{own} needs a value")
    return rest.pop(0)


def _takes(name: str, verb: Verb) -> bool:
    """Say whether an option that the command has not is followed by its value."""
    means, habit = meant(name, verb)
    if habit is not None:
        return habit.value
    return verb.options[means][1] if means in verb.options else False


def plain(name: str) -> str:
    """Return an option's name without its dashes, lower case, with ``-`` for ``_``."""
    return re.sub(rf"^[-{DASHES}]+", "", name).replace("_", "-").casefold()


def meant(name: str, verb: Verb) -> tuple[str, Habit | None]:
    """Return the option of ours that ``name`` probably is, or none, and the habit that it comes from."""
    bare = plain(name)
    if f"--{bare}" in verb.options:
        return f"--{bare}", None
    habit = OPTIONS.get(bare)
    if habit is not None and len(bare) == 1 and not name.startswith(f"-{bare}"):
        habit = None  # -C is not -c
    if habit is not None:
        return habit.means, habit
    near = guess(f"--{bare}", (one for one in verb.options if one.startswith("--"))) if len(bare) > 2 else None
    return near or "", None
