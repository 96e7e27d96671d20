"""The charts of the Off-policy tab: how far the trained policy is from the one that sampled, and what that does to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_minpro.report.page.charts.bands import quantile_bands
from megatron_minpro.report.page.charts.chart import ROOT_MEAN_SQUARE, Chart
from megatron_minpro.report.page.charts.curves import several_curves
from megatron_minpro.report.page.charts.heat_map import heat_map


def off_policy_charts(metrics: Sequence[Mapping[str, float | None]]) -> list[Chart]:
    """In the order of the page. metrics: the run's lines, which say how far positions and colours reach."""
    return [
        heat_map("place", group="log_prefix_min", by="tokens", metrics=metrics),
        heat_map("weight_place", group="weight", by="tokens", metrics=metrics),  # beside a map of as many rows
        heat_map("share", group="log_prefix_min", by="share", metrics=metrics),
        heat_map("weight_share", group="weight", by="share", metrics=metrics),
        quantile_bands("ratio_bands", group="log_ratio", title="Log ratio"),
        quantile_bands("prefix_bands", group="log_prefix_min", title="Log prefix minimum"),
        several_curves(
            "sample_size",
            metrics={
                "effective_sample_size/token": "token weights",
                "effective_sample_size/prefix": "prefix weights",
                "effective_sample_size/sequence": "sequence weights",
            },
            title="Effective sample size",
            unit="share of the batch; 1: all weights are equal",
            domain=(0.0, 1.0),
        ),
        several_curves(
            "mismatch",
            metrics={
                ROOT_MEAN_SQUARE: "age: root mean square of the log ratio",
                "engine_logprob_gap/mean": "mismatch: mean |server − trainer|",
            },
            title="Mismatch and age",
            unit="nats per token, logarithmic",
            scale="log",
            note="Age is the step between the sampling and the trained policy. Mismatch is server against trainer under the same weights.",
        ),
    ]
