"""Tables as text."""

from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qsurgeon.visible import one_line

WIDTH = 200  # of a table that nobody looks at in a terminal: wide enough to cut nothing


class Rows(Table):
    """A table whose cells are plain text: names that others chose, which are no markup and take one line."""

    def add_row(self, *cells: object, **options: Any) -> None:
        """Add a row, escaping what is not printable."""
        super().add_row(*(Text(one_line(str(cell))) for cell in cells), **options)


def rendered(table: Table, width: int | None = None) -> str:
    """Return a table as text, as wide as told, else as wide as it needs."""
    console = Console(file=StringIO(), width=width or WIDTH, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
