"""The page of a plan, or of what ``inspect`` found."""

from typing import TYPE_CHECKING

from qsurgeon.report.html.page import Field, Page
from qsurgeon.report.html.plots import Value, format_map, heat_map

if TYPE_CHECKING:
    from qsurgeon.report.rows import Report


def report_page(report: "Report", totals: str) -> Page:
    """Return the page of a report; ``totals``: what its text says below its table."""
    rows = [row for row in report.rows if row.type]
    formats = [
        Value(row.module, row.weight if row.weight == row.input else f"{row.weight}/{row.input}") for row in rows
    ]
    bits = [Value(row.module, row.bits) for row in rows]
    charts = [
        format_map("Formats", "What each module computes with: weight/input, where they differ.", formats),
        heat_map("Bits", "Bits per value of each weight.", bits, unit="bits", low_is_bad=True),
    ]
    table = [
        Field("module", [row.module for row in report.rows]),
        Field("kind", [row.kind for row in report.rows]),
        Field("shape", ["x".join(map(str, row.shape)) for row in report.rows]),
        Field("weight", [row.weight for row in report.rows]),
        Field("input", [row.input for row in report.rows]),
        Field("bits", [row.bits for row in report.rows], ".4g"),
        Field("MB", [row.bytes / 1e6 for row in report.rows], ".2f"),
        Field("why", [row.why for row in report.rows]),
    ]
    title = report.source or "Model"
    return Page(title, totals.splitlines(), [chart for chart in charts if chart is not None], table)
