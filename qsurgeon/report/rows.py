"""A model's rows and totals, for printing, JSON and evaluation scripts."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qsurgeon.layers import AS_IT_IS
from qsurgeon.layers.kinds import in_order, listed
from qsurgeon.report.tables import Column, left_out, narrowed, natural_width, table_text, wrapped
from qsurgeon.surgery import Part, Tower, headline, in_words, percent
from qsurgeon.surgery.fold import folded
from qsurgeon.visible import one_line
from qsurgeon.words import Behavior

COLUMNS = tuple(Behavior().columns)
LARGE = 0.01  # of all parameters: modules that no rule names and that hold more are pointed out


@dataclass(frozen=True)
class Row:
    """One module: what it is, what it computes with, and why.

    bits: of one weight value as the layer computes with it. bytes: of the parameters it holds now.
    type: what recipes call its kind; nothing for what cannot be wrapped.
    called: by the example, where there was one to ask with. bypassed: by an adapter that computes past it.
    misread: by an adapter that takes its codes for values. behavior: how it uses its formats, where it is wrapped.
    rounds: whether it did when a live model was asked; None where there was none to ask. noise: the multiplier of the
    noise of a norm, if it gets some. sigma: the standard deviation of that when a live model was asked.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    weight: str
    input: str
    behavior: Behavior | None
    why: str
    parameters: int
    bits: float | None
    bytes: int
    type: str
    called: bool | None = None
    large: bool = False
    bypassed: bool = False
    misread: bool = False
    rounds: bool | None = None
    adapter: bool = False
    tower: Tower | None = None
    noise: float | None = None
    sigma: float | None = None

    @property
    def is_wrapped(self) -> bool:
        """Whether it computes in another format."""
        return self.behavior is not None

    @property
    def behaves(self) -> dict[str, Any]:
        """Each field of its behavior, by name."""
        return dict.fromkeys(Behavior().fields, AS_IT_IS) if self.behavior is None else self.behavior.fields

    @property
    def gradient(self) -> str:
        """How the gradient passes the rounding."""
        return str(self.behaves["gradient"])

    @property
    def when(self) -> str:
        """What else its forward pass depends on, in words, such as the phases in which it rounds."""
        return "" if self.behavior is None else ", ".join(self.behavior.reasons(forward=True))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values, each field of its behavior apart."""
        plain = {key: value for key, value in vars(self).items() if key != "behavior"}
        tower = self.tower.name if self.tower else None
        return {**plain, **self.behaves, "when": self.when, "shape": list(self.shape), "tower": tower}

    @property
    def part(self) -> Part:
        """Its part in the headline."""
        how = in_words(self.weight, self.input, self.when) if self.is_wrapped else ""
        return Part(self.parameters, self.kind, self.type, self.adapter, how)


@dataclass(frozen=True)
class Large:
    """Modules that no rule decided about, alike but for numbers or names: how many, and their share of all parameters.

    module: one pattern for them, or nothing where no pattern is.
    """

    module: str
    kind: str
    count: int
    share: float


@dataclass(frozen=True)
class Reached:
    """A part of a model that reads no text, and how much of it is wrapped; ``share``: of all parameters."""

    module: str
    kind: str
    reads: str
    wrapped: int
    wrappable: int
    share: float


@dataclass(frozen=True)
class Report:
    """The rows of a model, and their totals.

    phase: what a live model was being called for when it was asked. noise: that of its norms, in words.
    """

    rows: tuple[Row, ...]
    storage: str
    source: str = ""
    bytes_after: int | None = None  # what a plan will make of the bytes that the rows have now
    phase: str = ""
    noise: str = ""

    @property
    def wrapped(self) -> int:
        """How many modules compute in another format."""
        return sum(row.is_wrapped for row in self.rows)

    @property
    def wrappable(self) -> int:
        """How many modules could be wrapped, or are; adapters are not counted."""
        return sum(bool(row.type) for row in self.rows)

    @property
    def types(self) -> tuple[str, ...]:
        """The kinds of those modules, by name."""
        return in_order(row.type for row in self.rows)

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
        """The modules that no rule decided about and that are large, alone or with others of their kind."""
        return tuple(sorted((row for row in self.rows if row.large), key=lambda row: -row.parameters))

    @property
    def large(self) -> tuple["Large", ...]:
        """The same, those together that differ in a number, or in their name alone; largest first."""
        return _large(self.unnamed, self.parameters)

    @property
    def towers(self) -> tuple["Reached", ...]:
        """The parts that read images, sound or the like, and have wrapped modules."""
        found = {row.tower: [one for one in self.rows if one.tower == row.tower] for row in self.rows if row.tower}
        return tuple(
            Reached(
                tower.name,
                tower.kind,
                tower.reads,
                sum(row.is_wrapped for row in rows),
                sum(bool(row.type) for row in rows),
                sum(row.parameters for row in rows if row.is_wrapped) / self.parameters,
            )
            for tower, rows in found.items()
            if any(row.is_wrapped for row in rows)
        )

    @property
    def summary(self) -> str:
        """What the model computes with, in one line: what an evaluation should print beside its score.

        Of a live model it says too what does not round at this moment: in another phase, or inside ``disabled``.
        """
        remarks = []
        past = sum(row.bypassed for row in self.rows)
        if past:
            remarks.append(f"past {past} of them adapters compute in full precision")
        misread = sum(row.misread for row in self.rows)
        if misread:
            remarks.append(f"on {misread} of them adapters take codes for values")
        uncalled = sum(row.called is False for row in self.rows)
        if uncalled:
            remarks.append(f"{uncalled} of them were never called")
        return headline((row.part for row in self.rows), remarks, self._resting)

    @property
    def _resting(self) -> str:
        """What the summary says of wrapped modules that do not round at this moment; nothing, where all do."""
        resting = [row for row in self.rows if row.rounds is False]
        if not resting:
            return ""
        count = "" if len(resting) == self.wrapped else f"{len(resting)} of them "
        by_phase = all(row.behavior and row.behavior.phases not in ("both", self.phase) for row in resting)
        where = f"in phase {self.phase}" if by_phase else "inside qsurgeon.disabled"
        return f", but {count}compute in full precision at this moment, {where}"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        rows = [row.to_dict() for row in self.rows]
        return {
            "source": self.source,
            "summary": self.summary,
            "storage": self.storage,
            "phase": self.phase,
            "wrapped": self.wrapped,
            "wrappable": self.wrappable,
            "coverage": self.coverage,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "bytes_after": self.bytes_after,
            "unnamed": [row.module for row in self.unnamed],
            "large": [vars(one) for one in self.large],
            "towers": [vars(one) for one in self.towers],
            "noise": self.noise,
            "modules": rows,
        }

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return report_text(self, fold=True)


def report_text(report: Report, *, fold: bool = True, width: int | None = None) -> str:
    """Return the report as a table and its totals; ``fold`` makes one line of modules that differ in a number.

    width: of the terminal that it is read in. Where it is too narrow, the reasons become letters that are explained
    below the table, some columns are left out, and long names are broken. Without a width nothing is.
    """
    groups = _folded(report.rows) if fold else [(row.module, [row]) for row in report.rows]
    columns = _columns(groups)
    legend: list[str] = []
    if width is not None and natural_width(columns) > width:
        columns, legend = _with_letters(columns)
    columns, gone = narrowed(columns, width, ("shape", "kind"))
    notes = [*legend, *([left_out(gone)] if gone else [])]
    parts = [table_text(columns, width), *(["\n".join(notes)] if notes else []), totals_text(report)]
    return "\n\n".join([parts[0], *(wrapped(part, width) for part in parts[1:])])


def _columns(groups: Sequence[tuple[str, Sequence[Row]]]) -> list[Column]:
    firsts = [rows[0] for _, rows in groups]
    return [
        Column("module", [name for name, _ in groups]),
        Column("n", [str(len(rows)) for _, rows in groups], right=True),
        Column("kind", [row.kind for row in firsts]),
        Column("shape", ["x".join(map(str, row.shape)) for row in firsts]),
        Column("weight", [row.weight for row in firsts]),
        Column("input", [row.input for row in firsts]),
        *(Column(name, [str(row.behaves[name]) for row in firsts]) for name in COLUMNS),
        Column("bits", ["" if row.bits is None else f"{row.bits:g}" for row in firsts], right=True),
        Column("MB", [f"{sum(one.bytes for one in rows) / 1e6:.1f}" for _, rows in groups], right=True),
        Column("why", [row.why for row in firsts]),
    ]


def _with_letters(columns: Sequence[Column]) -> tuple[list[Column], list[str]]:
    """Return columns that name each reason, with its behavior, by a letter, and the lines that explain the letters."""
    by_head = {column.head: column.cells for column in columns}
    whys = [
        ", ".join([why, *(f"{name} {cell}" for name, cell in zip(COLUMNS, cells, strict=True) if cell != AS_IT_IS)])
        for why, *cells in zip(by_head["why"], *(by_head[name] for name in COLUMNS), strict=True)
    ]
    letters = {why: _letter(place) for place, why in enumerate(dict.fromkeys(whys))}
    kept = [column for column in columns if column.head not in (*COLUMNS, "why")]
    legend = [one_line(f"{letter}  {why}") for why, letter in letters.items()]
    return [*kept, Column("why", [letters[why] for why in whys])], legend


def _letter(place: int) -> str:
    """Return the letter of a place: a, b, … z, aa, ab and so on."""
    letter = chr(ord("a") + place % 26)
    return letter if place < 26 else _letter(place // 26 - 1) + letter


def totals_text(report: Report) -> str:
    """Return the totals of a report: what is wrapped, the share of parameters per format, what nobody named."""
    shares = ", ".join(
        f"{'full precision' if name == '-' else name} {percent(share)}" for name, share in report.coverage.items()
    )
    lines = [report.summary]
    for one in report.towers:
        lines.append(
            f"wrapped with the rest: {one.module} ({one.kind}, which reads {one.reads}), {one.wrapped} of its "
            f"{one.wrappable} {listed(report.types, 'and')} modules, {percent(one.share)} of the parameters"
        )
    lines.append(f"parameters: {shares}; {report.bits_per_weight:.2f} bits per weight")
    if report.noise:
        lines.append(f"noise on {sum(row.noise is not None for row in report.rows)} norms: {report.noise}")
    size = f"size: {_megabytes(report.bytes)}"
    if report.bytes_after not in (None, report.bytes):
        size += f" now, {_megabytes(report.bytes_after)} with {report.storage} weights"
    lines.append(size)
    for group in report.large:
        what = group.kind if group.count == 1 else f"{group.count} {group.kind}"
        share = f"{percent(group.share)} of the parameters"
        lines.append(
            f"large, and stays as it is: {group.module} ({what}, {share})"
            if group.module
            else f"large together, and stays as it is: {what} ({share})"
        )
    return "\n".join(map(one_line, lines))


def _megabytes(count: int | None) -> str:
    return f"{(count or 0) / 1e6:,.1f} MB"


def _folded(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return folded(
        rows,
        lambda row: row.module,
        lambda row: (row.kind, row.shape, row.weight, row.input, *row.behaves.values(), row.why, row.bits),
    )


def mark_large(rows: Sequence[Row], undecided: Sequence[bool]) -> list[Row]:
    """Return ``rows`` with those marked as large that no rule decided about, and that hold much of the parameters.

    A module counts with those that differ from it in a number alone, and else with all of its kind. ``undecided``: for
    each row, whether no rule decided about it.
    """
    everything = sum(row.parameters for row in rows) or 1
    named = [row for row, is_open in zip(rows, undecided, strict=True) if is_open and row.parameters]
    large = {row.module for one in _groups(named, everything) for row in one[2]}
    return [replace(row, large=row.module in large) for row in rows]


def _groups(rows: Sequence[Row], everything: int) -> list[tuple[str, str, list[Row]]]:
    """Return (pattern or nothing, kind, rows) of those that hold more than ``LARGE`` of everything."""
    found: list[tuple[str, str, list[Row]]] = []
    rest: dict[str, list[Row]] = defaultdict(list)
    for name, group in folded(rows, lambda row: row.module, lambda row: row.kind):
        if _count(group) >= LARGE * everything:
            found.append((name, group[0].kind, group))
        else:
            rest[group[0].kind] += group
    found += [("", kind, group) for kind, group in rest.items() if _count(group) >= LARGE * everything]
    return sorted(found, key=lambda one: -_count(one[2]))


def _large(rows: Sequence[Row], everything: int) -> tuple[Large, ...]:
    groups = _groups(rows, everything)
    return tuple(Large(name, kind, len(group), _count(group) / everything) for name, kind, group in groups)


def _count(rows: Sequence[Row]) -> int:
    return sum(row.parameters for row in rows)
