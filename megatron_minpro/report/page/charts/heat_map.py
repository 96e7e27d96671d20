"""A mean by place in the response (upwards) and global step (to the right), as colours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from megatron_minpro.report.page.charts.chart import STEP, STEPS, Chart, Spec
from megatron_minpro.report.page.colour_limits import nice_factor

_TITLES = {"log_prefix_min": "Prefix minimum", "weight": "Weight"}
_BY = {"tokens": "by position", "share": "by share of the response"}
_FRACTIONS = (-1.0, -0.5, -0.25, -0.0625, 0.0625, 0.25, 0.5, 1.0)  # of the limit, where one colour ends and the next begins
_ROW_HEIGHT = 20  # pixels
COLOURS = tuple(f"var(--scale-{place})" for place in range(len(_FRACTIONS) + 1))


def thresholds(limit: float) -> list[float]:
    """Where the nine colours of a symmetric scale meet. tokens.js uses the same fractions."""
    return [fraction * limit for fraction in _FRACTIONS]


def places(names: Sequence[str], *, group: str, by: Literal["tokens", "share"]) -> dict[str, str]:
    """Metric -> its label, from the beginning of a response to its end. by: absolute positions, or percent of the response."""
    pattern = rf"{re.escape(group)}/token_(1)" if by == "tokens" else r"(?!)"
    stretch = rf"{re.escape(group)}/{by}_(\d+)_(\d+|on)"
    found = [(int(match[1]), name, match) for name in names if (match := re.fullmatch(pattern, name) or re.fullmatch(stretch, name))]
    unit = "%" if by == "share" else ""
    return {name: _label(match.groups(), unit) for _, name, match in sorted(found, key=lambda row: row[0])}


def _label(bounds: Sequence[str], unit: str) -> str:
    if len(bounds) == 1:
        return bounds[0]
    return f"{bounds[0]}+" if bounds[1] == "on" else f"{bounds[0]}–{bounds[1]}{unit}"


def heat_map(name: str, *, group: str, by: Literal["tokens", "share"], metrics: Sequence[Mapping[str, float | None]]) -> Chart:
    """Of `log_prefix_min` or `weight`, by absolute position or by share of the response.

    Args:
        name: of the chart.
        group: the metrics' group. A log is shown as it is, a ratio by its log.
        by: tokens or share.
        metrics: the run's lines, which say which places responses reach and how strong colours must be.
    """
    labels = places(sorted({name for line in metrics for name, value in line.items() if value is not None}), group=group, by=by)
    is_log = group.startswith("log_")
    values = [value for line in metrics for one in labels if (value := line.get(one)) is not None]
    logs = np.array([value if is_log else math.log(abs(value)) if value else -math.inf for value in values])
    limit = nice_factor(logs)
    return Chart(
        name=name,
        title=f"{_TITLES[group]} {_BY[by]}",
        unit="mean over tokens, by global step" if not is_log else "exp of the mean log, by global step",
        needs=tuple(labels) or (f"{group}/{by}_...",),
        spec=_spec(labels, is_log=is_log, limit=limit),
        scale=_scale(limit, only_below=not any(log > _FRACTIONS[4] * limit for log in logs)),
    )


def _scale(limit: float, *, only_below: bool) -> tuple[tuple[int, str | None], ...]:
    """Each colour, with the ratio where it begins; only those up to 1 where nothing lies above."""
    bounds = [None, *(f"{math.exp(bound):.3g}" for bound in thresholds(limit))]
    return tuple(enumerate(bounds))[: 5 if only_below else None]


def _spec(labels: Mapping[str, str], *, is_log: bool, limit: float) -> Spec:
    order = list(reversed(list(labels.values())))  # the beginning of the response at the bottom
    return {
        "data": {"name": STEPS},
        "width": "container",
        "height": _ROW_HEIGHT * max(1, len(labels)),
        "autosize": {"type": "fit-x", "contains": "padding"},
        "transform": [
            {"fold": list(labels), "as": ["metric", "value"]},
            {"filter": "isValid(datum.value)"},
            {"calculate": "datum.value" if is_log else "log(max(abs(datum.value), 1e-30))", "as": "log"},
            {"calculate": "exp(datum.log)", "as": "ratio"},
            {"calculate": f"{dict(labels)!r}[datum.metric]", "as": "place"},
            {"calculate": f"datum.{STEP} + 1", "as": "next_step"},
        ],
        "params": [{"name": "count", "value": 1}],
        # Lines between narrow cells would hide their colours.
        "mark": {"type": "rect", "stroke": "var(--surface)", "strokeWidth": {"expr": "width / count < 6 ? 0 : 0.5"}},
        "encoding": {
            "x": {
                "field": STEP,
                "type": "ordinal",
                "axis": {
                    "title": None,
                    "labelAngle": 0,
                    "labelOverlap": "greedy",
                    "labelSeparation": 8,
                    "domain": False,
                },
                "scale": {"paddingInner": 0},
            },
            "y": {"field": "place", "type": "ordinal", "sort": order, "axis": {"title": None}},
            "color": {
                "field": "log",
                "type": "quantitative",
                "scale": {"type": "threshold", "domain": thresholds(limit), "range": list(COLOURS)},
                "legend": None,
            },
            "tooltip": [
                {"field": STEP, "type": "quantitative", "title": "global step", "format": "d"},
                {"field": "place", "type": "nominal", "title": "place"},
                {"field": "ratio", "type": "quantitative", "title": "ratio", "format": ".4~g"},
                {"field": "log", "type": "quantitative", "title": "log", "format": ".4~g"},
            ],
        },
    }
