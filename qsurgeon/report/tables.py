"""Rows as a table for people: modules that differ only in their number are one line."""

import re
from collections import defaultdict
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qsurgeon.report.rows import Report, Row

WIDTH = 200  # of a table that nobody looks at in a terminal: wide enough to cut nothing
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def report_text(report: "Report", *, fold: bool = True, width: int | None = None) -> str:
    """Return the report as a table and its totals; ``fold`` makes one line of modules that differ in a number."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("module", overflow="fold", no_wrap=True)
    table.add_column("n", justify="right")
    for name in ("kind", "shape", "weight", "input", "gradient"):
        table.add_column(name)
    table.add_column("bits", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("why", overflow="fold")
    for name, rows in _folded(report.rows) if fold else [(row.module, [row]) for row in report.rows]:
        row = rows[0]
        shape = "×".join(map(str, row.shape))
        bits = f"{row.bits:g}" if row.bits is not None else ""
        size = f"{sum(one.bytes for one in rows) / 1e6:.1f}"
        table.add_row(name, str(len(rows)), row.kind, shape, row.weight, row.input, row.gradient, bits, size, row.why)
    return f"{rendered(table, width)}\n\n{totals_text(report)}"


def totals_text(report: "Report") -> str:
    """Return the totals of a report: what is wrapped, the share of parameters per format, what nobody named."""
    shares = ", ".join(
        f"{'full precision' if name == '-' else name} {share:.1%}" for name, share in report.coverage.items()
    )
    lines = [report.summary, f"parameters: {shares}; {report.bits_per_weight:.2f} bits per weight"]
    total = sum(row.parameters for row in report.rows) or 1
    for name, rows in _folded(report.unnamed):
        share = sum(row.parameters for row in rows) / total
        lines.append(f"large, and no rule names it: {name} ({rows[0].kind}, {share:.1%} of the parameters)")
    return "\n".join(lines)


def rendered(table: Table, width: int | None = None) -> str:
    """Return a table as text, as wide as told, else as wide as it needs."""
    console = Console(file=StringIO(), width=width or WIDTH, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _folded(rows: Sequence["Row"]) -> list[tuple[str, list["Row"]]]:
    """Return (name, rows) of the modules that are alike but for the numbers in their names."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike = (row.kind, row.shape, row.weight, row.input, row.gradient, row.why, row.bits)
        groups[(_NUMBER.sub("#", row.module), *alike)].append(row)
    return [(_name_of([row.module for row in group]), group) for group in groups.values()]


def _name_of(names: list[str]) -> str:
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    spans = iter([_spans(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(spans), names[0])


def _spans(numbers: list[int]) -> str:
    """Return numbers as a pattern writes them: 3, {1..26}, {0,27}."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
