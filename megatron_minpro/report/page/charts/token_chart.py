"""The line chart under a response: the chosen quantity, token by token. tokens.js gives the rows and marks the token that is looked at."""

from __future__ import annotations

from megatron_minpro.report.page.charts.chart import SERIES, Spec, value_axis

TOKENS = "tokens"  # the dataset: place (from 1), y, below (the prefix minimum beside the ratio), cut
BELOW, CUT = "below", "cut"  # layers that tokens.js leaves out where they have no rows
VALUE = "value"  # the layer that tokens.js draws in steps for a prefix minimum


def token_chart(scale: str) -> Spec:
    """scale: linear, or log for ratios."""
    x = {
        "field": "place",
        "type": "quantitative",
        "axis": {"title": "trained token", "format": "d", "tickMinStep": 1, "tickCount": 10},
        "scale": {"nice": False, "padding": 4},
    }
    y = value_axis("y", scale=scale)
    return {
        "data": {"name": TOKENS},
        "width": "container",
        "height": 170,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": [
            {
                "data": {"values": [{"neutral": 1 if scale == "log" else 0}]},
                "mark": {"type": "rule", "color": "var(--line)", "strokeDash": [2, 2]},
                "encoding": {"y": {**y, "field": "neutral"}},
            },
            {
                "name": BELOW,
                "mark": {"type": "line", "interpolate": "step-before", "color": SERIES[1], "strokeDash": [6, 3], "strokeWidth": 1.5},
                "encoding": {"x": x, "y": {**y, "field": "below"}},
            },
            {"name": VALUE, "mark": {"type": "line", "color": SERIES[0], "strokeWidth": 1.5}, "encoding": {"x": x, "y": y}},
            {
                "name": CUT,
                "transform": [{"filter": "datum.cut > 0"}],
                "mark": {"type": "point", "size": 34, "filled": True, "color": "var(--ink)", "opacity": 1},
                "encoding": {"x": x, "y": y, "shape": {"condition": {"test": "datum.cut > 2", "value": "cross"}, "value": "circle"}},
            },
        ],
    }
