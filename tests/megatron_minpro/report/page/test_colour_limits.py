from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_minpro.report.page.colour_limits import colour_limits, nice_factor, nice_number


def test_limits_are_numbers_that_people_know() -> None:
    assert nice_factor(np.array([0.0, 0.15, -0.18])) == math.log(1.2)
    assert nice_factor(np.array([-30.0])) == math.log(1e4)
    assert nice_number(np.array([0.0, 0.031])) == 0.05
    assert nice_number(np.array([-700.0])) == 1000.0
    assert nice_number(np.zeros(3)) == 1.0


def test_values_that_are_missing_or_infinite_do_not_count() -> None:
    assert nice_factor(np.array([np.nan, -np.inf, 0.01])) == pytest.approx(math.log(1.02))
    assert nice_factor(np.array([np.nan])) == math.log(1.001)


def test_each_quantity_has_its_own_limit() -> None:
    streams = {
        "behaviour_logprobs": np.array([-1.0, -2.0]),
        "logprobs": np.array([-1.3, -2.0]),
        "engine_logprobs": np.array([-1.003, -2.0]),
        "prefix_min": np.array([0.0, -0.9]),
        "weights": np.array([0.0, 1.01]),
        "entropy": np.array([0.3, 1.7]),
    }
    limits = colour_limits([(streams, -3.0)])
    factors = {"ratio": 1.5, "prefix_min": 5.0, "weight": 1.01}
    numbers = {"pull": 5.0, "mismatch": 0.005, "entropy": 2.0}
    assert limits == {**{name: math.log(factor) for name, factor in factors.items()}, **numbers}
