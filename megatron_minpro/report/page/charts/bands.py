"""Quantiles of a metric over steps, as bands around the median."""

from __future__ import annotations

from megatron_minpro.report.page.charts.chart import SERIES, Chart, Spec, frame, hover, step_axis, value_axis

_BANDS = ((1, 99, 0.14), (5, 95, 0.2), (25, 75, 0.32))  # percent, percent, opacity


def quantile_bands(name: str, *, group: str, title: str) -> Chart:
    """Bands of `group`/p01 to p99. The logs stand on the axis, in nats."""

    def quantile(percent: int) -> str:
        return f"{group}/p{percent:02d}"

    layers: list[Spec] = [
        {
            "mark": {"type": "area", "color": SERIES[0], "opacity": opacity},
            "encoding": {"x": step_axis(), "y": value_axis(quantile(low)), "y2": {"field": quantile(high)}},
        }
        for low, high, opacity in _BANDS
    ]
    layers.append({"mark": {"type": "line", "color": SERIES[0]}, "encoding": {"x": step_axis(), "y": value_axis(quantile(50))}})
    percents = sorted({percent for low, high, _ in _BANDS for percent in (low, high)} | {50}, reverse=True)
    shown = {quantile(percent): f"{percent}%" for percent in percents}
    return Chart(
        name=name,
        title=title,
        unit="nats; median, bands of 50%, 90% and 98% of the trained tokens",
        needs=(quantile(50),),
        spec=frame([{"transform": [{"filter": f"isValid(datum[{quantile(50)!r}])"}], "layer": layers}, hover(shown)]),
    )
