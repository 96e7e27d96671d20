from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from megatron_minpro.report.page.charts.chart import CONFIG, series_style
from megatron_minpro.report.page.charts.curves import any_metric, several_curves
from megatron_minpro.report.page.charts.heat_map import thresholds
from megatron_minpro.report.page.charts.off_policy_tab import off_policy_charts
from megatron_minpro.report.page.charts.run_tab import run_charts, shown_ks
from megatron_minpro.report.page.charts.token_chart import token_chart
from megatron_minpro.tracking.metrics_table import METRICS

LINES = [{"weight/token_1": 1.0, "log_prefix_min/share_0_1": -0.1}]
CHARTS = [*run_charts([1, 8]), *off_policy_charts(LINES), any_metric()]


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for one in value.values() for text in strings(one)]
    if isinstance(value, list | tuple):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) else []


def test_every_colour_is_a_variable_that_the_style_sheet_defines() -> None:
    sheet = (files("megatron_minpro.report.page") / "page.css").read_text()
    defined = set(re.findall(r"(--[a-z0-9-]+):", sheet))
    everything = strings(
        [CONFIG, *(chart.spec for chart in CHARTS), token_chart("log"), [entry.colour for chart in CHARTS for entry in chart.legend]]
    )
    used = {name for text in everything for name in re.findall(r"var\((--[a-z0-9-]+)\)", text)}
    assert len(used) > 10 and used <= defined
    assert [text for text in everything if re.fullmatch(r"#[0-9a-f]{3,8}|rgb.*", text)] == []


def test_names_of_charts_are_unique_and_their_metrics_are_declared() -> None:
    names = [chart.name for chart in CHARTS]
    assert len(set(names)) == len(names)
    declared = {metric.name for metric in METRICS} | {"evaluations", "global_step", "log_ratio/root_mean_square", "weight/share_..."}
    assert {need for chart in CHARTS for need in chart.needs} - declared <= {"log_prefix_min/tokens_...", "weight/tokens_..."}


def test_lines_differ_in_colour_and_dashes() -> None:
    styles = [(colour, tuple(dash)) for colour, dash in map(series_style, range(25))]
    assert len(set(styles)) == 25
    chart = several_curves("x", metrics={"a": "first", "b": "second"}, title="", unit="")
    [line, _] = chart.spec["layer"]
    assert line["encoding"]["color"]["scale"]["domain"] == ["first", "second"] == [entry.label for entry in chart.legend]
    assert len({str(dash) for dash in line["encoding"]["strokeDash"]["scale"]["range"]}) == 2


def test_the_smallest_and_the_largest_k_are_shown() -> None:
    assert shown_ks([8, 1, 2, 4, 16, 32]) == [1, 2, 4, 8, 32]
    assert shown_ks([8, 1]) == [1, 8]


def test_the_browser_uses_the_same_colour_fractions() -> None:
    script = (files("megatron_minpro.report.page") / "tokens.js").read_text()
    fractions = re.search(r"FRACTIONS = \[(.*?)\]", script)
    assert fractions is not None
    assert [float(text) for text in fractions[1].split(",")] == thresholds(1.0)
