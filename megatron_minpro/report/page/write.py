"""From run folders to one HTML file that holds everything it needs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.report.page.charts.chart import CONFIG
from megatron_minpro.report.page.charts.curves import SMOOTHED_STEPS, any_metric
from megatron_minpro.report.page.charts.token_chart import token_chart
from megatron_minpro.report.page.document import asset, chart_library, render
from megatron_minpro.report.page.run_page import RunPage, run_page
from megatron_minpro.report.page.settings_table import shipped_settings
from megatron_minpro.report.page.several_page import SeveralPage, several_page
from megatron_minpro.report.runs import RunView

_TOKEN_CHARACTERS = 2_500_000  # of all runs together
_NUMBERS = 60_000  # of metrics, of all runs together
_SCRIPTS = ("base.js", "charts.js", "tokens.js", "tabs.js")  # in the order in which they run


def write_page(views: Sequence[RunView], path: Path) -> Path:
    """Write the page of these runs, whole or not at all.

    Args:
        views: the runs, at least one.
        path: of the file.

    Returns:
        path.

    Raises:
        ValueError: a run is given twice.
    """
    write_atomically(path, page_html(views), durable=False)
    return path


def page_html(views: Sequence[RunView]) -> str:
    """The page of these runs."""
    shipped = shipped_settings()
    runs = [
        run_page(view, shipped=shipped, numbers=_NUMBERS // len(views), token_characters=_TOKEN_CHARACTERS // len(views)) for view in views
    ]
    several = several_page(views) if len(views) > 1 else None
    return render(
        asset("page.html.j2"),
        scripts=[chart_library(), *map(asset, _SCRIPTS)],
        style=asset("page.css"),
        data=_data(runs, several),
        runs=runs,
        several=several,
        smoothed_steps=SMOOTHED_STEPS,
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _data(runs: Sequence[RunPage], several: SeveralPage | None) -> dict[str, object]:
    return {
        "config": CONFIG,
        "specs": {"any": any_metric().spec, "tokens_log": token_chart("log"), "tokens_linear": token_chart("linear")},
        "runs": [
            {
                "name": run.name,
                **run.data,
                "specs": {
                    **{
                        placed.chart.name: placed.chart.spec
                        for placed in (*run.run_charts, *run.off_policy_charts)
                        if placed.missing is None
                    },
                    **{chart.name: chart.spec for chart in (run.along.charts if run.along is not None else ())},
                },
            }
            for run in runs
        ],
        "several": None if several is None else {**several.data, "specs": {chart.name: chart.spec for chart in several.charts}},
    }
