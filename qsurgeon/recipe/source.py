"""YAML to Recipe: every mistake of a file in one run, with file, line, column and a caret.

Only the data part of YAML is read: no tags, no merge keys, and no more nodes or levels than a recipe needs, so
that aliases cannot expand without end.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qsurgeon.errors import FormatError, Mistake, RecipeError, nearest
from qsurgeon.formats import CATALOG, Format
from qsurgeon.recipe.schema import FormatSpec, Path, Recipe, Rule, make_format

MOST_BYTES = 1_000_000
MOST_NODES = 100_000
MOST_LEVELS = 20
EXCERPT_WIDTH = 100

_PACKAGE = FilePath(__file__).parents[1]
# In a wheel the recipes lie inside the package, in a checkout beside it.
SHIPPED = next(folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir())

_EXPECTED = {
    "string_type": "text",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
}


@dataclass
class Source:
    """A file's text, where each of its values and keys stands, and what is wrong with it."""

    name: str
    lines: list[str]
    values: dict[Path, yaml.Node] = field(default_factory=dict)
    keys: dict[Path, yaml.Node] = field(default_factory=dict)
    mistakes: list[tuple[int, int, Mistake]] = field(default_factory=list)

    def report(self, message: str, start: yaml.Mark | None, end: yaml.Mark | None = None) -> None:
        """Note a mistake at ``start``; without a place it is about the file as a whole."""
        line, column = (start.line, start.column) if start else (0, 0)
        where, excerpt = self.locate(start, end)
        self.mistakes.append((line, column, Mistake(where, message, excerpt)))

    def report_at(self, path: Path, message: str, *, key: bool = False) -> None:
        """Note a mistake of the value (or the key) at ``path``, or of the nearest section around it."""
        nodes = self.keys if key else self.values
        while path and path not in nodes:
            path = path[:-1]
        node = nodes.get(path) or self.values[()]
        self.report(message, node.start_mark, node.end_mark)

    def locate(self, start: yaml.Mark | None, end: yaml.Mark | None = None) -> tuple[str, str]:
        """Return ``file:line:column``, and the line with carets under what stands there."""
        if start is None:
            return self.name, ""
        line = self.lines[start.line] if start.line < len(self.lines) else ""
        stop = end.column if end and end.line == start.line else len(line)
        left = max(0, start.column - EXCERPT_WIDTH // 2)
        shown = line[left : left + EXCERPT_WIDTH].replace("\t", " ")
        carets = "^" * max(1, min(stop - start.column, left + len(shown) - start.column))
        excerpt = f"    {shown}\n    {' ' * (start.column - left)}{carets}" if shown.strip() else ""
        return f"{self.name}:{start.line + 1}:{start.column + 1}", excerpt

    def error(self) -> RecipeError:
        """Return all that was noted, in the order of the file."""
        return RecipeError([mistake for _, _, mistake in sorted(self.mistakes, key=lambda one: one[:2])])


def shipped_recipes() -> dict[str, FilePath]:
    """Return the recipes that come with qsurgeon by name: ``w4a4-mxfp4``, ``e13/e13h-mxfp4-w4a4``."""
    return {str(file.relative_to(SHIPPED).with_suffix("")): file for file in sorted(SHIPPED.rglob("*.yaml"))}


def find_recipe(name: str | FilePath, beside: FilePath | None = None) -> FilePath:
    """Return the file that ``name`` means: a path (from the folder ``beside``), else a shipped recipe.

    Raises: RecipeError with the nearest name if there is neither.
    """
    path = FilePath(name) if beside is None else beside / name
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        raise RecipeError([Mistake(str(path), "is a folder; expected a recipe file")])
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        near = [str(file) for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = f"; {nearest(str(path), near)}" if near else ""
        raise RecipeError([Mistake(str(path), f"no such file{hint}")])
    raise RecipeError([Mistake("", f"no recipe '{name}'; {nearest(str(name), shipped)}")])


def load_recipe(name: str | FilePath) -> Recipe:
    """Return the recipe in a file, or the shipped one of that name, with what it extends merged in.

    Raises: RecipeError with every mistake in the file.
    """
    return _load(find_recipe(name), ())


def _load(file: FilePath, chain: tuple[FilePath, ...]) -> Recipe:
    """Return the recipe in ``file``; ``chain`` are the files that extend it, in turn."""
    source = _read(file)
    raw = _parse(source)
    base = _base(raw, file, source, chain)
    recipe = _validate(raw, source, base)
    recipe._marks = {path: source.locate(node.start_mark, node.end_mark) for path, node in source.values.items()}
    recipe._text = "\n".join(source.lines) + "\n"
    return recipe if base is None else _merged(recipe, base)


def _base(raw: dict[str, Any], file: FilePath, source: Source, chain: tuple[FilePath, ...]) -> Recipe | None:
    """Return the recipe that ``raw`` extends, if any, noting what is wrong with it among the file's mistakes."""
    name = raw.get("extends")
    if not isinstance(name, str):
        return None
    chain = (*chain, file.resolve())
    try:
        base = find_recipe(name, beside=file.parent)
    except RecipeError as error:
        source.report_at(("extends",), error.mistakes[0].message)
        return None
    if base.resolve() in chain:
        source.report_at(("extends",), f"'{name}' extends this recipe in turn")
        return None
    try:
        return _load(base, chain)
    except RecipeError as error:
        source.mistakes += [(len(source.lines), place, one) for place, one in enumerate(error.mistakes)]
        return None


def _merged(recipe: Recipe, base: Recipe) -> Recipe:
    """Return ``recipe`` with the rules of ``base`` after its own; what it does not set, ``base`` does."""
    fields = {name: getattr(base, name) for name in base.model_fields_set}
    fields |= {name: getattr(recipe, name) for name in recipe.model_fields_set}
    fields["formats"] = {**base.formats, **recipe.formats}
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


def _read(file: FilePath) -> Source:
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError([Mistake(str(file), f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([Mistake(str(file), f"is not UTF-8 text (byte {error.start})")]) from error
    if len(data) > MOST_BYTES:
        raise RecipeError([Mistake(str(file), f"has {len(data):,} bytes; a recipe has at most {MOST_BYTES:,}")])
    return Source(str(file), text.splitlines())


def _parse(source: Source) -> dict[str, Any]:
    """Return the file as plain data, noting where everything stands. Raises: RecipeError if that cannot be."""
    text = "\n".join(source.lines) + "\n"
    root: yaml.Node | None = None
    try:
        _check_levels(text, source)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        source.report(f"not YAML: {_yaml_problem(error)}", error.problem_mark)
    except yaml.YAMLError as error:
        source.report(f"not YAML: {str(error).splitlines()[0]}", None)
    if source.mistakes:
        raise source.error()
    if root is None:
        source.report("is empty; a recipe starts with 'version: 1'", None)
        raise source.error()
    source.values[()] = root
    if not isinstance(root, yaml.MappingNode):
        source.report(f"expected a mapping (version: 1, rules: …), got {_kind(root)}", root.start_mark, root.end_mark)
        raise source.error()
    budget = iter(range(MOST_NODES))
    data: dict[str, Any] = _plain(root, (), source, budget)
    return data


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    if problem.endswith(("got '?'", "got '{'")):
        return f"inside [ ] a pattern with '{problem[-2]}' must stand in quotes"
    return f"{problem} ({error.context})" if error.context else problem


def _check_levels(text: str, source: Source) -> None:
    """Refuse a file whose nesting would exhaust the stack, before anything recursive reads it."""
    level = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if level > MOST_LEVELS:
            source.report(f"is nested more than {MOST_LEVELS} levels deep", event.start_mark)  # type: ignore[arg-type]  # the stubs also know a mark of C
            raise source.error()


def _plain(node: yaml.Node, path: Path, source: Source, budget: Iterator[int]) -> Any:
    """Return ``node`` as dicts, lists and scalars; aliases are read again at each place they stand."""
    if next(budget, None) is None:
        source.report(f"aliases expand to more than {MOST_NODES:,} values", source.values[()].start_mark)
        raise source.error()
    if len(path) > MOST_LEVELS:
        source.report(f"is nested more than {MOST_LEVELS} levels deep (an alias inside itself?)", node.start_mark)
        raise source.error()
    source.values[path] = node
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, source, budget)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, place), source, budget) for place, item in enumerate(node.value)]
    return _scalar(node, source)


def _mapping(node: yaml.MappingNode, path: Path, source: Source, budget: Iterator[int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            source.report("a key must be a word", key_node.start_mark, key_node.end_mark)
        elif key in result:
            first = source.keys[(*path, key)].start_mark.line + 1
            source.report(f"key '{key}' stands twice; first on line {first}", key_node.start_mark, key_node.end_mark)
        else:
            source.keys[(*path, key)] = key_node
            result[key] = _plain(value_node, (*path, key), source, budget)
    return result


def _scalar(node: yaml.Node, source: Source) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in {"str", "int", "float", "bool", "null"}:
        if kind in {"timestamp", "value"}:  # YAML's own guesses at plain text
            return node.value
        source.report(f"'{node.tag}' is not read here; write plain values", node.start_mark, node.end_mark)
        return None
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, yaml.YAMLError):
        source.report(f"cannot be read as {kind}", node.start_mark, node.end_mark)
        return None


def _validate(raw: dict[str, Any], source: Source, base: Recipe | None) -> Recipe:
    try:
        # Through JSON, where a list is a tuple and nothing else is taken for something it is not.
        recipe = Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        _explain(error, raw, source)
        _check_formats(raw, source, base)
        raise source.error() from error
    _check_formats(raw, source, base)
    if source.mistakes:
        raise source.error()
    return recipe


def _explain(error: ValidationError, raw: dict[str, Any], source: Source) -> None:
    """Note each of pydantic's findings in our words; a missing key that is the guess for an unknown one, once."""
    guesses: set[Path] = set()
    details = error.errors()
    for one in details:
        if one["type"] == "extra_forbidden":
            path: Path = one["loc"]
            known = set(_section(path[:-1]).model_fields) - set(_at(raw, path[:-1]))
            word = str(path[-1])
            close = difflib.get_close_matches(word, known, n=1)
            guesses |= {(*path[:-1], guess) for guess in close}
            source.report_at(path, f"unknown key '{word}'; {nearest(word, known)}", key=True)
    for one in details:
        path = one["loc"]
        kind = one["type"]
        if kind == "extra_forbidden" or path in guesses:
            continue
        if kind == "missing":
            source.report_at(path[:-1], f"key '{path[-1]}' is missing")
        elif kind == "value_error":
            # A rule whose weight is misspelt should hear of that, and of nothing else.
            if not any(guess[:-1] == path for guess in guesses):
                source.report_at(path, str(one["ctx"]["error"]))
        else:
            source.report_at(path, _finding(kind, path, one))


def _finding(kind: str, path: Path, one: Any) -> str:
    name = next((str(step) for step in reversed(path) if isinstance(step, str)), "recipe")
    got = one["input"]
    if kind in _EXPECTED:
        return f"'{name}' expects {_EXPECTED[kind]}, got {_shown(got)}"
    if kind == "literal_error":
        words = one["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"'{name}' cannot be {_shown(got)}; {nearest(str(got), words)}"
    if kind in {"too_short", "string_too_short"}:
        return f"'{name}' must not be empty"
    if kind == "greater_than_equal":
        return f"'{name}' must be at least {one['ctx']['ge']}, got {got}"
    return f"'{name}': {one['msg']}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "text"


def _section(path: Path) -> type[BaseModel]:
    sections: dict[str | int, type[BaseModel]] = {"rules": Rule, "formats": FormatSpec}
    return sections.get(path[0], Recipe) if path else Recipe


def _at(raw: Any, path: Path) -> Any:
    for step in path:
        raw = raw[step]
    return raw


def _check_formats(raw: dict[str, Any], source: Source, base: Recipe | None) -> None:
    """Note format names that mean nothing and formats whose fields do not combine, wherever they can be read."""
    made: dict[str, Format] = dict(base.own_formats) if base else {}
    specs = raw.get("formats")
    specs = specs if isinstance(specs, dict) else {}
    for name, spec in specs.items():
        try:
            made[name] = make_format(name, FormatSpec.model_validate(spec), made)
        except ValidationError:
            continue  # noted already
        except FormatError as error:
            if not (set(specs) - set(made)) & {spec["like"]}:  # else its base is noted already
                source.report_at(("formats", name), str(error))
    if raw.get("extends") is not None and base is None:
        return  # what the extended recipe would have named is not known
    known = {*CATALOG, *made, *specs}
    rules = raw.get("rules")
    for place, rule in enumerate(rules if isinstance(rules, list) else ()):
        for role in ("weight", "input"):
            name = rule.get(role) if isinstance(rule, dict) else None
            if isinstance(name, str) and name not in known:
                source.report_at(("rules", place, role), f"no format '{name}'; {nearest(name, known)}")
