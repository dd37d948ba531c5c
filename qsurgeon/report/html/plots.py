"""Vega-Lite charts as data, and the library that draws them, which is imported only when something is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsurgeon.errors import UsageError
from qsurgeon.report.html.places import places

VERSION = "6.4"  # of Vega-Lite
MISSING = "charts are drawn by vl-convert-python, which is not installed: pip install 'qsurgeon[plots]'"
# The same in both color schemes: axes and text take the color of the page.
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "view": {"stroke": "transparent"},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "currentColor", "titleColor": "currentColor", "domain": False, "ticks": False, "grid": False,
        "labelLimit": 160,
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "orient": "bottom"},
    "title": {"color": "currentColor"},
}  # fmt: skip
Picture = bytes
_CELL = 22  # pixels of a row
_GAP = {"paddingInner": 0.06}  # between cells
_PAPER = 520  # pixels of a chart in a picture


@dataclass(frozen=True)
class Chart:
    """A chart: its title, what it shows in words, its Vega-Lite, and what takes the place of its width in a picture."""

    title: str
    description: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """A number, or a word, of one module."""

    module: str
    value: float | str | None


def heat_map(title: str, description: str, values: Sequence[Value], *, unit: str, low_is_bad: bool) -> Chart | None:
    """Return a chart of layers by projections, in which color is the number; None where there is no layer.

    low_is_bad: whether low numbers get the color of what hurts.
    """
    scheme = {"scheme": "viridis", "reverse": not low_is_bad}
    color = {
        "field": "value", "type": "quantitative", "title": unit, "scale": scheme,
        "legend": {"gradientLength": {"expr": "min(200, width)"}},
    }  # fmt: skip
    return _map(title, description, values, color, unit, quantitative=True)


def format_map(title: str, description: str, values: Sequence[Value]) -> Chart | None:
    """Return a chart of layers by projections, in which color is the format; None where there is no layer."""
    color = {"field": "value", "type": "nominal", "title": "format", "scale": {"scheme": "tableau10"}}
    return _map(title, description, values, color, "format", quantitative=False)


def _map(
    title: str, description: str, values: Sequence[Value], color: Any, unit: str, *, quantitative: bool
) -> Chart | None:
    where = places(one.module for one in values)
    data = [
        {"module": one.module, "layer": at.layer, "projection": at.projection, "value": one.value}
        for one in values
        for at in [where[one.module]]
        if at.layer is not None and one.value is not None
    ]
    if not data:
        return None
    names = list(dict.fromkeys(row["projection"] for row in data))
    shown = {"field": "value", "type": "quantitative", "title": unit, "format": ".4g"}
    spec = {
        **_head(description),
        "height": _CELL * len(names),
        "data": {"values": data},
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {
                "field": "layer",
                "type": "ordinal",
                "title": "layer",
                "axis": {"labelAngle": 0, "labelOverlap": True},
                "scale": _GAP,
            },
            "y": {"field": "projection", "type": "nominal", "title": None, "sort": names, "scale": _GAP},
            "color": color,
            "tooltip": [
                {"field": "module", "type": "nominal"},
                shown if quantitative else {"field": "value", "type": "nominal", "title": unit},
            ],
        },
    }
    return Chart(title, description, spec)


def shares(title: str, description: str, rows: Mapping[str, Mapping[str, float]]) -> Chart:
    """Return a chart of stacked bars: for each of ``rows`` the share of each part. A negative one is left of zero."""
    parts = list(next(iter(rows.values())))
    data = [
        {"row": name, "part": part, "share": share, "order": parts.index(part)}
        for name, of in rows.items()
        for part, share in of.items()
    ]
    spec = {
        **_head(description),
        "height": _CELL * len(rows),
        "data": {"values": data},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": {"field": "share", "type": "quantitative", "title": "share of the squared error",
                  "axis": {"format": "%", "tickCount": 5}},
            "y": {"field": "row", "type": "nominal", "title": None, "sort": list(rows)},
            "color": {"field": "part", "type": "nominal", "title": "due to", "sort": parts,
                      "scale": {"scheme": "tableau10"}},
            "order": {"field": "order"},
            "tooltip": [
                {"field": "row", "type": "nominal", "title": "projection"},
                {"field": "part", "type": "nominal", "title": "due to"},
                {"field": "share", "type": "quantitative", "format": ".1%"},
            ],
        },
    }  # fmt: skip
    return Chart(title, description, spec)


def _head(description: str) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": _CONFIG,
    }


def library() -> str:
    """Return the JavaScript of Vega-Lite and what it needs, which draws charts without a network.

    Raises: UsageError where vl-convert-python is not installed.
    """
    script: str = _vl_convert().javascript_bundle(vl_version=VERSION)
    return script


def png(charts: Sequence[Chart], *, scale: float = 2.0) -> Picture:
    """Return charts below each other as a picture with a white background. Raises: as ``library``."""
    parts = []
    for chart in charts:
        spec = {key: value for key, value in chart.spec.items() if key not in ("config", "$schema", "autosize")}
        parts.append({**spec, "width": _PAPER, "title": chart.title})
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "vconcat": parts,
        "resolve": {"scale": {"color": "independent"}},
        "config": {**_printed(_CONFIG), "background": "white"},
    }
    picture: bytes = _vl_convert().vegalite_to_png(whole, vl_version=VERSION, scale=scale)
    return picture


def _printed(config: Any) -> Any:
    """Return a config with black in place of the page's color, and a font that is everywhere."""
    if isinstance(config, dict):
        return {key: _printed(value) for key, value in config.items()}
    return {"currentColor": "black", "system-ui, sans-serif": "sans-serif"}.get(config, config)


def _vl_convert() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise UsageError(MISSING) from error
    return vl_convert
