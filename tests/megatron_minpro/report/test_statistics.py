"""Student's t, paired differences and Holm against tables, SciPy and numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from megatron_minpro.report.statistics import holm, mean_interval, paired_difference, student_cdf, student_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"),  # two-sided 95 %, from printed tables
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_are_those_of_printed_tables(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)
    assert student_quantile(0.025, freedom) == pytest.approx(-expected, abs=5e-5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 25])
@pytest.mark.parametrize("t", [-30.0, -2.5, -0.3, 0.0, 0.7, 4.0])
def test_distribution_is_the_integral_of_the_density(freedom: int, t: float) -> None:
    # Simpson's rule over the angle, in which the density is bounded: x = sqrt(freedom) tan(angle).
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    end, steps = math.atan(t / math.sqrt(freedom)), 2000
    width = end / steps
    weights = [1, *([4, 2] * (steps // 2 - 1)), 4, 1]
    area = sum(weight * math.cos(index * width) ** (freedom - 1) for index, weight in enumerate(weights)) * width / 3
    assert student_cdf(t, freedom) == pytest.approx(0.5 + constant * area, abs=1e-12)


def test_distribution_needs_a_degree_of_freedom() -> None:
    with pytest.raises(ValueError, match="0 degrees of freedom, expected at least 1"):
        student_cdf(1.0, 0)


def test_interval_of_five_numbers_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)  # t of 4 degrees, variance 2.5
    assert found.mean == 3.0
    assert (found.low, found.high) == (pytest.approx(3.0 - half, abs=1e-5), pytest.approx(3.0 + half, abs=1e-5))


def test_one_number_has_no_interval() -> None:
    found = mean_interval([0.25])
    assert (found.mean, found.low, found.high, found.count) == (0.25, None, None, 1)


def test_paired_difference_by_hand() -> None:
    # Differences 0.1, 0.2, 0.3, -0.1, 0.2: mean 0.14, variance 0.023, t = 0.14 / sqrt(0.023 / 5) = 2.06419.
    found = paired_difference({1: 0.6, 2: 0.7, 3: 0.8, 4: 0.4, 5: 0.7, 9: 99.0}, {5: 0.5, 4: 0.5, 3: 0.5, 2: 0.5, 1: 0.5, 8: -99.0})
    assert found is not None and found.p is not None
    assert found.interval.mean == pytest.approx(0.14)
    assert found.interval.count == 5
    assert (found.positive, found.negative) == (4, 1)
    # scipy.stats.ttest_1samp([.1, .2, .3, -.1, .2], 0).pvalue
    assert found.p == pytest.approx(0.1079388222922764, rel=1e-12)


def test_equal_differences_are_certain_or_none() -> None:
    certain, none = paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}), paired_difference({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0})
    assert certain is not None and none is not None
    assert (certain.p, none.p) == (0.0, 1.0)


def test_a_difference_needs_a_shared_seed() -> None:
    assert paired_difference({1: 1.0}, {2: 1.0}) is None
    alone = paired_difference({1: 1.5}, {1: 1.0})
    assert alone is not None
    assert (alone.interval.mean, alone.p) == (0.5, None)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; never less than the one before.
    assert holm({"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.02}) == pytest.approx({"c": 0.06, "a": 0.04, "d": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
