"""One file that shows a report in any browser: no network, light and dark, by keyboard and by screen reader."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from qsurgeon.errors import UsageError
from qsurgeon.report.html.plots import Chart, library
from qsurgeon.visible import one_line, visible

Cell = float | int | str | None


@dataclass(frozen=True)
class Field:
    """A column of a table: its head, its cells, and how a number is written; without that, cells are words."""

    head: str
    cells: Sequence[Cell]
    form: str = ""


@dataclass(frozen=True)
class Page:
    """What is shown: a title, lines of summary, charts, a table that can be sorted, and a recipe."""

    title: str
    summary: Sequence[str]
    charts: Sequence[Chart]
    table: Sequence[Field]
    recipe: str = ""

    def to_html(self) -> str:
        """Return it as a file of its own. Raises: UsageError where vl-convert-python is not installed."""
        return self._whole(library())

    def to_notebook(self) -> str:
        """Return it in a frame, which a notebook shows without any of its styles getting into it.

        Where vl-convert-python is not installed it says so in place of the charts.
        """
        try:
            inside = self.to_html()
        except UsageError as error:
            inside = replace(self, summary=[*self.summary, str(error)], charts=())._whole("")
        inside = html.escape(inside, quote=True)
        style = "width:100%;height:40rem;border:0"
        return f'<iframe title="{_text(self.title)}" srcdoc="{inside}" style="{style}"></iframe>'

    def _whole(self, script: str) -> str:
        return _document(self.title, f"{self.body()}\n<script>{script}</script>\n<script>{_read('page.js')}</script>")

    def body(self) -> str:
        """Return what is shown, without the scripts."""
        parts = [f"<h1>{_text(self.title)}</h1>", *(f"<p>{_text(line)}</p>" for line in self.summary)]
        parts.append('<div class="charts">')
        parts += [_section(number, chart) for number, chart in enumerate(self.charts)]
        parts.append("</div>")
        if self.table:
            parts += ['<h2 id="modules">Modules</h2>', _table(self.table)]
        if self.recipe:
            parts += ["<h2>Recipe</h2>", f'<pre tabindex="0">{html.escape(visible(self.recipe))}</pre>']
        return "<main>\n" + "\n".join(parts) + "\n</main>"


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_read('page.css')}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _section(number: int, chart: Chart) -> str:
    data = json.dumps(chart.spec).replace("<", "\\u003c")  # no name ends the script
    return (
        f'<section aria-labelledby="chart-{number}"><h2 id="chart-{number}">{_text(chart.title)}</h2>'
        f'<p>{_text(chart.description)}</p><div class="chart"><script type="application/json">{data}</script></div>'
        '<output aria-live="polite"></output></section>'
    )


def _table(fields: Sequence[Field]) -> str:
    heads = "".join(
        f'<th scope="col"{"" if field.form else " class=text"}><button type="button">{_text(field.head)}</button></th>'
        for field in fields
    )
    rows = "\n".join(
        "<tr>"
        + "".join(_cell(field, cell, first=not at) for at, (field, cell) in enumerate(zip(fields, row, strict=True)))
        + "</tr>"
        for row in zip(*(field.cells for field in fields), strict=True)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="modules"><table aria-labelledby="modules">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(field: Field, cell: Cell, *, first: bool) -> str:
    shown = "" if cell is None else format(cell, field.form) if field.form else str(cell)
    value = "" if cell is None else _text(str(cell))
    if first:
        return f'<th scope="row" data-value="{value}">{_text(shown)}</th>'
    return f'<td{"" if field.form else " class=text"} data-value="{value}">{_text(shown)}</td>'


def _text(text: str) -> str:
    return html.escape(one_line(text), quote=True)


def _read(name: str) -> str:
    return resources.files("qsurgeon.report.html").joinpath(name).read_text("utf-8")
