"""Quantiles along the response at one global step, which the reader chooses: a bar from p05 to p95 for each stretch, the median across it.

A specification names the dataset `along`: one row a stretch, {place, low, middle, high}, in nats. charts.js gives the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_minpro.report.page.charts.chart import HEIGHT, SERIES, Chart, Spec, frame

ALONG = "along"
BANDS = ("p05", "p50", "p95")
_TITLES = {"log_ratio": "Log ratio", "log_prefix_min": "Log prefix minimum"}
_BY = {"tokens": "by position", "share": "by share of the response"}
_AXES = {
    "tokens": {"labelExpr": "split(datum.label, '–')[0]", "title": "a stretch begins at this trained token"},
    "share": {"labelExpr": "replace(datum.label, '%', '')", "title": "percent of the response"},
}
_SHOWN = {"high": "95%", "middle": "median", "low": "5%"}


def stretch_bands(name: str, *, group: str, by: Literal["tokens", "share"], labels: Sequence[str], numbers: Sequence[float]) -> Chart:
    """Of `log_ratio` or `log_prefix_min`, by absolute position or by share of the response.

    Args:
        name: of the chart.
        group: what is drawn.
        by: tokens or share.
        labels: of all stretches, from the beginning of a response to its end.
        numbers: all that any step shows: the axis is the same at every step.
    """
    x: Spec = {
        "field": "place",
        "type": "ordinal",
        "scale": {"domain": list(labels), "paddingInner": 0.12},
        "axis": {"labelAngle": 0, "labelOverlap": "greedy", "labelSeparation": 3, **_AXES[by]},
    }
    y: Spec = {
        "type": "quantitative",
        "axis": {"title": None},
        "scale": {"domain": [min(0.0, *numbers), max(0.0, *numbers)] if numbers else [-1.0, 0.0], "nice": True},
    }
    layers: list[Spec] = [
        {"data": {"values": [{}]}, "mark": {"type": "rule", "color": "var(--line)"}, "encoding": {"y": {**y, "datum": 0}}},
        {
            "mark": {"type": "bar", "color": SERIES[0], "opacity": 0.32, "minBandSize": 2},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "tick", "color": SERIES[0], "thickness": 2.5, "width": {"band": 1}, "orient": "horizontal"},
            "encoding": {"x": x, "y": {**y, "field": "middle"}},
        },
        {
            "transform": [
                {
                    "calculate": f"format(datum.{field}, '.4~g') + ' (ratio ' + format(exp(datum.{field}), '.4~g') + ')'",
                    "as": f"{field}_text",
                }
                for field in _SHOWN
            ],
            "params": [{"name": "near", "select": {"type": "point", "on": "pointerover", "clear": "pointerout", "toggle": False}}],
            "mark": {"type": "rule", "strokeWidth": {"expr": "bandwidth('x')"}, "color": "var(--ink)"},
            "encoding": {
                "x": x,
                "opacity": {"condition": {"param": "near", "empty": False, "value": 0.08}, "value": 0},
                "tooltip": [
                    {"field": "place", "type": "nominal", "title": "trained tokens" if by == "tokens" else "share"},
                    *({"field": f"{field}_text", "type": "nominal", "title": title} for field, title in _SHOWN.items()),
                ],
            },
        },
    ]
    return Chart(
        name=name,
        title=f"{_TITLES[group]} {_BY[by]}",
        unit="nats; median, and from 5% to 95% of the tokens",
        needs=(f"{group}_p50/{by}_...",),
        spec={**frame(layers, height=HEIGHT), "data": {"name": ALONG}},
        over="along the response at one global step",
    )
