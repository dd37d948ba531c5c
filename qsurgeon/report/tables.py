"""Tables as text: complete in a file or a pipe, and no wider than the terminal."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from qsurgeon.visible import one_line

GAP = 2  # spaces between two columns
LEAST = 20  # cells of a terminal that the first column gets, whatever stands beside it
_PIECE = re.compile(r"[^.,/]*[.,/]?")  # after these a name is broken


@dataclass(frozen=True)
class Column:
    """A column: its head and its cells, a line of printable text each; ``right`` is for numbers."""

    head: str
    cells: Sequence[str]
    right: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(map(one_line, self.cells)))

    @property
    def width(self) -> int:
        """How wide it is if nothing in it is broken."""
        return max(map(cell_len, (self.head, *self.cells)))

    def padded(self, text: str, width: int) -> str:
        """Return ``text`` with the spaces that put it into its place."""
        spaces = " " * (width - cell_len(text))
        return spaces + text if self.right else text + spaces


def natural_width(columns: Sequence[Column]) -> int:
    """Return how wide a table of ``columns`` is if nothing in it is broken."""
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def table_text(columns: Sequence[Column], width: int | None = None) -> str:
    """Return ``columns`` as a table. With a ``width`` names in the first one are broken, at dots, so that it fits."""
    first, *rest = columns
    room = first.width
    if width is not None:
        room = min(room, max(LEAST, width - natural_width(rest) - GAP))
    widths = [room, *(column.width for column in rest)]
    lines = []
    for cells in zip(*((column.head, *column.cells) for column in columns), strict=True):
        name, *more = _broken(cells[0], room)
        row = zip(columns, (name, *cells[1:]), widths, strict=True)
        lines.append((" " * GAP).join(column.padded(text, size) for column, text, size in row).rstrip())
        lines.extend(more)
    return "\n".join(lines)


def narrowed(columns: Sequence[Column], width: int | None, leave_out: Sequence[str]) -> tuple[list[Column], list[str]]:
    """Return the columns that fit into ``width``, and the heads of those that do not.

    ``leave_out``: what is left out, one after the other, until the rest fits.
    """
    kept, gone = list(columns), []
    for head in leave_out:
        if width is None or natural_width(kept) <= width:
            break
        fewer = [column for column in kept if column.head != head]
        if len(fewer) < len(kept):
            gone.append(head)
        kept = fewer
    return kept, gone


def left_out(heads: Sequence[str]) -> str:
    """Return the line that says which columns a terminal is too narrow for."""
    return f"not shown at this width: {', '.join(heads)}; a wider terminal, a file or a pipe gets them"


def wrapped(text: str, width: int | None) -> str:
    """Return ``text`` with lines broken between words where they are wider than ``width``."""
    if width is None:
        return text
    options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, max(width, LEAST), **options) for line in text.split("\n"))  # type: ignore[arg-type]


def _broken(name: str, width: int) -> list[str]:
    """Return the lines of a name that is to be no wider than ``width``; all but the first are indented."""
    lines, line = [], ""
    for piece in _PIECE.findall(name):
        while piece:
            if cell_len(line + piece) <= width:
                line, piece = line + piece, ""
            elif line.strip():
                lines.append(line)
                line = "  "
            else:  # one piece is wider than the column
                fits = max(1, width - len(line))
                lines.append(line + piece[:fits])
                line, piece = "  ", piece[fits:]
    return [*lines, line] if line.strip() or not lines else lines
