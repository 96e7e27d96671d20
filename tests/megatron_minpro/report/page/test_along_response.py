from __future__ import annotations

import pytest

from megatron_minpro.report.page.along_response import along_response, is_quantile_along
from megatron_minpro.tracking.metrics_table import METRICS


def line(step: int, **stretches: tuple[float, float, float]) -> dict[str, float | None]:
    """Both groups alike, with the bounds of the stretches in nats."""
    bands = [(group, stretch, values) for group in ("log_ratio", "log_prefix_min") for stretch, values in stretches.items()]
    found = {
        f"{group}_{band}/{stretch}": value
        for group, stretch, values in bands
        for band, value in zip(("p05", "p50", "p95"), values, strict=True)
    }
    return {"global_step": step, **found}


def test_a_step_has_a_band_for_each_stretch_that_it_reaches() -> None:
    metrics = [
        {"global_step": 0, "reward/sampled": 0.5},
        line(1, token_1=(-0.1, 0.0, 1 / 3), share_50_100=(-0.3, -0.1, 0.2)),
        line(2, token_1=(-0.2, 0.1, 0.3), tokens_2_3=(-0.4, -0.3, -0.2), share_50_100=(-0.3, -0.1, 0.2)),
    ]
    found = along_response(metrics)
    assert found is not None and found.steps == [1, 2]
    assert found.data["ratio_along_place"] == {
        "places": ["1", "2–3"],
        "values": [[[-0.1, 0.0, 0.333333], None], [[-0.2, 0.1, 0.3], [-0.4, -0.3, -0.2]]],
    }
    assert found.data["prefix_along_share"] == {"places": ["50–100%"], "values": [[[-0.3, -0.1, 0.2]]] * 2}
    [ratio] = [chart for chart in found.charts if chart.name == "ratio_along_place"]
    domains = [layer["encoding"]["y"]["scale"]["domain"] for layer in ratio.spec["layer"] if "y" in layer["encoding"]]
    assert domains == [[-0.4, pytest.approx(1 / 3, rel=1e-5)]] * 3, "one axis for all steps"


def test_of_many_steps_forty_are_taken_with_both_ends() -> None:
    found = along_response([line(step, token_1=(0.0, 0.0, 0.0)) for step in range(5, 1000)])
    assert found is not None
    assert (len(found.steps), found.steps[0], found.steps[-1]) == (40, 5, 999)


def test_metrics_without_these_quantiles_have_no_charts() -> None:
    assert along_response([]) is None
    assert along_response([{"global_step": 0, "log_ratio/p05": -0.1, "log_ratio/token_1": 0.1, "log_ratio_p05/token_1": None}]) is None


def test_the_metrics_table_names_them() -> None:
    assert sum(is_quantile_along(metric.name) for metric in METRICS) == 2 * 3 * (17 + 7)
