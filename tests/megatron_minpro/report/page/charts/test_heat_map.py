from __future__ import annotations

import math

import pytest

from megatron_minpro.report.page.charts.heat_map import COLOURS, heat_map, places, thresholds

NAMES = [
    "weight/token_1",
    "weight/tokens_2_3",
    "weight/tokens_65536_on",
    "weight/tokens_16_31",
    "weight/share_20_50",
    "weight/share_1_2",
    "x",
]


def test_places_are_in_the_order_of_the_response() -> None:
    assert list(places(NAMES, group="weight", by="tokens").values()) == ["1", "2–3", "16–31", "65536+"]
    assert list(places(NAMES, group="weight", by="share").values()) == ["1–2%", "20–50%"]
    assert places(NAMES, group="log_prefix_min", by="tokens") == {}


def test_thresholds_are_symmetric_in_log_space() -> None:
    found = thresholds(math.log(2.0))
    assert len(found) == len(COLOURS) - 1
    assert found == [-value for value in reversed(found)]
    assert math.exp(found[-1]) == pytest.approx(2.0)


def test_a_scale_shows_only_the_colours_that_can_occur() -> None:
    below = [{"log_prefix_min/token_1": 0.0, "log_prefix_min/tokens_2_3": -0.6}]
    chart = heat_map("x", group="log_prefix_min", by="tokens", metrics=below)
    assert chart.scale == ((0, None), (1, "0.5"), (2, "0.707"), (3, "0.841"), (4, "0.958"))
    assert len(heat_map("x", group="weight", by="tokens", metrics=[{"weight/token_1": 1.7}]).scale) == len(COLOURS)


def test_without_the_metrics_the_chart_says_which_it_needs() -> None:
    chart = heat_map("x", group="weight", by="share", metrics=[{"weight/token_1": 1.0}])
    assert chart.needs == ("weight/share_...",) and chart.missing([{"weight/token_1": 1.0}])
