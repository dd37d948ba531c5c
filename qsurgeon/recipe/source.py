"""Files to recipes: one run reports every mistake in a file, with file, line, column and a caret."""

import json
import os
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from qsurgeon.arguments import check_name
from qsurgeon.errors import FormatError, Mistake, RecipeError, nearest
from qsurgeon.formats import CATALOG, Format, check_operands
from qsurgeon.recipe.find import find_recipe
from qsurgeon.recipe.foreign import foreign
from qsurgeon.recipe.noise import NoiseSection, Tier
from qsurgeon.recipe.schema import FormatSpec, Recipe, Rule, make_format
from qsurgeon.recipe.select import in_yaml
from qsurgeon.recipe.text import Path, Source, is_recipe, parse, read_source
from qsurgeon.recipe.translate import several
from qsurgeon.recipe.words import unknown_format, unknown_key

MOST_BASES = 20

_EXPECTED = {
    "string_type": "text",
    "float_type": "a number",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
}


def load_recipe(name: str | FilePath) -> Recipe:
    """Return the recipe in a file, or the shipped one of that name, with what it extends merged in.

    Raises: RecipeError with every mistake in the file.
    """
    check_name(name)
    return _load(find_recipe(name), ())


def _load(file: FilePath, chain: tuple[FilePath, ...]) -> Recipe:
    """Return the recipe in ``file``; ``chain`` are the files that extend it, in turn."""
    source = read_source(file)
    raw = parse(source)
    other = foreign(raw)
    if other is not None:
        raise RecipeError([Mistake(source.name, *other)])
    base = _base(raw, file, source, chain)
    recipe, formats = _validate(raw, source, base)
    recipe._marks = {path: source.locate(node.start_mark, node.end_mark) for path, node in source.values.items()}
    recipe._text = "\n".join(source.lines) + "\n"
    return recipe if base is None else _merged(recipe, base, formats)


def _base(raw: dict[str, Any], file: FilePath, source: Source, chain: tuple[FilePath, ...]) -> Recipe | None:
    """Return the recipe that ``raw`` extends, if any, noting what is wrong with it among the file's mistakes."""
    name = raw.get("extends")
    if not isinstance(name, str):
        return None
    chain = (*chain, file.resolve())
    if len(chain) > MOST_BASES:
        source.report_at(("extends",), f"more than {MOST_BASES} recipes extend each other")
        return None
    try:
        base = find_recipe(name, beside=file.parent)
    except RecipeError as error:
        source.report_at(("extends",), _without_neighbors(error.mistakes[0].message, file.parent, name))
        return None
    if base.resolve() in chain:
        source.report_at(("extends",), f"'{name}' extends this recipe in turn")
        return None
    try:
        return _load(base, chain)
    except RecipeError as error:
        if not is_recipe(base):
            source.report_at(
                ("extends",), f"'{name}' is not a recipe: it has no 'version: 1' with 'rules' or 'extends'"
            )
            return None
        source.mistakes += [(len(source.lines), place, one) for place, one in enumerate(error.mistakes)]
        return None


def _without_neighbors(message: str, folder: FilePath, name: str) -> str:
    """Return ``message`` without its hint if ``name`` leads out of ``folder``: a recipe may not ask what lies there."""
    around = os.path.abspath(folder)  # noqa: PTH100  # links are not followed
    inside = FilePath(os.path.normpath(os.path.join(around, name))).is_relative_to(around)  # noqa: PTH118
    return message if inside else message.partition("; ")[0]


def _merged(recipe: Recipe, base: Recipe, formats: dict[str, Format]) -> Recipe:
    """Return ``recipe`` with the rules of ``base`` after its own; what it does not set, ``base`` does.

    ``formats`` are those that the names of both mean. They are spelled out, because what one was made from may
    have another meaning by now.
    """
    fields = {name: getattr(base, name) for name in base.model_fields_set}
    fields |= {name: getattr(recipe, name) for name in recipe.model_fields_set}
    like = next(iter(CATALOG))
    fields["formats"] = {
        name: FormatSpec.model_validate({"like": like, **one.to_dict()}) for name, one in formats.items()
    }
    fields["rules"] = recipe.rules + base.rules
    fields["extends"] = None
    merged = Recipe.model_construct(**fields)
    shifted = {_shifted(path, len(recipe.rules)): mark for path, mark in base._marks.items()}
    merged._marks = {**shifted, **recipe._marks}
    return merged


def _shifted(path: Path, by: int) -> Path:
    match path:
        case ("rules", int(place), *rest):
            return ("rules", place + by, *rest)
    return path


