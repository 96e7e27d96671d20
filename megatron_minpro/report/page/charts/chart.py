"""A chart: a Vega-Lite specification with its title, and which metrics it needs. Colours are variables of page.css, for light and dark.

A specification names the dataset `steps`: one row a global step, with the metrics as fields. charts.js gives the rows, and the parameter
`count`, how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

STEPS = "steps"
STEP = "global_step"
ROOT_MEAN_SQUARE = "log_ratio/root_mean_square"  # columns.py makes it of log_ratio/mean_square
HEIGHT = 150  # pixels
PERCENT = ".3~%"
# Of a logarithmic axis: which values are marked where it spans more than a factor of 8, and how they are written.
_MARKED = "domain('y')[1] < 8 * domain('y')[0] || indexof('125', substring(format(datum.value, '.0e'), 0, 1)) >= 0"
_POWERS = f"!({_MARKED}) ? '' : datum.value < 0.001 ? format(datum.value, '.0e') : format(datum.value, '~g')"
SERIES = ("var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-4)", "var(--series-5)")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3])  # a second sign beside the colour

# What every chart shares. Sizes in pixels.
CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",  # as page.css: labels are measured with it
    "padding": 2,
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": "var(--grid)",
        "labelColor": "var(--quiet)",
        "labelFontSize": 11,
        "labelPadding": 6,
        "titleColor": "var(--quiet)",
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 6,
    },
    "axisX": {"grid": False, "tickCount": 5, "domain": True, "domainColor": "var(--line)"},
    "axisY": {"tickCount": 4, "minExtent": 34},
    "legend": {"disable": True},  # legends are HTML, so that they wrap
    "line": {"strokeWidth": 2, "strokeJoin": "round"},
    "title": {"color": "var(--ink)"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line's entry in a legend."""

    label: str
    colour: str
    dash: str  # as SVG writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart of the page."""

    name: str  # unique in the page
    title: str
    unit: str
    needs: tuple[str, ...]  # metrics; without any of them the page says so in the chart's place
    spec: Spec
    note: str = ""  # how to read it, one line
    over: str = "over global steps"  # its horizontal axis, for those who cannot see it
    headline: str | None = None  # the metric whose last value stands beside the title
    positive: bool = False  # values of 0 say nothing
    wide: bool = False  # takes the whole row
    legend: tuple[Series, ...] = ()
    scale: tuple[tuple[int, str | None], ...] = ()  # of a heat map: each colour, and the value where it begins

    def missing(self, metrics: Sequence[Mapping[str, float | None]]) -> bool:
        """Whether no step has any of the metrics it needs."""
        return not any(line.get(name) is not None for line in metrics for name in self.needs)


def series_style(place: int) -> tuple[str, list[int]]:
    """Colour and dashes of the line at this place. The first 25 differ."""
    return SERIES[place % len(SERIES)], DASHES[(place + place // len(SERIES)) % len(DASHES)]


def legend(labels: Sequence[str]) -> tuple[Series, ...]:
    """Entries for the lines in this order."""
    styles = [series_style(place) for place in range(len(labels))]
    return tuple(
        Series(label=label, colour=colour, dash=" ".join(map(str, dash))) for label, (colour, dash) in zip(labels, styles, strict=True)
    )


def line_style(field: str, labels: Sequence[str]) -> Spec:
    """The encodings that tell lines apart by colour and by dashes. labels: the field's values, in order."""
    styles = [series_style(place) for place in range(len(labels))]
    return {
        "color": {"field": field, "type": "nominal", "scale": {"domain": list(labels), "range": [colour for colour, _ in styles]}},
        "strokeDash": {"field": field, "type": "nominal", "scale": {"domain": list(labels), "range": [dash for _, dash in styles]}},
    }


def frame(layers: list[Spec], *, height: int = HEIGHT, **more: Any) -> Spec:
    """A specification of layers over the steps, as wide as its place."""
    return {
        "data": {"name": STEPS},
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "count", "value": 1}],
        "layer": layers,
        **more,
    }


def step_axis(title: str | None = None) -> Spec:
    """The x-axis of every chart over steps."""
    return {
        "field": STEP,
        "type": "quantitative",
        "axis": {"title": title, "format": "d", "tickMinStep": 1},
        "scale": {"nice": False, "padding": 4},
    }


def value_axis(field: str, *, scale: str = "linear", number: str | None = None, domain: tuple[float, float] | None = None) -> Spec:
    """The y-axis of a metric.

    Args:
        field: the metric.
        scale: linear or log.
        number: how values are written; None: as the range asks for.
        domain: its ends; None: those of the data.
    """
    found: Spec = {"type": scale}
    if scale == "linear":
        found["zero"] = False
    if domain is not None:
        found["domain"] = list(domain)
    labels: Spec = {} if number is None else {"format": number}
    if scale == "log":
        labels = {"labelExpr": _POWERS, "labelOverlap": True, "gridOpacity": {"condition": {"test": _MARKED, "value": 1}, "value": 0}}
    return {"field": field, "type": "quantitative", "axis": {"title": None, **labels}, "scale": found}


def hover(fields: Mapping[str, str], *, number: str = ".4~g") -> Spec:
    """An invisible column over each step that answers to the pointer with these fields. fields: name -> title."""
    return {
        "params": [{"name": "near", "select": {"type": "point", "on": "pointerover", "clear": "pointerout", "toggle": False}}],
        "mark": {"type": "rule", "strokeWidth": {"expr": "max(3, width / max(1, count - 1))"}, "color": "var(--ink)"},
        "encoding": {
            "x": step_axis(),
            "opacity": {"condition": {"param": "near", "empty": False, "value": 0.08}, "value": 0},
            "tooltip": [
                {"field": STEP, "type": "quantitative", "title": "global step", "format": "d"},
                *({"field": field, "type": "quantitative", "title": title, "format": number} for field, title in fields.items()),
            ],
        },
    }
