"""The charts of the Several runs tab: curves of all runs laid over each other, seeds of a group thin, their mean thick with its band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_minpro.report.page.charts.chart import STEP, Chart, Spec, line_style, step_axis, value_axis
from megatron_minpro.tracking.metrics_table import HEADLINE

RUNS, GROUPS = "runs", "groups"  # datasets: group, run, global_step and the metrics; group, metric, global_step, mean, low, high
CURVES: Mapping[str, tuple[str, str]] = {  # metric -> title, unit
    HEADLINE: ("Reward", "mean of the trained batch"),
    "policy/entropy": ("Entropy", "nats per token"),
    "prefix_min/mean": ("Prefix minimum", "ratio, token mean"),
    "effective_sample_size/token": ("Effective sample size", "of token ratios, share of the batch"),
    "clip/hard": ("Tokens with gradient 0", "share of trained tokens"),
    "rollout/length": ("Response length", "tokens, sampled"),
    "update/grad_norm": ("Gradient norm", "before clipping"),
    "policy/kl_to_behaviour": ("Distance from the sampling policy", "nats per token, KL estimate"),
}


def several_charts(groups: Sequence[str], metrics: Sequence[Mapping[str, float | None]]) -> list[Chart]:
    """One chart for each metric that some run has.

    Args:
        groups: names, in the order of their colours.
        metrics: lines of all runs.
    """
    charts = [_chart(metric, title, unit, groups) for metric, (title, unit) in CURVES.items()]
    return [chart for chart in charts if not chart.missing(metrics)]


def _chart(metric: str, title: str, unit: str, groups: Sequence[str]) -> Chart:
    style = line_style("group", groups)
    of_metric = {"filter": f"datum.metric === {metric!r}"}
    ends = [{"calculate": f"isValid(datum.{end}) ? datum.{end} : datum.mean", "as": f"{end}_end"} for end in ("low", "high")]
    layers: list[Spec] = [
        {
            "data": {"name": GROUPS},
            "transform": [of_metric, *ends],
            "mark": {"type": "area", "opacity": 0.16},
            "encoding": {"x": step_axis(), "y": value_axis("low_end"), "y2": {"field": "high_end"}, "color": style["color"]},
        },
        {
            "data": {"name": RUNS},
            "transform": [{"filter": f"isValid(datum[{metric!r}])"}],
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.4},
            "encoding": {"x": step_axis(), "y": value_axis(metric), "color": style["color"], "detail": {"field": "run"}},
        },
        {
            "data": {"name": GROUPS},
            "transform": [of_metric],
            "mark": {"type": "line"},
            "encoding": {"x": step_axis(), "y": value_axis("mean"), **style},
        },
        {
            "data": {"name": RUNS},
            "transform": [{"filter": f"isValid(datum[{metric!r}])"}],
            "mark": {"type": "point", "size": 60, "opacity": 0},
            "encoding": {
                "x": step_axis(),
                "y": value_axis(metric),
                "tooltip": [
                    {"field": "run", "type": "nominal", "title": "run"},
                    {"field": STEP, "type": "quantitative", "title": "global step", "format": "d"},
                    {"field": metric, "type": "quantitative", "title": title, "format": ".4~g"},
                ],
            },
        },
    ]
    spec = {"width": "container", "height": 190, "autosize": {"type": "fit-x", "contains": "padding"}, "layer": layers}
    return Chart(name=f"several {metric}", title=title, unit=unit, needs=(metric,), spec=spec)
