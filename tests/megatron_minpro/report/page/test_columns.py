from __future__ import annotations

import pytest

from megatron_minpro.report.page.columns import columns


def test_metrics_become_columns_with_six_digits() -> None:
    found = columns([{"global_step": 0, "a": 1 / 3}, {"global_step": 1, "a": None, "b": 12345678.0}], numbers=1000)
    assert found.values == {"global_step": [0, 1], "a": [0.333333, None], "b": [None, 12345700.0]}
    assert found.note is None


def test_age_is_the_root_of_the_mean_square() -> None:
    found = columns([{"global_step": 0, "log_ratio/mean_square": 0.09}, {"global_step": 1}], numbers=1000)
    assert found.values["log_ratio/root_mean_square"] == [pytest.approx(0.3), None]


def test_quantiles_along_the_response_are_no_columns() -> None:
    lines = [{"global_step": 0, "log_ratio_p05/token_1": -0.1, "log_prefix_min_p95/share_0_1": -0.1, "log_ratio/token_1": 0.5}]
    assert list(columns(lines, numbers=1000).values) == ["global_step", "log_ratio/token_1"]


def test_too_many_steps_are_thinned_and_both_ends_stay() -> None:
    found = columns([{"global_step": step, "a": 0.5} for step in range(1000)], numbers=200)
    steps = found.values["global_step"]
    assert (len(steps), steps[0], steps[-1]) == (100, 0, 999)
    assert found.note == "curves show 100 of 1,000 steps, evenly chosen"
