"""A model's rows and totals, for print, JSON, and whoever evaluates it."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from qsurgeon.layers import AS_IT_IS
from qsurgeon.recipe.fold import folded
from qsurgeon.report.tables import rendered


@dataclass(frozen=True)
class Row:
    """One module: what it is, what it computes with, and why.

    bits: of one weight value as the layer computes with it. bytes: of the parameters it holds now.
    called: by the example, where there was one to ask with. bypassed: by an adapter that computes past it.
    misread: by an adapter that takes its codes for values. when: in which phase it rounds, where not in both.
    rounds: whether it did when a live model was asked; None where there was none to ask.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    weight: str
    input: str
    gradient: str
    why: str
    parameters: int
    bits: float | None
    bytes: int
    linear: bool
    called: bool | None = None
    large: bool = False
    bypassed: bool = False
    misread: bool = False
    when: str = ""
    rounds: bool | None = None


@dataclass(frozen=True)
class Report:
    """The rows of a model, and their totals. phase: what a live model was being called for when it was asked."""

    rows: tuple[Row, ...]
    storage: str
    source: str = ""
    bytes_after: int | None = None  # what a plan will make of the bytes that the rows have now
    phase: str = ""

    @property
    def wrapped(self) -> int:
        """How many modules compute in another format."""
        return sum(row.gradient != AS_IT_IS for row in self.rows)

    @property
    def linears(self) -> int:
        """How many Linear modules there are, wrapped or not; adapters are not counted."""
        return sum(row.linear for row in self.rows)

    @property
    def parameters(self) -> int:
        """How many parameters there are; never 0, so that a share of them can be told."""
        return sum(row.parameters for row in self.rows) or 1

    @property
    def bytes(self) -> int:
        """What all parameters take now."""
        return sum(row.bytes for row in self.rows)

    @property
    def coverage(self) -> dict[str, float]:
        """The share of all parameters per weight format; ``-`` is what stays as it is."""
        totals: dict[str, int] = defaultdict(int)
        for row in self.rows:
            totals[row.weight] += row.parameters
        return {name: count / self.parameters for name, count in sorted(totals.items(), key=lambda one: -one[1])}

    @property
    def bits_per_weight(self) -> float:
        """The mean over all parameters, as the model computes with them."""
        return sum(row.parameters * (row.bits or 0) for row in self.rows) / self.parameters

    @property
    def unnamed(self) -> tuple[Row, ...]:
        """The large modules that no rule decided about, largest first."""
        return tuple(sorted((row for row in self.rows if row.large), key=lambda row: -row.parameters))

    @property
    def summary(self) -> str:
        """What the model computes with, in one line: what an evaluation should print beside its score.

        Of a live model it says too what does not round at this moment: in another phase, or inside ``disabled``.
        """
        kinds: dict[tuple[str, str, str], int] = defaultdict(int)
        for row in self.rows:
            if row.gradient != AS_IT_IS:
                kinds[row.weight, row.input, row.when] += 1
        if not kinds:
            return f"full precision: none of {self.linears} Linear modules is wrapped"
        parts = [
            f"{n} with weight {weight}, input {input_}{f', {when}' if when else ''}"
            for (weight, input_, when), n in kinds.items()
        ]
        share = sum(row.parameters for row in self.rows if row.gradient != AS_IT_IS) / self.parameters
        uncalled = sum(row.called is False for row in self.rows)
        past = sum(row.bypassed for row in self.rows)
        if past:
            parts.append(f"past {past} of them adapters compute in full precision")
        misread = sum(row.misread for row in self.rows)
        if misread:
            parts.append(f"on {misread} of them adapters take codes for values")
        if uncalled:
            parts.append(f"{uncalled} of them were never called")
        return (
            f"{self.wrapped} of {self.linears} Linear modules ({share:.1%} of the parameters) are wrapped"
            f"{self._resting}: {'; '.join(parts)}"
        )

    @property
    def _resting(self) -> str:
        """What the summary says of wrapped modules that do not round at this moment; nothing, where all do."""
        resting = [row for row in self.rows if row.rounds is False]
        if not resting:
            return ""
        count = "" if len(resting) == self.wrapped else f"{len(resting)} of them "
        by_phase = all(row.when not in ("", f"in {self.phase} only") for row in resting)
        where = f"in phase {self.phase}" if by_phase else "inside qsurgeon.disabled"
        return f", but {count}compute in full precision at this moment, {where}"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        rows = [{**vars(row), "shape": list(row.shape)} for row in self.rows]
        return {
            "source": self.source,
            "storage": self.storage,
            "phase": self.phase,
            "wrapped": self.wrapped,
            "linears": self.linears,
            "coverage": self.coverage,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "bytes_after": self.bytes_after,
            "unnamed": [row.module for row in self.unnamed],
            "modules": rows,
        }

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return report_text(self, fold=True)


def report_text(report: Report, *, fold: bool = True, width: int | None = None) -> str:
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


def totals_text(report: Report) -> str:
    """Return the totals of a report: what is wrapped, the share of parameters per format, what nobody named."""
    shares = ", ".join(
        f"{'full precision' if name == '-' else name} {share:.1%}" for name, share in report.coverage.items()
    )
    lines = [report.summary, f"parameters: {shares}; {report.bits_per_weight:.2f} bits per weight"]
    size = f"size: {_megabytes(report.bytes)}"
    if report.bytes_after not in (None, report.bytes):
        size += f" now, {_megabytes(report.bytes_after)} with {report.storage} weights"
    lines.append(size)
    for name, rows in _folded(report.unnamed):
        share = sum(row.parameters for row in rows) / report.parameters
        lines.append(f"large, and stays as it is: {name} ({rows[0].kind}, {share:.1%} of the parameters)")
    return "\n".join(lines)


def _megabytes(count: int | None) -> str:
    return f"{(count or 0) / 1e6:,.1f} MB"


def _folded(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return folded(
        rows,
        lambda row: row.module,
        lambda row: (row.kind, row.shape, row.weight, row.input, row.gradient, row.why, row.bits),
    )
