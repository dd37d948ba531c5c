"""The page of a scan."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from qsurgeon.report.html.page import Cell, Field, Page
from qsurgeon.report.html.places import places
from qsurgeon.report.html.plots import Chart, Value, format_map, heat_map, shares
from qsurgeon.scanning import ALONE, CAUSES, OPERANDS, RECIPE, WITHOUT, Row, Scan, Sums, total
from qsurgeon.scanning.measures import finite

Number = Callable[[Row], float | None]


def scan_page(found: Scan, summary: Sequence[str]) -> Page:
    """Return the page of a scan; ``summary``: what its text says below its tables."""
    rows = found.of(RECIPE)
    title = f"Scan of {found.source}"
    return Page(title, summary, charts_of(found), _table(found), found.plan.recipe.text if rows else "")


def charts_of(found: Scan) -> list[Chart]:
    """Return the charts of a scan, of what the recipe itself says."""
    rows = found.of(RECIPE)
    metrics = [*_effects(found), *_outputs(found), *_tensors("weight", lambda row: row.weight)]
    metrics += _tensors("input", lambda row: row.input)
    charts = [
        heat_map(title, text, [Value(row.module, number(row)) for row in rows], unit=unit, low_is_bad=low)
        for title, text, unit, low, number in metrics
    ]
    charts.append(_causes(rows))
    charts.append(
        format_map("Formats", "What each module computes with.", [Value(row.module, row.choice.label) for row in rows])
    )
    return [chart for chart in charts if chart is not None]


Metric = tuple[str, str, str, bool, Number]  # title, description, unit, whether low is bad, and the number


def _effects(found: Scan) -> list[Metric]:
    if found.data is None:
        return []
    unit = "KL, nats" if found.data.distance == "kl" else "relative error"
    return [
        (
            "Effect on the model: only this module rounded",
            "How far the model's answer moves when a module alone is rounded.",
            unit,
            False,
            lambda row: row.effects[ALONE].mean_distance,
        ),
        (
            "Effect on the model: all but this module rounded",
            "How far the model's answer is from that in full precision when a module alone is spared. The least is the "
            "module that gains most by being spared.",
            unit,
            False,
            lambda row: row.effects[WITHOUT].mean_distance,
        ),
    ]


def _outputs(found: Scan) -> list[Metric]:
    if found.data is None:
        return []
    return [
        (
            "Output of each module",
            "Signal over quantization noise of a module's output on the data, weight and input rounded.",
            "dB",
            True,
            lambda row: None if row.output is None else finite(row.output.sqnr("both")),
        )
    ]


def _tensors(operand: str, sums: Callable[[Row], Sums | None]) -> list[Metric]:
    """Return the metrics of weights or of inputs."""
    name = f"{operand.capitalize()}s"

    def number(of: Callable[[Sums, Row], float]) -> Number:
        def get(row: Row) -> float | None:
            one = sums(row)
            return None if one is None else finite(of(one, row))

        return get

    return [
        (
            f"{name}: beside a Gaussian",
            f"Signal over quantization noise of the {operand}, less what its format reaches on Gaussian values. "
            "Nothing is wrong at zero.",
            "dB",
            True,
            number(lambda one, row: one.sqnr - row.references()[operand].sqnr),
        ),
        (
            f"{name}: zeroed",
            f"The share of values of the {operand} that become zero.",
            "share",
            False,
            number(lambda one, _: one.zeroed_share),
        ),
        (
            f"{name}: clipped blocks",
            f"The share of blocks of the {operand} with a value beyond the largest that the block can hold.",
            "share",
            False,
            number(lambda one, _: one.clipped_block_share),
        ),
        (
            f"{name}: kurtosis",
            f"The fourth moment of the {operand} over the square of the second: 3 of a Gaussian.",
            "kurtosis",
            False,
            number(lambda one, _: one.kurtosis),
        ),
    ]


def _causes(rows: Iterable[Row]) -> Chart | None:
    weights = [(row.module, row.weight) for row in rows if row.weight is not None]
    where = places(module for module, _ in weights)
    by_projection: dict[str, list[Sums]] = {}
    for module, sums in weights:
        by_projection.setdefault(where[module].projection, []).append(sums)
    if not by_projection:
        return None
    of: Mapping[str, Mapping[str, float]] = {name: total(every).causes for name, every in by_projection.items()}
    return shares("Weights: the error by its cause", "What the squared error of the weights is due to.", of)


def _table(found: Scan) -> list[Field]:
    """Return the table of all modules and choices."""
    rows = found.rows

    def field(head: str, form: str, number: Callable[[Row], Cell]) -> Field:
        return Field(head, [number(row) for row in rows], form)

    fields = [
        Field("module", [row.module for row in rows]),
        Field("formats", [row.choice.label for row in rows]),
        field("bits", ".4g", lambda row: row.bits),
    ]
    if found.data is not None:
        unit = "KL" if found.data.distance == "kl" else "distance"
        fields += [
            field(f"{unit} alone", ".5f", lambda row: row.effects[ALONE].mean_distance),
            field(f"{unit} without it", ".5f", lambda row: row.effects[WITHOUT].mean_distance),
        ]
        fields += [field(f"output dB, {one}", ".1f", _output(one)) for one in OPERANDS]
    for operand, sums in (("weight", lambda row: row.weight), ("input", lambda row: row.input)):
        fields += _columns(operand, rows, sums)
    return [one for one in fields if any(cell is not None for cell in one.cells)]


def _output(operand: str) -> Callable[[Row], Cell]:
    return lambda row: None if row.output is None else finite(row.output.sqnr(operand))


def _columns(operand: str, rows: Sequence[Row], sums: Callable[[Row], Sums | None]) -> list[Field]:
    numbers: list[tuple[str, str, Callable[[Sums], float]]] = [
        ("dB", ".1f", lambda one: one.sqnr),
        ("|e|/|x|", ".1%", lambda one: one.mean_relative),
        ("zeroed", ".1%", lambda one: one.zeroed_share),
        ("clipped blocks", ".1%", lambda one: one.clipped_block_share),
        ("kurtosis", ".1f", lambda one: one.kurtosis),
        *((cause, ".0%", lambda one, cause=cause: one.causes[cause]) for cause in CAUSES),
    ]
    fields = []
    for head, form, number in numbers:
        cells = [None if one is None else finite(number(one)) for one in map(sums, rows)]
        fields.append(Field(f"{operand} {head}", cells, form))
        if head == "dB":
            gaussian = [row.references()[operand].sqnr if sums(row) is not None else None for row in rows]
            fields.append(Field(f"{operand} dB, Gaussian", gaussian, form))
    return fields
