"""Tables as text."""

from io import StringIO

from rich.console import Console
from rich.table import Table

WIDTH = 200  # of a table that nobody looks at in a terminal: wide enough to cut nothing


def rendered(table: Table, width: int | None = None) -> str:
    """Return a table as text, as wide as told, else as wide as it needs."""
    console = Console(file=StringIO(), width=width or WIDTH, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
