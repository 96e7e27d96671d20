"""Everything the page shows of several runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_minpro.report.comparison import Comparison, SeedGroup, compare
from megatron_minpro.report.measure_text import bounds_text, label_of, mean_text, number_text, shown_blocks
from megatron_minpro.report.page.charts.chart import STEP, Chart, Series, legend
from megatron_minpro.report.page.charts.several_tab import CURVES, several_charts
from megatron_minpro.report.page.rounded import rounded
from megatron_minpro.report.page.settings_table import shown_value
from megatron_minpro.report.page.token_budget import evenly
from megatron_minpro.report.page.visible_text import visible
from megatron_minpro.report.runs import RunView
from megatron_minpro.report.statistics import mean_interval

_MOST_STEPS = 200  # of a group's mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table: its name, and a cell for each column."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """Differences of one group from the reference, seed by seed."""

    title: str
    rows: tuple[Row, ...]  # difference, interval, p, pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralPage:
    """`data` goes to the page's scripts; the other fields to the template."""

    legend: Sequence[Series]
    charts: Sequence[Chart]
    groups: Sequence[str]  # names, with the number of their runs
    measures: Sequence[Row]  # a cell for each group
    differences: Sequence[Against]
    runs: Sequence[str]
    settings: Sequence[Row]  # a cell for each run
    notes: Sequence[str]
    data: Mapping[str, Any]


def several_page(views: Sequence[RunView]) -> SeveralPage:
    """Compare the runs; the first one's group is the reference.

    Raises:
        ValueError: a folder is given twice.
    """
    found = compare(views)
    names = [visible(group.name) for group in found.groups]
    shown = [name for block in shown_blocks(found.measures) for name in block]
    return SeveralPage(
        legend=legend([_with_count(group) for group in found.groups]),
        charts=several_charts(names, [line for view in views for line in view.metrics]),
        groups=[_with_count(group) for group in found.groups],
        measures=[Row(name=label_of(name), cells=tuple(mean_text(group.interval(name), name) for group in found.groups)) for name in shown],
        differences=_differences(found, shown),
        runs=[visible(run.label) for run in found.runs],
        settings=[Row(name=visible(key), cells=tuple(map(shown_value, values))) for key, values in found.differing.items()],
        notes=[visible(note) for note in found.notes],
        data={
            "runs": [_place(found, view) for view in views],
            "groups": [row for group, name in zip(found.groups, names, strict=True) for row in group_curves(group, name)],
        },
    )


def _with_count(group: SeedGroup) -> str:
    return f"{visible(group.name)} ({len(group.runs)} seeds)" if len(group.runs) > 1 else visible(group.name)


def _place(comparison: Comparison, view: RunView) -> dict[str, str]:
    """Label and group of the run."""
    run = next(run for run in comparison.runs if run.view is view)
    group = next(group for group in comparison.groups if any(member is run for member in group.runs.values()))
    return {"run": visible(run.label), "group": visible(group.name)}


def _differences(comparison: Comparison, shown: Sequence[str]) -> list[Against]:
    found = []
    for group in comparison.groups:
        mine = {each.measure: each.difference for each in comparison.differences if each.group is group}
        rows = tuple(
            Row(
                name=label_of(name),
                cells=(
                    number_text(mine[name].interval.mean, name, sign="+"),
                    bounds_text(mine[name].interval, name),
                    "-" if mine[name].p is None else f"{mine[name].p:.2g}",
                    str(mine[name].interval.count),
                ),
            )
            for name in shown
            if name in mine
        )
        if rows:
            found.append(Against(title=f"{visible(group.name)} minus {visible(comparison.reference.name)}", rows=rows))
    return found


def group_curves(group: SeedGroup, name: str) -> list[dict[str, Any]]:
    """Mean over the group's runs at each step with its 95 % t interval, as rows; of one run the run itself, without an interval.

    Args:
        group: the runs.
        name: the group's, as the page has it.
    """
    rows: list[dict[str, Any]] = []
    for metric in CURVES:
        values: dict[int, list[float]] = {}
        for run in group.runs.values():
            for line in run.view.metrics:
                if (value := line.get(metric)) is not None:
                    values.setdefault(int(line[STEP] or 0), []).append(value)
        for step in evenly(sorted(values), _MOST_STEPS):
            interval = mean_interval(values[step])
            ends = {} if interval.low is None else {"low": rounded(interval.low), "high": rounded(interval.high)}
            rows.append({"group": name, "metric": metric, STEP: step, "mean": rounded(interval.mean), **ends})
    return rows
