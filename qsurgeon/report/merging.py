"""The result of a merge as a table."""

from qsurgeon.merging import Change, Merged, total
from qsurgeon.report.tables import Column, left_out, narrowed, table_text, wrapped
from qsurgeon.surgery.fold import folded
from qsurgeon.visible import one_line


def merge_text(merged: Merged, *, fold: bool = True, width: int | None = None) -> str:
    """Return the changes as a table and its totals; ``fold`` makes one line of modules that differ in a number."""
    groups = _folded(merged.changes) if fold else [(one.module, [one]) for one in merged.changes]
    totals = [total(alike, name) for name, alike in groups]
    numbers = [_numbers(one) for one in totals]
    columns = [
        Column("module", [name for name, _ in groups]),
        Column("n", [str(len(alike)) for _, alike in groups], right=True),
        Column("shape", ["x".join(map(str, one.shape)) for one in totals]),
        Column("weight", [one.weight for one in totals]),
        *(
            Column(head, [one[place] for one in numbers], right=True)
            for place, head in enumerate(("ΔW/W", "codes changed", "dB"))
        ),
    ]
    columns, gone = narrowed(columns, width, ("shape",))
    notes = [left_out(gone)] if gone else []
    return "\n\n".join([table_text(columns, width), wrapped("\n".join([*notes, _totals(merged)]), width)])


def _numbers(one: Change) -> tuple[str, str, str]:
    relative = "" if one.relative is None else f"{one.relative:.2%}"
    return relative, "" if one.share is None else f"{one.share:.1%}", f"{one.sqnr:.1f}"


def _totals(merged: Merged) -> str:
    rounded = [one for one in merged.changes if one.codes]
    lines = [f"{len(merged.changes)} modules are merged, {len(rounded)} of them rounded again"]
    if rounded:
        relative, share, sqnr = _numbers(total(rounded))
        lines[0] += f": ΔW/W {relative or '-'}, {share} of their codes changed, {sqnr} dB"
    if merged.replaced:
        lines.append(f"replaced as the adapter has them: {', '.join(merged.replaced)}")
    lines.append(
        "dB: q(W + ΔW), which the merged layer computes with, against q(W) + ΔW, which the adapter trained with"
    )
    return "\n".join(map(one_line, lines))


def _folded(changes: tuple[Change, ...]) -> list[tuple[str, list[Change]]]:
    return folded(changes, lambda one: one.module, lambda one: (one.shape, one.weight))
