"""From run folders to one HTML file that holds everything it needs."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
import vl_convert

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.report.page.charts.chart import CONFIG
from megatron_minpro.report.page.charts.curves import SMOOTHED_STEPS, any_metric
from megatron_minpro.report.page.charts.token_chart import token_chart
from megatron_minpro.report.page.run_page import RunPage, run_page
from megatron_minpro.report.page.script_data import script_json
from megatron_minpro.report.page.settings_table import shipped_settings
from megatron_minpro.report.page.several_page import SeveralPage, several_page
from megatron_minpro.report.page.versions import versions
from megatron_minpro.report.runs import RunView

_TOKEN_CHARACTERS = 2_500_000  # of all runs together
_NUMBERS = 60_000  # of metrics, of all runs together
_SCRIPTS = ("base.js", "charts.js", "tokens.js", "tabs.js")  # in the order in which they run
_ASSETS = files(__package__)


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
    scripts = [chart_library(), *map(_asset, _SCRIPTS)]
    return _template().render(
        runs=runs,
        several=several,
        smoothed_steps=SMOOTHED_STEPS,
        data=script_json(_data(runs, several)),
        scripts=scripts,
        script_hashes=[_hash(script) for script in scripts],
        style=_asset("page.css"),
        versions=versions(),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


@functools.cache
def chart_library() -> str:
    """Vega, Vega-Lite and vega-embed, as one script that vl-convert makes of its own copies."""
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default


def _data(runs: Sequence[RunPage], several: SeveralPage | None) -> dict[str, object]:
    return {
        "config": CONFIG,
        "specs": {"any": any_metric().spec, "tokens_log": token_chart("log"), "tokens_linear": token_chart("linear")},
        "runs": [
            {
                "name": run.name,
                **run.data,
                "specs": {
                    placed.chart.name: placed.chart.spec for placed in (*run.run_charts, *run.off_policy_charts) if placed.missing is None
                },
            }
            for run in runs
        ],
        "several": None if several is None else {**several.data, "specs": {chart.name: chart.spec for chart in several.charts}},
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_asset("page.html.j2"))


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """How the page's security policy names a script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
