"""The catalogue of formats as a table: computed from the formats themselves, not typed."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from qsurgeon.formats import CATALOG, Format
from qsurgeon.formats.fields import NONE, shown
from qsurgeon.formats.quality import SAMPLES, reached
from qsurgeon.report.tables import rendered


@dataclass(frozen=True)
class FormatRow:
    """A format, its names, and the SQNR in dB that it reaches, by what it rounds.

    largest, smallest: magnitudes, in units of the tensor scale where there is one.
    """

    names: tuple[str, ...]
    format: Format
    sqnr: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        return {
            "format": self.names[0],
            "also": list(self.names[1:]),
            "bits": self.format.bits,
            **self.format.to_dict(),
            "largest": self.format.largest,
            "smallest": self.format.smallest,
            "sqnr": self.sqnr,
        }


def format_rows() -> list[FormatRow]:
    """Return the catalogue; names of the same format share a row."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, format in CATALOG.items():
        names[format.key].append(name)
    samples = {name: sample() for name, sample in SAMPLES.items()}
    return [
        FormatRow(tuple(same), CATALOG[same[0]], {name: reached(CATALOG[same[0]], x) for name, x in samples.items()})
        for same in names.values()
    ]


def formats_text(rows: list[FormatRow]) -> str:
    """Return the rows as a table, and what its numbers mean."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("format", "element"):
        table.add_column(name)
    table.add_column("bits", justify="right")
    for name in ("block", "scale", "rule", "tensor scale"):
        table.add_column(name)
    for name in ("largest", "smallest", *(f"dB, {name}" for name in SAMPLES)):
        table.add_column(name, justify="right")
    for row in rows:
        format = row.format
        table.add_row(
            " = ".join(row.names), format.element.name, f"{format.bits:.4g}", shown(format.block),
            format.scale.name if format.scale else NONE, format.scale_rule or NONE, format.tensor_scale,
            f"{format.largest:.3g}", f"{format.smallest:.3g}", *(f"{one:.1f}" for one in row.sqnr.values()),
        )  # fmt: skip
    return (
        f"{rendered(table)}\n\n"
        "bits: per value, block scales counted. largest, smallest: magnitudes, in units of the tensor scale if any.\n"
        "dB: signal over quantization noise of a weight, Gaussian and heavy-tailed (Student's t, 4 degrees of freedom)"
        ".\n"
        "tensor scale by_role: one for a weight, one a row for an input; in Python, the format's as_weight, as_input.\n"
        "A recipe changes any field: formats: {mine: {like: mxfp4, block: 16}}; see `qsurgeon schema`."
    )
