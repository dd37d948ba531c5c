"""The result of a scan as tables, as JSON, and in a notebook."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsurgeon.checkpoint import Events
from qsurgeon.recipe import Recipe
from qsurgeon.report.html.plots import png
from qsurgeon.report.html.scanned import charts_of, scan_page
from qsurgeon.report.tables import Column, left_out, narrowed, table_text, wrapped
from qsurgeon.scanning import (
    CAUSES,
    OPERANDS,
    RECIPE,
    Row,
    Scan,
    Suggestion,
    Sums,
    cost,
    suggest_bits,
    suggest_exclude,
    total,
)
from qsurgeon.scanning import scan as run
from qsurgeon.scanning.data import LENGTH, SAMPLES
from qsurgeon.scanning.result import ALONE, WITHOUT
from qsurgeon.scanning.running import Options
from qsurgeon.surgery.fold import folded
from qsurgeon.visible import one_line

MOST_WORST = 5  # modules that the summary names
# What is left out first in a narrow terminal.
_LEAVE_OUT = (
    "grid",
    "amax p50",
    "amax p99",
    "kurtosis",
    "‖e‖/‖x‖",
    "deadzone",
    "clipping",
    "scale",
    "clipped",
)
_NOTES = (
    "dB: signal over quantization noise. worst: of a single module. |e|/|x|: its mean, about 21 % for MXFP4 of "
    "Gaussian values. zeroed: values that become zero. clipped: blocks with a value beyond their largest. amax: of "
    "blocks, over the root mean square. scale, clipping, deadzone, grid: the share of the squared error by its cause.",
    "gaussian: what the format does to normally distributed values. Nothing is wrong with a layer that is like it.",
)


@dataclass(frozen=True)
class ScanReport:
    """What ``qsurgeon.scan`` returns: ``scan``, with all of its numbers, and ways to show it."""

    scan: Scan

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        return self.scan.to_dict()

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return self.scan.to_json()

    def to_html(self) -> str:
        """Return all of it as one HTML file. Raises: UsageError where vl-convert-python is not installed."""
        return scan_page(self.scan, _summary(self.scan)).to_html()

    def to_png(self) -> bytes:
        """Return the charts as a picture. Raises: as ``to_html``."""
        return png(charts_of(self.scan))

    def suggest(self, bits: float) -> Suggestion:
        """Return a recipe whose weights have ``bits`` bits per value on average; see ``scanning.suggest_bits``."""
        return suggest_bits(self.scan, bits)

    def suggest_exclude(self, count: int) -> Suggestion:
        """Return the recipe without the ``count`` modules that cost most; see ``scanning.suggest_exclude``."""
        return suggest_exclude(self.scan, count)

    def _repr_html_(self) -> str:
        return scan_page(self.scan, _summary(self.scan)).to_notebook()

    def __str__(self) -> str:
        return scan_text(self.scan)


def scan(
    recipe: Recipe | str | Path,
    model: Any,
    *,
    data: str | Path | Iterable[Mapping[str, Any]] | None = None,
    text: str | Path | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    tokenizer: Any = None,
    formats: Sequence[str] = (),
    srdd: bool = False,
    output: str | Path | None = None,
    events: Events | None = None,
    workers: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ScanReport:
    """Measure what the formats of ``recipe`` do to each module that it wraps; nothing is changed.

    Without data, weights are measured as they are stored, slab by slab: SQNR, relative errors, zeroed and clipped
    values, kurtosis and block maxima, each beside what the format does to Gaussian values, and the squared error by its
    cause. With data the model is run, in float32: the same is measured of each module's real input, and the error of
    its output with weight, input and both rounded; and how far the model's answer moves when that module alone is
    rounded, and when it alone is not.

    ``model``: a live model, a folder or a hub id. ``data``: a JSON Lines file, or batches (each is what the model is
    called with, and ``labels``); ``text``: a file of text. Of a file ``samples`` are taken, of ``length`` tokens at
    most. ``tokenizer``: of a live model. ``formats``: names of others, which are measured in the place of the recipe's.
    ``srdd``: also do the scan of SRDD, to compare. ``output``: a file for the result, as JSON; an interrupted scan goes
    on from what is beside it.

    Raises: RecipeError, PlanError, CheckpointError, FormatError; SurgeryError for a live model that is wrapped;
    CalibrationError for data that cannot be used.
    """
    options = Options(
        data, text, samples, length, tokenizer, formats, srdd, output, workers, revision, trust_remote_code
    )
    return ScanReport(run(recipe, model, options, events))


def scan_text(found: Scan, *, fold: bool = True, width: int | None = None) -> str:
    """Return a scan as tables and a summary; ``fold`` makes one line of modules that differ in a number."""
    parts = [
        _effects_text(found, fold, width),
        _operand_text(found, "weight", lambda row: row.weight, fold, width),
        _operand_text(found, "input", lambda row: row.input, fold, width),
    ]
    parts.append(wrapped("\n".join(map(one_line, [*_summary(found), *_NOTES])), width))
    return "\n\n".join(filter(None, parts))


def _effects_text(found: Scan, fold: bool, width: int | None) -> str:
    """Return the table of outputs, and of what the whole model says; nothing for a scan without data."""
    if found.data is None:
        return ""
    groups = _folded(found.rows) if fold else [(row.module, [row]) for row in found.rows]
    unit = "KL" if found.data.distance == "kl" else "distance"

    def of(number: Callable[[Row], float | None], form: str) -> list[str]:
        numbers = [[number(row) for row in same] for _, same in groups]
        kept = [[one for one in every if one is not None] for every in numbers]
        return [format(sum(every) / len(every), form) if every else "" for every in kept]

    columns = [
        Column("module", [module for module, _ in groups]),
        Column("n", [str(len(same)) for _, same in groups], right=True),
        Column("formats", [same[0].choice.label for _, same in groups]),
        *(Column(f"dB, {one}", of(_output_of(one), ".1f"), right=True) for one in OPERANDS),
        Column(f"{unit} alone", of(lambda row: row.effects[ALONE].mean_distance, ".5f"), right=True),
        Column(f"{unit} without", of(lambda row: row.effects[WITHOUT].mean_distance, ".5f"), right=True),
    ]
    columns, gone = narrowed(columns, width, ("dB, input", "dB, weight", f"{unit} without", "formats"))
    return table_text(columns, width) + (f"\n{wrapped(left_out(gone), width)}" if gone else "")


def _output_of(operand: str) -> Callable[[Row], float | None]:
    return lambda row: None if row.output is None else row.output.sqnr(operand)


Operand = Callable[[Row], Sums | None]


def _operand_text(found: Scan, name: str, operand: Operand, fold: bool, width: int | None) -> str:
    """Return the table of weights or of inputs; nothing, where none is rounded."""
    rows = [row for row in found.rows if operand(row) is not None]
    if not rows:
        return ""
    groups = _folded(rows) if fold else [(row.module, [row]) for row in rows]
    lines = [(module, same, total(filter(None, map(operand, same)))) for module, same in groups]
    firsts = [same[0] for _, same, _ in lines]
    sums = [one for _, _, one in lines]
    gaussian = {_format(row, name): row.references()[name] for row in firsts}
    every = [*sums, *gaussian.values()]
    blank = [""] * len(gaussian)
    worst = [f"{min(one.sqnr for one in map(operand, same) if one is not None):.1f}" for _, same, _ in lines]
    columns = [
        Column(name, [*(module for module, _, _ in lines), *("gaussian" for _ in gaussian)]),
        Column("n", [*(str(len(same)) for _, same, _ in lines), *blank], right=True),
        Column("format", [*(_format(row, name) for row in firsts), *gaussian]),
        Column("dB", [f"{one.sqnr:.1f}" for one in every], right=True),
        Column("worst", [*worst, *blank], right=True),
        *(Column(head, [show(one) for one in every], right=True) for head, show in _COLUMNS.items()),
    ]
    columns, gone = narrowed(columns, width, _LEAVE_OUT)
    return table_text(columns, width) + (f"\n{wrapped(left_out(gone), width)}" if gone else "")


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _share_of(cause: str) -> Callable[[Sums], str]:
    return lambda one: f"{one.causes[cause]:.0%}"


_COLUMNS: dict[str, Callable[[Sums], str]] = {
    "‖e‖/‖x‖": lambda one: _percent(one.relative_l2),
    "|e|/|x|": lambda one: _percent(one.mean_relative),
    "zeroed": lambda one: _percent(one.zeroed_share),
    "clipped": lambda one: _percent(one.clipped_block_share),
    "kurtosis": lambda one: f"{one.kurtosis:.1f}",
    "amax p50": lambda one: f"{one.top(50):.1f}",
    "amax p99": lambda one: f"{one.top(99):.1f}",
    **{cause: _share_of(cause) for cause in CAUSES},
}


def _format(row: Row, operand: str) -> str:
    return row.how.weight_name if operand == "weight" else row.how.input_name


def _folded(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return folded(rows, lambda row: row.module, lambda row: (row.step.module.shape, row.name, row.choice.label))


def _summary(found: Scan) -> list[str]:
    """Return what the tables come to, in lines."""
    rows = [row for row in found.of(RECIPE) if row.weight is not None]
    lines = []
    if rows:
        weights = total(row.weight for row in rows if row.weight is not None)
        causes = ", ".join(f"{cause} {share:.0%}" for cause, share in weights.causes.items())
        lines.append(f"{len(rows)} weights of {found.source}, by the recipe: {weights.sqnr:.1f} dB; due to {causes}")
        worst = sorted(rows, key=_below)[:MOST_WORST]
        named = ", ".join(f"{row.module} {_below(row):+.1f}" for row in worst)
        lines.append(f"the most below their format's Gaussian, in dB: {named}")
    return lines + _effects_summary(found)


def _effects_summary(found: Scan) -> list[str]:
    """Return what was found of the whole model, in lines."""
    if found.data is None or found.plain is None:
        return []
    data, unit = found.data, "KL" if found.data.distance == "kl" else "distance"
    lines = [f"data: {data.samples} samples of {data.source}, {data.tokens} tokens"]
    for name, effect in found.every.items():
        line = f"all modules rounded, {name}: {unit} {effect.mean_distance:.5f}"
        if effect.mean_loss is not None and found.plain.mean_loss is not None:
            line += f", loss {effect.mean_loss:.4f} (in full precision {found.plain.mean_loss:.4f})"
        lines.append(line)
    worst = sorted(found.of(RECIPE), key=lambda row: -cost(found, row))[:MOST_WORST]
    lines.append(f"they cost most: {', '.join(f'{row.module} {cost(found, row):.5f}' for row in worst)}")
    lines.append(
        "dB: of a module's output, with its weight, its input or both rounded. alone: only this module is rounded. "
        "without: all but this one."
    )
    return lines


def _below(row: Row) -> float:
    """Return by how many dB a weight is above what its format reaches on Gaussian values."""
    assert row.weight is not None
    return row.weight.sqnr - row.references()["weight"].sqnr
