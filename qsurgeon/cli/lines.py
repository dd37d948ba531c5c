"""Checks of a command line before it is parsed: habits of other tools, wrong order, repeated options.

Each answer is one message with the whole line as it should be. Knows our commands and options from what parses them;
a line without such a mistake is left alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsurgeon.cli.habits import ADAPTER, ELSEWHERE, RECIPE, SAID_OF_VERBS, VERBS
from qsurgeon.cli.typed import DASHES, Line, Verb, meant, plain, read, verb_of
from qsurgeon.errors import UsageError, guess
from qsurgeon.places import CONFIG, is_id, quoted, unquoted
from qsurgeon.recipe import shipped_recipes
from qsurgeon.recipe.find import SUFFIXES

HELP = {"-h", "--help"}
_PROGRAM = "run"  # what stands behind it is another program's
ROLES = {
    "plan": "recipe",
    "apply": "recipe",
    "inspect": "model",
    "merge": "adapter",
    "export": "folder",
    "import": "folder",
    "recipes": "name",
    "formats": "name",
}
_ARGUMENTS = {"recipe": RECIPE, "adapter": ADAPTER, "model": "--model"}
_ORDER = ("--model", "--revision", "--output")  # in which a line is offered


def check(words: Sequence[str], group: Any) -> None:
    """Do nothing for a line that can be parsed, or is wrong in a way of its own.

    ``group``: the command that has ours, as click knows it. Raises: UsageError that says what the line should be.
    """
    verbs = {name: verb_of(name, command) for name, command in group.commands.items()}
    known = {name for option in group.params for name in option.opts} | HELP
    before = [*_leading(words)]
    rest = list(words[len(before) :])
    if any(word.partition("=")[0] in known for word in before) or not words:
        return
    if before:
        raise UsageError(_before(before, rest, verbs))
    if rest[0] not in verbs:
        raise UsageError(_unknown(rest[0], rest[1:], verbs))
    if rest[0] == _PROGRAM or HELP & set(rest):
        return
    _check_line(read(rest[1:], verbs[rest[0]]), verbs)


def _leading(words: Sequence[str]) -> Iterator[str]:
    """Yield the words before the command: options, and what may be their values."""
    for word in words:
        if not (word.startswith("-") or word[:1] in DASHES) or not word:
            return
        yield word


# --- what is wrong with a line


def _check_line(line: Line, verbs: Mapping[str, Verb]) -> None:
    if line.strange:
        raise UsageError(_strange(line, verbs))
    if line.words == ("help",):
        raise UsageError(f"help is printed by: qsurgeon {line.verb.name} --help")
    if line.verb.options.keys() & set(line.words):
        raise UsageError("words after '--' are not options: remove the '--'")
    names = [name for name, _ in line.options]
    for name, takes in line.verb.options.values():
        values = [value for one, value in line.options if one == name and value is not None]
        if takes and names.count(name) > 1:
            raise UsageError(f"{name} is given twice ({', '.join(values)}); give it once")
    alone = len(line.words) == 1 and line.value("--model") is None
    misplaced = alone and ROLES.get(line.verb.name) == "recipe" and kind(line.words[0]) == "model"
    if len(line.words) > line.verb.arguments or misplaced:
        raise UsageError(_extra(line))


def kind(word: str) -> str:
    """Return what a word names: a model, a recipe, or nothing that is known."""
    if not word.strip():
        return ""
    path = Path(word)
    bare = word.casefold().replace("\\", "/")
    stem = re.sub(r"\.(yaml|yml|json)$", "", bare).removeprefix("recipes/")
    if stem in shipped_recipes():
        return "recipe"
    if path.is_dir() or path.name == CONFIG or "://" in word:
        return "model"
    if bare.endswith(SUFFIXES) or path.is_file():
        return "recipe"
    return "model" if is_id(word) and not path.parent.is_dir() else ""


def _extra(line: Line) -> str:
    """Return what to say of a line whose words are not what the command takes."""
    name, words = line.verb.name, line.words
    if ROLES.get(name) == "recipe":
        return _extra_of_recipe(line)
    if ROLES.get(name) in {"adapter", "folder"}:
        return f"{name} takes one {ROLES[name]}, and all else by options; say: {shown(arrange(line))}"
    if not line.verb.arguments:
        listed = " ".join(words)
        hint = f"; a recipe is checked by: qsurgeon plan {quoted(words[0])} --model MODEL" if name == "schema" else ""
        return f"{name} takes no argument, and got {listed}{hint}"
    named = [word for word in words if kind(word) == "recipe"]
    if name == "recipes" and len(named) == 1:
        return f"{name} takes one name; say: qsurgeon {name} {quoted(named[0])}"
    say = "; then ".join(f"qsurgeon {name} {quoted(word)}" for word in words[:2])
    more = ", and so on" if len(words) > 2 else ""
    return f"{name} takes one {ROLES.get(name, 'argument')}, and got {len(words)}: say {say}{more}"


def _extra_of_recipe(line: Line) -> str:
    """Return what to say of words at ``plan`` and ``apply``, which take a recipe and name all else by options."""
    name, kinds = line.verb.name, [kind(word) for word in line.words]
    recipes = [word for word, one in zip(line.words, kinds, strict=True) if one == "recipe"]
    if len(recipes) > 1:
        rest = " ".join(_said(line.options))
        lines = "; then ".join(f"qsurgeon {name} {quoted(one)} {rest}".rstrip() for one in recipes[:2])
        return f"one recipe at a time, and here are {len(recipes)}: say {lines}{', and so on' if recipes[2:] else ''}"
    models = [word for word, one in zip(line.words, kinds, strict=True) if one == "model"]
    given = line.value("--model")
    if models and given and len(recipes) == 1 and len(line.words) > 1 and (len(models) > 1 or name == "plan"):
        return f"one model at a time, and here are {', '.join([given, *models][:3])}{' …' if models[2:] else ''}"
    arranged = arrange(line)
    if arranged.words == (RECIPE,):
        what = "a model" if models else "no recipe"
        return (
            f"{line.words[0]} is {what}, where {name} takes a recipe; say: {shown(arranged)} "
            "(`qsurgeon recipes` lists the shipped ones)"
        )
    if len(arranged.words) > 1:
        return f"{name} takes one recipe, and '{arranged.words[1]}' is one word too many"
    return f"{name} takes one recipe, and all else by options; say: {shown(arranged)}"


def arrange(line: Line) -> Line:
    """Return the line with each word where it belongs: the recipe first, model and output behind their options."""
    words = [unquoted(word) for word in line.words]
    kinds = {word: kind(word) for word in words}
    first = None if ROLES.get(line.verb.name) == "recipe" else next(iter(words), None)
    recipe = first or next((word for word in words if kinds[word] == "recipe"), None)
    recipe = recipe or next((word for word in words if kinds[word] != "model"), None)
    if recipe is not None:
        words.remove(recipe)
    options = list(line.options)
    for option in ("--model", "--output"):
        if words and option in line.verb.options and line.value(option) is None:
            likely = next((word for word in words if kinds[word] == "model"), words[0])
            taken = likely if option == "--model" else words[0]
            words.remove(taken)
            options.append((option, taken))
    return replace(line, words=(recipe or RECIPE, *words), options=tuple(options), strange=())


def shown(line: Line) -> str:
    """Return a line as it is typed."""
    words = [one if one == RECIPE else quoted(one) for one in line.words]
    return " ".join(["qsurgeon", line.verb.name, *words, *_said(line.options)])


def _said(options: Sequence[tuple[str, str | None]]) -> Iterator[str]:
    place = {name: at for at, name in enumerate(_ORDER)}
    for name, value in sorted(dict(options).items(), key=lambda one: place.get(one[0], len(place))):
        yield name if value is None else f"{name} {quoted(value)}"


# --- options that the command has not


def _strange(line: Line, verbs: Mapping[str, Verb]) -> str:
    """Return what to say of the first option that the command has not, with the line as it should be."""
    name = line.strange[0][0]
    means, habit = meant(name, line.verb)
    start = f"No such option: {name}."
    elsewhere = ELSEWHERE.get((line.verb.name, _first_name(name, verbs) or means or name))
    output = quoted(line.value("--output") or "FOLDER")
    if elsewhere is not None:
        return f"{start} {_sentence(elsewhere.format(verb=line.verb.name, typed=name, output=output))}"
    if habit is not None and habit.verb == "plan" and line.verb.name == "apply":
        plan = verbs["plan"]
        placed = arrange(line)
        kept = tuple(one for one in placed.options if one[0] in plan.options)
        return f"{start} To see what would be done is a command: {shown(Line(plan, placed.words[:1], kept))}"
    if line.strange[0][1] is not None and line.strange[0][1].casefold() == "json" and "--json" in line.verb.options:
        as_json = replace(line, options=(*line.options, ("--json", None)), strange=line.strange[1:])
        return f"{start} Did you mean --json? {shown(as_json)}"
    if habit is not None and habit.says:
        return f"{start} {_sentence(habit.says.format(verb=line.verb.name, typed=name, output=output))}"
    better = _repaired(line)
    if better is not None:
        return f"{start} {better}"
    has = [one for one, verb in verbs.items() if name in verb.options]
    if has:
        return f"{start} {line.verb.name} does not have it, but: {', '.join(has)}"
    return f"{start} `qsurgeon {line.verb.name} --help` lists the options of {line.verb.name}"


def _first_name(name: str, verbs: Mapping[str, Verb]) -> str | None:
    return next((verb.options[name][0] for verb in verbs.values() if name in verb.options), None)


def _repaired(line: Line) -> str | None:
    """Return the whole line with each strange option as the one of ours that it means, or None if one means none."""
    mended = [_mended(line, name, value) for name, value in line.strange]
    role = ROLES.get(line.verb.name)
    if None in mended:
        return None
    repaired = _with(line, mended)
    argument = mended[0] is not None and mended[0][0] is None
    if role == "recipe":
        recipes = [word for word in repaired.words if kind(word) == "recipe"]
        if len(recipes) > 1:
            return f"The recipe is an argument, and one: {' or '.join(recipes)}"
        repaired = arrange(repaired)
    if argument:
        return f"The {role} is an argument, and no option; say: {shown(repaired)}"
    return f"Did you mean {mended[0][0] if mended[0] else ''}? {shown(repaired)}"


Mended = tuple[str | None, str | None]  # one of our options and its value, or None and an argument


def _mended(line: Line, name: str, value: str | None) -> Mended | None:
    """Return what a strange option is here, or None if it is nothing."""
    means, role = meant(name, line.verb)[0], ROLES.get(line.verb.name)
    if role is not None and means == _ARGUMENTS.get(role):
        return None, value or role.upper()
    if means not in line.verb.options:
        return None
    own, takes = line.verb.options[means]
    return own, (value or own.strip("-").upper()) if takes else None


def _with(line: Line, mended: Sequence[Mended | None]) -> Line:
    """Return the line with what its strange options are, those that are nothing left out."""
    found = [one for one in mended if one is not None]
    words = tuple(value for name, value in found if name is None and value is not None)
    options = tuple((name, value) for name, value in found if name is not None)
    return replace(line, words=(*words, *line.words), options=(*line.options, *options), strange=())


# --- the command itself


def _before(before: Sequence[str], rest: Sequence[str], verbs: Mapping[str, Verb]) -> str:
    """Return what to say of options before the command."""
    name = before[0].partition("=")[0]
    found = next((place for place, word in enumerate(rest) if word in verbs), None)
    if found is not None:
        words = [*before, *rest[:found], *rest[found + 1 :]]
        line = read(words, verbs[rest[found]])
        if line.strange and name not in line.verb.options:
            return _strange(line, verbs)
        return f"{name} comes before the command, which must be first; type: {_line(words, line.verb)}"
    if name in {"-V", "-v", "-version"}:
        return f"No such option: {name}. {_sentence(SAID_OF_VERBS['version'])}"
    verb = verbs.get(VERBS.get(plain(name), plain(name)))
    if verb is not None:
        return f"No such option: {name}. {verb.name} is a command: {_example(verb, rest)}"
    listed = ", ".join(verbs)
    return f"No such option: {name}. A command comes first: {listed}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _line(words: Sequence[str], verb: Verb) -> str:
    line = read(words, verb)
    if line.strange or ROLES.get(verb.name) != "recipe":
        return " ".join(["qsurgeon", verb.name, *map(quoted, words)])
    return shown(arrange(line))


def _unknown(word: str, rest: Sequence[str], verbs: Mapping[str, Verb]) -> str:
    """Return what to say of a word that is no command."""
    start, bare = f"No such command '{word}'.", word.strip().casefold().replace("_", "-")
    if bare == "help" and rest and rest[0] in verbs:
        return f"{start} Help is printed by: qsurgeon {rest[0]} --help"
    if next(iter(word.split()), "") in verbs:
        said = " ".join([word.strip(), *map(quoted, rest)])
        return f"{start} Its words stand in one pair of quotes; say: qsurgeon {said}"
    if bare in SAID_OF_VERBS:
        return f"{start} {_sentence(SAID_OF_VERBS[bare].format(verb=bare))}"
    if bare in VERBS:
        verb = verbs[VERBS[bare]]
        return f"{start} {verb.name} does that: {_example(verb, rest)}"
    found = next((place for place, one in enumerate(rest) if one in verbs), None)
    if found is not None:
        words = [word, *rest[:found], *rest[found + 1 :]]
        return f"{start} The command comes first; say: {_line(words, verbs[rest[found]])}"
    what = kind(word)
    if what and bare not in verbs:
        verb = verbs["plan" if what == "recipe" or rest else "inspect"]
        return f"{start} It is a {what}; a command comes first: {_example(verb, [word, *rest])}"
    near = guess(bare, verbs)
    return f"{start} Did you mean '{near}'?" if near else f"{start} There are: {', '.join(verbs)}"


def _example(verb: Verb, rest: Sequence[str]) -> str:
    """Return a line of ``verb`` with what of ``rest`` can be used, and words in capitals for what it needs besides."""
    if ROLES.get(verb.name) in {"model", "adapter", "folder"}:
        words = [word for word in rest if not word.startswith("-")][:1]
        output = {
            "merge": " --output FOLDER",
            "export": " --to KIND --output FOLDER",
            "import": " --output FOLDER",
        }.get(verb.name, "")
        return f"qsurgeon {verb.name} {quoted(words[0]) if words else str(ROLES[verb.name]).upper()}{output}"
    if verb.name not in {"plan", "apply"}:
        return f"qsurgeon {verb.name}" + (" -- COMMAND ARGS..." if verb.name == _PROGRAM else "")
    line = read(rest, verb)
    line = arrange(_with(line, [_mended(line, name, value) for name, value in line.strange]))
    needed = ("--model", "--output") if verb.name == "apply" else ("--model",)
    for option in needed:
        if line.value(option) is None:
            line = replace(line, options=(*line.options, (option, "FOLDER" if option == "--output" else "MODEL")))
    return shown(line)
