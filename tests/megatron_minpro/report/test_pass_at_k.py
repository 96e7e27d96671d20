from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_minpro.report.pass_at_k import bootstrap_interval, bootstrap_pass_at_k, estimate_pass_at_k, unbiased_pass_at_k


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # 1 - C(3,2) / C(4,2) = 1 - 3/6
        (5, 2, 3, 0.9),  # 1 - C(3,3) / C(5,3) = 1 - 1/10
        (8, 0, 8, 0.0),
        (8, 1, 8, 1.0),
        (8, 8, 1, 1.0),
        (128, 1, 128, 1.0),
    ],
)
def test_unbiased_estimator_gives_the_numbers_worked_by_hand(num_samples: int, num_correct: int, k: int, expected: float) -> None:
    assert unbiased_pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 1, 2, 0.4375),  # 1 - (3/4)^2
        (8, 8, 3, 1.0),
        (8, 0, 3, 0.0),
        (128, 1, 128, 0.63356),  # 1 - (127/128)^128, about 1 - (1 - 1/256) / e; not 1
        (2, 1, 4, 0.9375),  # k may exceed n
    ],
)
def test_bootstrap_expectation_gives_the_numbers_worked_by_hand(num_samples: int, num_correct: int, k: int, expected: float) -> None:
    assert bootstrap_pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, rel=1e-5)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    num_samples = draw(st.integers(1, 300))
    return num_samples, draw(st.integers(0, num_samples)), draw(st.integers(1, num_samples))


@given(counts())
def test_both_estimators_equal_exact_rational_arithmetic(case: tuple[int, int, int]) -> None:
    num_samples, num_correct, k = case
    unbiased = 1 - Fraction(math.comb(num_samples - num_correct, k), math.comb(num_samples, k))
    bootstrap = 1 - Fraction(num_samples - num_correct, num_samples) ** k
    # 300 rounded logarithms are added
    assert unbiased_pass_at_k(num_samples, num_correct, k) == pytest.approx(float(unbiased), rel=1e-12)
    assert bootstrap_pass_at_k(num_samples, num_correct, k) == pytest.approx(float(bootstrap), rel=1e-12)


def test_a_tiny_pass_rate_keeps_its_digits() -> None:
    assert unbiased_pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-14)
    assert bootstrap_pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-14)


def test_the_mean_is_over_problems_also_when_sample_counts_differ() -> None:
    estimate = estimate_pass_at_k([4, 2], [1, 2], k=2, estimator="unbiased", seed=0)
    assert estimate.mean == pytest.approx((0.5 + 1.0) / 2)
    assert estimate.num_problems == 2


def test_the_interval_equals_the_binomial_quantiles() -> None:
    # Ten problems, five solved: a resample solves Binomial(10, 1/2). P(X <= 1) = 0.0107 and P(X <= 2) = 0.0547, so the 2.5% quantile is 2.
    estimate = estimate_pass_at_k([1] * 10, [1, 0] * 5, k=1, estimator="unbiased", seed=3)
    assert (estimate.low, estimate.mean, estimate.high) == (0.2, 0.5, 0.8)


def test_the_interval_shrinks_with_the_root_of_the_number_of_problems() -> None:
    wide = estimate_pass_at_k([1] * 100, [1, 0] * 50, k=1, estimator="bootstrap", seed=0)
    narrow = estimate_pass_at_k([1] * 1600, [1, 0] * 800, k=1, estimator="bootstrap", seed=0)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)  # normal approximation; resampling noise of 10,000 draws
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.1)


def test_the_interval_depends_on_the_seed_alone() -> None:
    values = np.linspace(0, 1, 37)
    once, again = (bootstrap_interval(values, seed=5, num_resamples=700, confidence=0.9) for _ in range(2))
    assert once == again != bootstrap_interval(values, seed=6, num_resamples=700, confidence=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 5, 1), "5 correct of 4"),
        ((4, -1, 1), "-1 correct of 4"),
        ((0, 0, 1), "0 correct of 0"),
        ((4, 1, 0), "k must be at least 1"),
        ((4, 1, 5), "pass@5 cannot be estimated without bias from 4"),
    ],
)
def test_impossible_counts_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unbiased_pass_at_k(*arguments)


def test_counts_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sample and 1 correct"):
        estimate_pass_at_k([1, 1], [1], k=1, estimator="unbiased", seed=0)
    with pytest.raises(ValueError, match="0 sample"):
        estimate_pass_at_k([], [], k=1, estimator="unbiased", seed=0)
