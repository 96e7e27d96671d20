"""Distributions of lengths: the numbers of a cut exponential in closed form, and groups of observed lengths that keep their mean."""

from __future__ import annotations

import math
import random

import pytest

from parallel.planner.lengths import exponential, observed


def test_a_cut_exponential_has_the_mean_and_the_mean_square_of_the_formula() -> None:
    found = exponential(8000, 20480)
    assert found.mean == pytest.approx(8000, rel=1e-6)
    assert found.longest == 20480
    scale = 8887.0134  # scale * (1 - exp(-20480 / scale)) = 8000
    mean_square = 2 * (scale**2 - math.exp(-20480 / scale) * (scale**2 + scale * 20480))
    assert found.under_way == pytest.approx(mean_square / (2 * 8000), rel=0.005)


def test_equal_lengths_are_half_grown_while_they_are_under_way() -> None:
    assert exponential(300, 300).tokens == (300.0,)
    assert exponential(300, 300).under_way == 150


@pytest.mark.parametrize("count", [1, 7, 128, 1000, 4097])
def test_groups_of_observed_lengths_keep_mean_and_order(count: int) -> None:
    draw = random.Random(count)
    lengths = [draw.randint(1, 500) for _ in range(count)]
    found = observed(lengths, "a run")
    assert found.mean == pytest.approx(sum(lengths) / count)
    assert list(found.tokens) == sorted(found.tokens) and len(found.tokens) <= 128
    exact = sum(length**2 for length in lengths) / (2 * sum(lengths))
    assert found.under_way == pytest.approx(exact, rel=0.01)


def test_no_response_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="empty: expected the lengths of responses, found none"):
        observed([], "empty")
