"""Curves of metrics over global steps."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_minpro.report.page.charts.chart import SERIES, STEP, Chart, Spec, frame, hover, legend, line_style, step_axis, value_axis

SMOOTHED_STEPS = 5


def one_curve(name: str, *, metric: str, title: str, unit: str, number: str | None = None, positive: bool = False) -> Chart:
    """Each step thinly, the mean of the last steps thickly.

    Args:
        name: of the chart.
        metric: what is drawn.
        title: of the chart.
        unit: of the metric.
        number: how the axis writes values.
        positive: leave out steps without a positive value: where nothing is trained, nothing is said.
    """
    y = value_axis(metric, number=number)
    known = {"filter": f"isValid(datum[{metric!r}])" + (f" && datum[{metric!r}] > 0" if positive else "")}
    smoothed = {"window": [{"op": "mean", "field": metric, "as": "smoothed"}], "frame": [1 - SMOOTHED_STEPS, 0]}
    layers: list[Spec] = [
        {
            "transform": [known],
            "mark": {"type": "line", "color": SERIES[0], "opacity": 0.35, "strokeWidth": 1, "point": {"size": 8, "color": SERIES[0]}},
            "encoding": {"x": step_axis(), "y": y},
        },
        {
            "transform": [known, smoothed],
            "mark": {"type": "line", "color": SERIES[0]},
            "encoding": {"x": step_axis(), "y": {**y, "field": "smoothed"}},
        },
        hover({metric: title}),
    ]
    return Chart(name=name, title=title, unit=unit, needs=(metric,), spec=frame(layers), headline=metric, positive=positive)


def several_curves(
    name: str,
    *,
    metrics: Mapping[str, str],
    title: str,
    unit: str,
    scale: str = "linear",
    number: str | None = None,
    note: str = "",
    domain: tuple[float, float] | None = None,
) -> Chart:
    """One line for each metric, told apart by colour and by dashes.

    Args:
        name: of the chart.
        metrics: name -> label.
        title: of the chart.
        unit: of all metrics.
        scale: linear or log.
        number: how the axis writes values.
        note: how to read it.
        domain: of the y-axis; None: of the data.
    """
    labels = list(metrics.values())
    lines: Spec = {
        "transform": [
            {"fold": list(metrics), "as": ["metric", "value"]},
            {"filter": "isValid(datum.value)" + (" && datum.value > 0" if scale == "log" else "")},
            {"calculate": f"{dict(metrics)!r}[datum.metric]", "as": "label"},
        ],
        "mark": {"type": "line"},
        "encoding": {
            "x": step_axis(),
            "y": value_axis("value", scale=scale, number=number, domain=domain),
            **line_style("label", labels),
        },
    }
    spec = frame([lines, hover(metrics)])
    return Chart(name=name, title=title, unit=unit, needs=tuple(metrics), spec=spec, note=note, legend=legend(labels))


def any_metric() -> Chart:
    """The chart of whichever metric a reader chooses; the page puts it into the field `chosen`."""
    chart = one_curve("any", metric="chosen", title="Any metric", unit="")
    return Chart(name=chart.name, title=chart.title, unit="", needs=(STEP,), spec=chart.spec, wide=True)
