"""The charts of the Run tab."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_minpro.report.page.charts.chart import PERCENT, SERIES, Chart, Spec, frame, legend, line_style
from megatron_minpro.report.page.charts.curves import one_curve, several_curves
from megatron_minpro.tracking.metrics_table import HEADLINE

EVALUATIONS = "evaluations"  # a dataset of its own: step, k, value


def run_charts(ks: Sequence[int]) -> list[Chart]:
    """In the order of the page. ks: of the pass@k that the run measured."""
    return [
        one_curve("reward", metric=HEADLINE, title="Reward", unit="mean of the trained batch"),
        pass_at_k(ks),
        one_curve("entropy", metric="policy/entropy", title="Entropy", unit="nats per token"),
        one_curve("grad_norm", metric="update/grad_norm", title="Gradient norm", unit="before clipping"),
        several_curves(
            "clipped",
            metrics={"clip/hard": "gradient 0", "clip/soft": "weight held", "clip/hard_with_advantage": "gradient 0, advantage ≠ 0"},
            title="Clipped tokens",
            unit="share of trained tokens",
            number=PERCENT,
        ),
        one_curve("length", metric="rollout/length", title="Response length", unit="tokens, sampled"),
        one_curve("prefix_min", metric="prefix_min/mean", title="Prefix minimum", unit="ratio, token mean"),
        several_curves(
            "lag", metrics={"batch/lag_max": "last mini-batch", "batch/lag_min": "first mini-batch"}, title="Policy lag", unit="updates"
        ),
        one_curve("speed", metric="throughput/tokens_per_second", title="Speed", unit="trained tokens per second", positive=True),
    ]


def pass_at_k(ks: Sequence[int]) -> Chart:
    """pass@k of each held-out measurement; the page gives the rows (step, k, value)."""
    labels = [f"pass@{k}" for k in ks]
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "point": {"size": 36, "filled": True}},
            "encoding": {
                "x": {
                    "field": "step",
                    "type": "quantitative",
                    "axis": {"title": None, "format": "d", "tickMinStep": 1},
                    "scale": {"nice": False, "padding": 8},
                },
                "y": {
                    "field": "value",
                    "type": "quantitative",
                    "axis": {"title": None, "format": ".1f"},
                    "scale": {"domain": [0, 1]},
                },
                **line_style("k", labels),
                "tooltip": [
                    {"field": "when", "type": "nominal", "title": "measured"},
                    {"field": "k", "type": "nominal", "title": "measure"},
                    {"field": "value", "type": "quantitative", "format": ".3f", "title": "held-out prompts solved"},
                ],
            },
        }
    ]
    return Chart(
        name="pass_at_k",
        title="pass@k",
        unit="of held-out prompts",
        needs=(EVALUATIONS,),
        spec={**frame(layers), "data": {"name": EVALUATIONS}},
        legend=legend(labels),
    )


def shown_ks(ks: Sequence[int]) -> list[int]:
    """At most as many as there are colours, the smallest and the largest among them."""
    ordered = sorted(ks)
    return ordered if len(ordered) <= len(SERIES) else [*ordered[: len(SERIES) - 1], ordered[-1]]
