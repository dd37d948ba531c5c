"""The catalog of formats as a table, computed from the formats themselves."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from qsurgeon.formats import CATALOG, Format
from qsurgeon.formats.fields import NONE, shown
from qsurgeon.formats.quality import SAMPLES, reached
from qsurgeon.report.tables import Column, left_out, narrowed, table_text, wrapped


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


def formats_text(rows: list[FormatRow], width: int | None = None) -> str:
    """Return the rows as a table, no wider than ``width`` if it can be, and what its numbers mean."""
    formats = [row.format for row in rows]
    columns = [
        Column("format", [" = ".join(row.names) for row in rows]),
        Column("element", [one.element.name for one in formats]),
        Column("bits", [f"{one.bits:.4g}" for one in formats], right=True),
        Column("block", [shown(one.block) for one in formats]),
        Column("scale", [one.scale.name if one.scale else NONE for one in formats]),
        Column("rule", [one.scale_rule or NONE for one in formats]),
        Column("tensor scale", [one.tensor_scale for one in formats]),
        Column("largest", [f"{one.largest:.3g}" for one in formats], right=True),
        Column("smallest", [f"{one.smallest:.3g}" for one in formats], right=True),
        *(Column(f"dB, {name}", [f"{row.sqnr[name]:.1f}" for row in rows], right=True) for name in SAMPLES),
    ]
    columns, gone = narrowed(columns, width, ("smallest", "largest", "tensor scale", "rule", "scale"))
    notes = [left_out(gone), ""] if gone else []
    notes += [
        "bits: per value, block scales counted. largest, smallest: magnitudes, in units of the tensor scale if any.",
        "dB: signal over quantization noise of a weight, Gaussian and heavy-tailed (Student's t, 4 degrees of "
        "freedom).",
        "tensor scale by_role: one for a weight, one a row for an input; in Python, the format's as_weight, as_input.",
        "A recipe changes any field: formats: {mine: {like: mxfp4, block: 16}}; see `qsurgeon schema`.",
    ]
    return f"{table_text(columns, width)}\n\n{wrapped(chr(10).join(notes), width)}"
