"""Quantiles along the response for the page: of as many steps as its slider has, by position and by share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_minpro.report.page.charts.chart import STEP, Chart
from megatron_minpro.report.page.charts.heat_map import places
from megatron_minpro.report.page.charts.stretch_bands import BANDS, stretch_bands
from megatron_minpro.report.page.rounded import rounded
from megatron_minpro.report.page.token_budget import evenly

_MOST_STEPS = 40
_CHARTS: tuple[tuple[str, str, Literal["tokens", "share"]], ...] = (
    ("ratio_along_share", "log_ratio", "share"),
    ("prefix_along_share", "log_prefix_min", "share"),
    ("ratio_along_place", "log_ratio", "tokens"),
    ("prefix_along_place", "log_prefix_min", "tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlongResponse:
    """Charts of one step each, and their numbers. `data` goes to the page's scripts."""

    steps: Sequence[int]  # ascending
    charts: Sequence[Chart]
    data: Mapping[str, Any]  # chart -> {places: labels, values: [step][place] -> [p05, p50, p95], null where the step has none}


def along_response(metrics: Sequence[Mapping[str, float | None]]) -> AlongResponse | None:
    """None where no step has any of these quantiles: nothing was trained, or an older version wrote the metrics.

    metrics: lines of metrics.jsonl. Of many steps some are chosen evenly, the first and the last among them.
    """
    names = sorted({name for line in metrics for name, value in line.items() if value is not None and is_quantile_along(name)})
    lines = evenly([line for line in metrics if any(line.get(name) is not None for name in names)], _MOST_STEPS)
    if not lines:
        return None
    charts, data = [], {}
    for chart, group, by in _CHARTS:
        groups = [f"{group}_{band}" for band in BANDS]
        labels = places(names, group=groups[0], by=by)
        stems = [name.removeprefix(groups[0]) for name in labels]
        values = [[_band(line, groups, stem) for stem in stems] for line in lines]
        data[chart] = {"places": list(labels.values()), "values": values}
        numbers = [number for of_step in values for band in of_step if band for number in band]
        charts.append(stretch_bands(chart, group=group, by=by, labels=list(labels.values()), numbers=numbers))
    return AlongResponse(steps=[int(line[STEP] or 0) for line in lines], charts=charts, data=data)


def is_quantile_along(name: str) -> bool:
    """Whether a metric is one of these quantiles."""
    group = name.partition("/")[0]
    return any(group == f"{of}_{band}" for of in ("log_ratio", "log_prefix_min") for band in BANDS)


def _band(line: Mapping[str, float | None], groups: Sequence[str], stem: str) -> list[float] | None:
    found = [value for group in groups if (value := rounded(line.get(group + stem))) is not None]
    return found if len(found) == len(groups) else None