def _validate(raw: dict[str, Any], source: Source, base: Recipe | None) -> tuple[Recipe, dict[str, Format]]:
    """Return the recipe, and what the format names that it and ``base`` define mean."""
    try:
        # Through JSON, where a list is a tuple and nothing else is taken for something it is not.
        recipe = Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        guesses = _explain(error, raw, source)
        _check_formats(raw, source, base, unsure=("formats",) in guesses)
        raise source.error() from error
    formats = _check_formats(raw, source, base)
    taken = {rule.name for rule in base.rules if rule.name is not None} if base else set()
    for place, rule in enumerate(recipe.rules):
        if rule.name in taken:
            source.report_at(("rules", place, "name"), f"the recipe it extends has a rule '{rule.name}', too")
    if source.mistakes:
        raise source.error()
    return recipe, formats


def _explain(error: ValidationError, raw: dict[str, Any], source: Source) -> set[Path]:
    """Note each of pydantic's findings in our words; return the keys that unknown ones were guessed to be."""
    details = error.errors()
    guesses: set[Path] = set()
    for one in details:
        if one["type"] == "extra_forbidden":
            path: Path = one["loc"]
            known = set(_section(path[:-1]).model_fields) - set(_at(raw, path[:-1]))
            word = str(path[-1])
            message, meant = unknown_key(word, known)
            guesses |= {(*path[:-1], key) for key in meant}
            source.report_at(path, message, key=True)
    places = [one["loc"] for one in details]
    for one in details:
        path, kind = one["loc"], one["type"]
        beneath = any(len(place) > len(path) and place[: len(path)] == path for place in places)
        if kind == "extra_forbidden" or path in guesses or path in source.unread:
            continue
        if kind == "missing":
            source.report_at(path[:-1], f"key '{path[-1]}' is missing")
        elif kind == "value_error":
            if not any(place[: len(path)] == path for place in source.unread):
                source.report_at(path, str(one["ctx"]["error"]))
        elif not (kind == "too_short" and beneath):  # a list whose items are all wrong is not empty
            source.report_at(path, _finding(kind, path, one))
    return guesses


def _finding(kind: str, path: Path, one: Any) -> str:
    name = next((str(step) for step in reversed(path) if isinstance(step, str)), "recipe")
    got = one["input"]
    if kind in _EXPECTED:
        what = "the name of a format" if name in {"weight", "input", "like"} else _EXPECTED[kind]
        return f"'{name}' expects {what}, got {_shown(got)}{_as_list(name, got) if kind == 'tuple_type' else ''}"
    if kind == "literal_error":
        words = one["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"'{name}' cannot be {_shown(got)}; {nearest(str(got), words)}"
    if kind in {"too_short", "string_too_short"}:
        return f"'{name}' must not be empty"
    if kind == "greater_than_equal":
        return f"'{name}' must be at least {one['ctx']['ge']}, got {got}"
    return f"'{name}': {one['msg']}"


def _as_list(name: str, got: Any) -> str:
    """Return the end of a message: how what stands there is written as a list."""
    if name == "rules" and isinstance(got, dict):
        return "; begin each rule with '- '"
    if name not in {"target", "exclude"} or not isinstance(got, str):
        return ""
    return f"; write [{', '.join(map(in_yaml, several(got) or [got]))}]"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


def _section(path: Path) -> type[BaseModel]:
    sections: dict[str | int, type[BaseModel]] = {"rules": Rule, "formats": FormatSpec, "noise": NoiseSection}
    if path[:2] == ("noise", "tiers"):
        return Tier
    return sections.get(path[0], Recipe) if path else Recipe


def _at(raw: Any, path: Path) -> Any:
    for step in path:
        raw = raw[step]
    return raw


def _check_formats(
    raw: dict[str, Any], source: Source, base: Recipe | None, *, unsure: bool = False
) -> dict[str, Format]:
    """Return what the format names that are defined mean, noting those that cannot be and those nobody defines.

    ``unsure``: the key that would define them is misspelt, so that uses of theirs are no mistakes.
    """
    made: dict[str, Format] = dict(base.own_formats) if base else {}
    broken: set[str] = set()
    specs = raw.get("formats")
    for name, spec in specs.items() if isinstance(specs, dict) else ():
        try:
            made[name] = make_format(name, FormatSpec.model_validate(spec), made)
        except ValidationError:  # noted already
            broken.add(name)
        except FormatError as error:
            broken.add(name)
            if spec["like"] not in broken - {name}:
                source.report_at(("formats", name), str(error))
    known = {*CATALOG, *made, *broken}
    rules = raw.get("rules")
    for place, rule in enumerate(rules if isinstance(rules, list) else ()):
        if not isinstance(rule, dict):
            continue
        names = {role: rule.get(role) for role in ("weight", "input")}
        for role, name in names.items():
            if isinstance(name, str) and name not in known and not unsure and not _lost_base(raw, base):
                source.report_at(("rules", place, role), unknown_format(name, known))
        weight, input = ({**CATALOG, **made}.get(str(name)) for name in names.values())
        try:
            check_operands(weight, input)
        except FormatError as error:
            source.report_at(("rules", place, "input"), str(error))
    return made


def _lost_base(raw: dict[str, Any], base: Recipe | None) -> bool:
    return raw.get("extends") is not None and base is None
