"""Means over seeds and paired differences: Student's t, Holm's correction, signs. Pure functions of numbers.

Cells with the same seed see the same prompts in the same order, so two groups are compared seed by seed: what a seed makes easy or hard for
both cancels. The test is the paired t test. An exact sign-flip test has no p below 2 / 2^seeds (0.0625 with five seeds), so it could never
speak at the 5 % level; the number of seeds with a positive difference stands beside the p instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its interval; low and high are None for fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Paired differences, other minus reference. p is two-sided and not corrected; None for fewer than two pairs."""

    interval: Interval
    p: float | None
    positive: int  # pairs in which the difference is above 0
    negative: int  # below 0


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's distribution with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    Raises ValueError for freedom below 1.
    """
    if freedom < 1:
        raise ValueError(f"Student's distribution: {freedom} degrees of freedom, expected at least 1")
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine_square, sine = math.cos(angle) ** 2, math.sin(angle)
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    series = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine_square * (k - 1) / k
        series += term
    central = (2 / math.pi) * (angle + sine * series) if odd else sine * series  # P(|T| <= |t|)
    return 0.5 + math.copysign(0.5 * min(1.0, central), t)


def student_quantile(probability: float, freedom: int) -> float:
    """The t with student_cdf(t, freedom) = probability, to 1e-12 relative; probability in (0, 1)."""
    if not 0.0 < probability < 1.0:
        raise ValueError(f"Student's distribution: probability {probability}, expected a number between 0 and 1")
    if probability < 0.5:
        return -student_quantile(1.0 - probability, freedom)
    high = 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2.0
    low = 0.0
    while high - low > 1e-13 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return 0.5 * (low + high)


def mean_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean and its t interval. Raises ValueError without a value."""
    if not values:
        raise ValueError("mean: expected at least one value")
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Interval(mean=mean, low=None, high=None, count=count)
    half = student_quantile(0.5 + 0.5 * confidence, count - 1) * _standard_error(values, mean)
    return Interval(mean=mean, low=mean - half, high=mean + half, count=count)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Of the seeds that both have: values minus reference, the t interval of the mean and the p of the paired t test. None without a pair.

    Args:
        values: seed -> measure.
        reference: the same, of what it is compared with.
    """
    gaps = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not gaps:
        return None
    interval = mean_interval(gaps)
    signs = {"positive": sum(gap > 0 for gap in gaps), "negative": sum(gap < 0 for gap in gaps)}
    if len(gaps) < 2:
        return Difference(interval=interval, p=None, **signs)
    error = _standard_error(gaps, interval.mean)
    if error == 0.0:  # all differences are equal: certain, or no difference at all
        return Difference(interval=interval, p=1.0 if interval.mean == 0.0 else 0.0, **signs)
    return Difference(interval=interval, p=2.0 * student_cdf(-abs(interval.mean) / error, len(gaps) - 1), **signs)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of one family of tests: name -> adjusted p, at most 1 (Holm, 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _standard_error(values: Sequence[float], mean: float) -> float:
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
