"""The result of an export as a table: what each engine will compute with it."""

from qsurgeon.exchange import ENGINES, Export, Imported
from qsurgeon.exchange.engines import AS_IT_IS
from qsurgeon.report.tables import Column, left_out, narrowed, table_text, wrapped
from qsurgeon.storage import MASTER
from qsurgeon.visible import one_line

_SHOWN = 3


def export_text(done: Export, width: int | None = None) -> str:
    """Return what was exported, and a table of what engines compute with it beside what was trained."""
    lines = [_headline(done)]
    parts = ["\n".join(map(one_line, lines))]
    if done.computed:
        columns = [
            Column("engine", [ENGINES[one.engine] for one in done.computed]),
            Column("n", [str(one.modules) for one in done.computed], right=True),
            Column("weight", [one.weight for one in done.computed]),
            Column("input as trained", [one.trained for one in done.computed]),
            Column("input that it computes with", [one.computes for one in done.computed]),
            Column("", ["as trained" if one.same else "differs" for one in done.computed]),
        ]
        columns, gone = narrowed(columns, width, ("weight", "n", "input as trained"))
        parts += [table_text(columns, width), *([left_out(gone)] if gone else [])]
    whys = dict.fromkeys(f"{ENGINES[one.engine]}: {one.why}" for one in done.computed if one.why)
    notes = [*whys, *_disagreement(done)]
    return wrapped("\n\n".join([*parts, *(["\n".join(map(one_line, notes))] if notes else [])]), width)


def import_text(done: Imported, output: str) -> str:
    """Return what was imported, and whether a master model rounds its weights to what they are."""
    kept = "codes and scales are the same" if done.storage != MASTER else "their values are master weights"
    lines = [f"{output}: {done.summary}", f"{done.method}: {len(done.modules)} weights are imported; {kept}"]
    if done.changed:
        lines.append(
            f"Warning: {done.changed:,} values are rounded to others again: their scales were not found by a rule of "
            "the format. As packed weights they stay as they are: leave --dequantize out"
        )
    return "\n".join(map(one_line, lines))


def _headline(done: Export) -> str:
    schemes = [
        f"{count} with weight {weight}, input {asked or AS_IT_IS}" for (weight, asked), count in done.schemes.items()
    ]
    how = [
        f"{done.rounded} rounded once" if done.rounded else "",
        f"{done.kept} with the codes they had" * bool(done.kept),
    ]
    count = done.rounded + done.kept
    return f"{count} weights exported to {done.to}, {' and '.join(filter(None, how))}: {'; '.join(schemes)}"


def _disagreement(done: Export) -> list[str]:
    """Return what to say of tensor scales that engines will take the largest of."""
    if not done.disagree:
        return []
    shown = "; ".join(" and ".join(names) for names in done.disagree[:_SHOWN])
    more = f"; and {len(done.disagree) - _SHOWN} more groups" if len(done.disagree) > _SHOWN else ""
    return [
        f"Warning: vLLM and SGLang join these modules and take the largest tensor scale for all of them, so that their "
        f"weights would be others: {shown}{more}. Share the scales before training, or export with --for ENGINE, which "
        "refuses that"
    ]
