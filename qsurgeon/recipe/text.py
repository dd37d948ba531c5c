"""YAML text to plain data, with the position of everything in it.

Only the data part of YAML is read: no tags, no merge keys, and no more nodes or levels than a recipe needs, so
that aliases cannot expand without end.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from qsurgeon.errors import Mistake, RecipeError
from qsurgeon.reading import read_regular

# Far more than a recipe needs, and read within a second or two: YAML takes its time for each value.
MOST_BYTES = 250_000
MOST_NODES = 10_000
MOST_LEVELS = 20
MOST_DIGITS = 100
EXCERPT_WIDTH = 100
Path = tuple[str | int, ...]  # of a value in a recipe: ("rules", 0, "target", 1)
# What PyYAML says where a line is indented otherwise than those around it, or lacks a sign, in words of a recipe.
_PROBLEMS = {
    "expected <block end>": "it does not line up with the lines above; keys of one section begin in the same column",
    "mapping values are not allowed": "a ':' too many, or the line above lacks its ':' or the blank behind its '-'",
    "scanning a quoted scalar": "a quotation mark is not closed",
}
_OPENED = re.compile(r"(?:^|[:,\[-])\s*\{[^{}:]*\}[\w.*]")
_RESERVED = {"%", "@", "`"}  # no plain text of YAML begins with these
TAG = "tag:yaml.org,2002:"
_VERSION = re.compile(r"""[\s{]*["']?version["']?\s*:\s*1\b""")
_CONTENT = re.compile(r"""\b(rules|extends)["']?\s*:""")


@dataclass
class Source:
    """A file's text, where each of its values and keys stands, and what is wrong with it."""

    name: str
    lines: list[str]
    values: dict[Path, yaml.Node] = field(default_factory=dict)
    keys: dict[Path, yaml.Node] = field(default_factory=dict)
    unread: set[Path] = field(default_factory=set)  # values that were reported and are None in the data
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


def read_source(file: FilePath) -> Source:
    """Return a file and its lines. Raises: RecipeError for one that is not readable UTF-8 text of a modest size."""
    try:
        text = read_regular(file, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise RecipeError([Mistake(str(file), f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([Mistake(str(file), f"is not UTF-8 text (byte {error.start})")]) from error
    return Source(str(file), text.splitlines())


def is_recipe(file: FilePath) -> bool:
    """Say whether a file that is broken was meant to be a recipe: only then may what is in it be quoted.

    A recipe may extend any file that its reader can read, and whoever wrote it need not be able to.
    """
    try:
        lines = read_source(file).lines
    except RecipeError:
        return True  # its message quotes nothing
    if not "".join(lines).strip():
        return True
    return any(map(_VERSION.match, lines)) and any(map(_CONTENT.search, lines))


def parse(source: Source) -> dict[str, Any]:
    """Return the file as plain data, noting where everything stands. Raises: RecipeError if that cannot be."""
    text = "\n".join(source.lines) + "\n"
    root: yaml.Node | None = None
    try:
        _check_extent(text, source)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        source.report(f"not YAML: {_yaml_problem(error, source)}", error.problem_mark)
    except yaml.YAMLError as error:
        source.report(f"not YAML: {str(error).splitlines()[0]}", None)
    if source.mistakes:
        raise source.error()
    if root is None or root.tag == TAG + "null":
        source.report("is empty; a recipe starts with 'version: 1'", None)
        raise source.error()
    source.values[()] = root
    if not isinstance(root, yaml.MappingNode):
        source.report(f"expected a mapping (version: 1, rules: …), got {_kind(root)}", root.start_mark, root.end_mark)
        raise source.error()
    budget = iter(range(MOST_NODES))
    data: dict[str, Any] = _plain(root, (), source, budget)
    return data


def _yaml_problem(error: yaml.MarkedYAMLError, source: Source) -> str:
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    if "undefined alias" in problem or "alias" in (error.context or ""):
        return "a pattern that begins with '*' must stand in quotes"
    if problem.endswith(("got '?'", "got '{'")):
        return f"inside [ ] a pattern with '{problem[-2]}' must stand in quotes"
    line, column = _problem_line(error, source)
    if problem.endswith("got '['") and re.search(r"\w$", line[:column]):
        return "a component's number follows a dot (layers.0), and a pattern with [ needs quotes"
    if line[column : column + 1] in _RESERVED:
        return f"text that begins with '{line[column]}' must stand in quotes"
    if line[column : column + 1] == "\t":
        return "a tab; use spaces"
    if _OPENED.search(line):
        return "a pattern that begins with '{' must stand in quotes"
    if problem.endswith("got ':'"):
        return "a [ or { before this is not closed"
    for found, meaning in _PROBLEMS.items():
        if found in f"{problem} {error.context}":
            return f"{problem}: {meaning}"
    return f"{problem} ({error.context})" if error.context else problem


def _problem_line(error: yaml.MarkedYAMLError, source: Source) -> tuple[str, int]:
    """Return the line that a problem is on, and the column in it."""
    mark = error.problem_mark
    if mark is None or mark.line >= len(source.lines):
        return "", 0
    return source.lines[mark.line], mark.column


def _check_extent(text: str, source: Source) -> None:
    """Refuse a file whose nesting would exhaust the stack, or its values our patience, before all of it is read."""
    level = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        if level > MOST_LEVELS:
            source.report(f"is nested more than {MOST_LEVELS} levels deep", event.start_mark)  # type: ignore[arg-type]  # the stubs also know a mark of C
            raise source.error()
        if values > MOST_NODES:
            source.report(f"has more than {MOST_NODES:,} values", event.start_mark)  # type: ignore[arg-type]
            raise source.error()


def _plain(node: yaml.Node, path: Path, source: Source, budget: Iterator[int]) -> Any:
    """Return ``node`` as dicts, lists and scalars; aliases are read again at each place they stand."""
    if next(budget, None) is None:
        source.report(
            f"has more than {MOST_NODES:,} values, with its aliases spelled out", source.values[()].start_mark
        )
        raise source.error()
    if len(path) > MOST_LEVELS:
        source.report(f"is nested more than {MOST_LEVELS} levels deep (an alias inside itself?)", node.start_mark)
        raise source.error()
    source.values[path] = node
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, source, budget) if _untagged(node, "map", path, source) else None
    if isinstance(node, yaml.SequenceNode):
        if not _untagged(node, "seq", path, source):
            return None
        return [_plain(item, (*path, place), source, budget) for place, item in enumerate(node.value)]
    return _scalar(node, path, source)


def _mapping(node: yaml.MappingNode, path: Path, source: Source, budget: Iterator[int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            source.report("a key must be a word", key_node.start_mark, key_node.end_mark)
        elif key in result:
            first = source.keys[(*path, key)].start_mark.line + 1
            source.report(f"key '{key}' appears twice; first on line {first}", key_node.start_mark, key_node.end_mark)
        else:
            source.keys[(*path, key)] = key_node
            result[key] = _plain(value_node, (*path, key), source, budget)
    return result


def _scalar(node: yaml.Node, path: Path, source: Source) -> Any:
    kind = node.tag.removeprefix(TAG)
    if kind in {"timestamp", "value"}:  # YAML's own guesses at plain text
        return node.value
    if not _untagged(node, ("str", "int", "float", "bool", "null"), path, source):
        return None
    try:
        if kind != "str" and len(node.value) > MOST_DIGITS:  # YAML's numbers of base 60 take the square of their length
            raise ValueError
        value = yaml.constructor.SafeConstructor().construct_object(node)
        str(value).encode()
    except (ValueError, yaml.YAMLError):
        source.unread.add(path)
        source.report(f"cannot be read as {'text' if kind == 'str' else kind}", node.start_mark, node.end_mark)
        return None
    return value


def _untagged(node: yaml.Node, kinds: str | tuple[str, ...], path: Path, source: Source) -> bool:
    """Say whether the value is of YAML's plain kinds, reporting a tag that would make it something else."""
    if node.tag.removeprefix(TAG) in ((kinds,) if isinstance(kinds, str) else kinds):
        return True
    source.unread.add(path)
    source.report(f"'{node.tag}' is not read here; write plain values", node.start_mark, node.end_mark)
    return False


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "text"
