"""Markdown around text from other sources, escaped so that names and recipes cannot break out of it."""

import re
from collections.abc import Iterable, Sequence

from qsurgeon.visible import one_line, visible

_SPECIAL = re.compile(r"[\\`*\[\]<>&|]")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;"}
_COMMENT = re.compile(r"<!(?=-)|-(?=->)")
RIGHT = {"n", "bits"}  # columns of numbers


def inline(text: str) -> str:
    """Return ``text`` as it reads in a line of Markdown: no HTML, no link, no emphasis of its own."""
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), one_line(text))


def code(text: str) -> str:
    """Return ``text`` as code in a line, between more backticks than any run in it has."""
    shown = _no_comment(one_line(text))
    if "|" in shown and "\\" in shown:
        return inline(text)  # readers disagree in which of the two backslashes before a bar in a table is whose
    ticks = "`" * (_longest_run(shown) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def fenced(text: str, language: str) -> list[str]:
    """Return the lines of a block of code; nothing in ``text`` ends it, nor the marked part of a card that it is in."""
    shown = _no_comment(visible(text.rstrip()))
    fence = "`" * max(3, _longest_run(shown) + 1)
    return [f"{fence}{language}", shown, fence]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; its cells are Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---:" if name in RIGHT else "---" for name in head]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *cells)]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _no_comment(text: str) -> str:
    """Return ``text`` with a blank in each beginning and end of an HTML comment: no reader takes it for one."""
    return _COMMENT.sub(lambda found: f"{found[0]} ", text)
