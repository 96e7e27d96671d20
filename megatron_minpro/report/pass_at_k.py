"""pass@k from n samples per problem, two estimators, with an interval over problems. Held-out measurements and evaluations use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Estimator = Literal["unbiased", "bootstrap"]
_RESAMPLES_AT_ONCE = 500  # bounds memory at 500 x problems


def unbiased_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of the n samples, drawn without replacement, hold a correct one.

    Chen et al., arXiv:2107.03374, eq. 1, as a product of ratios, so that no factorial overflows.
    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    _check_counts(num_samples, num_correct, k)
    if k > num_samples:
        raise ValueError(f"pass@{k} cannot be estimated without bias from {num_samples} samples")
    if num_samples - num_correct < k:
        return 1.0
    # In logarithms: 1 - (a product near 1) would lose the digits of a small pass@k.
    log_miss = math.fsum(math.log1p(-k / total) for total in range(num_samples - num_correct + 1, num_samples + 1))
    return -math.expm1(log_miss)


def bootstrap_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - (1 - c/n)^k: the expectation of the best of k samples drawn with replacement, what verl's best@k estimates by resampling.

    Biased low: with c=1 and n=k=128 it gives 0.634 where the unbiased estimate is 1. Raises ValueError for impossible counts.
    """
    _check_counts(num_samples, num_correct, k)
    if num_correct == num_samples:
        return 1.0
    return -math.expm1(k * math.log1p(-num_correct / num_samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAtK:
    """The mean over problems and its percentile-bootstrap interval."""

    k: int
    estimator: Estimator
    mean: float
    low: float
    high: float
    confidence: float
    num_problems: int


def estimate_pass_at_k(
    num_samples: Sequence[int],
    num_correct: Sequence[int],
    *,
    k: int,
    estimator: Estimator,
    seed: int,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> PassAtK:
    """Mean pass@k over problems, and its interval.

    The interval resamples problems with replacement (percentile bootstrap), so it says how far another draw of such problems would move
    the mean. With few problems, or all of them alike, it is too narrow.

    Args:
        num_samples: per problem.
        num_correct: per problem.
        k: samples of which one must be correct.
        estimator: unbiased or bootstrap, see the functions of these names.
        seed: of the resampling.
        num_resamples: how often problems are drawn.
        confidence: share of the resampled means inside the interval.

    Raises:
        ValueError: the counts are impossible, or an option is.
    """
    if len(num_samples) != len(num_correct) or len(num_samples) == 0:
        raise ValueError(f"pass@k needs one entry per problem, got {len(num_samples)} sample and {len(num_correct)} correct counts")
    if estimator not in ("unbiased", "bootstrap"):
        raise ValueError(f"pass@k estimator = {estimator!r}, expected 'unbiased' or 'bootstrap'")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence = {confidence}, expected a number between 0 and 1")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    values_P = pass_at_k_values(num_samples, num_correct, k=k, estimator=estimator)
    low, high = bootstrap_interval(values_P, seed=seed, num_resamples=num_resamples, confidence=confidence)
    return PassAtK(
        k=k,
        estimator=estimator,
        mean=math.fsum(values_P) / len(values_P),
        low=low,
        high=high,
        confidence=confidence,
        num_problems=len(values_P),
    )


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`: the ks that are measured."""
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def mean_pass_at_k(num_samples: Sequence[int], num_correct: Sequence[int], *, k: int, estimator: Estimator) -> float:
    """Mean over problems; one entry per problem. Raises ValueError for impossible counts."""
    values_P = pass_at_k_values(num_samples, num_correct, k=k, estimator=estimator)
    return math.fsum(values_P) / len(values_P)


def pass_at_k_values(num_samples: Sequence[int], num_correct: Sequence[int], *, k: int, estimator: Estimator) -> np.ndarray:
    """[P] float64: the estimate for each problem. Raises ValueError for impossible counts."""
    one_problem = unbiased_pass_at_k if estimator == "unbiased" else bootstrap_pass_at_k
    return np.array([one_problem(n, c, k) for n, c in zip(num_samples, num_correct, strict=True)])


def bootstrap_interval(values_P: np.ndarray, *, seed: int, num_resamples: int, confidence: float) -> tuple[float, float]:
    """Percentile interval of the mean of P values under resampling with replacement. Deterministic for a seed."""
    return percentile_interval(bootstrap_means(values_P, seed=seed, num_resamples=num_resamples), confidence=confidence)


def bootstrap_means(values_P: np.ndarray, *, seed: int | Sequence[int], num_resamples: int) -> np.ndarray:
    """[num_resamples] means of P values drawn from values_P with replacement. Deterministic for a seed."""
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        rows = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        means.append(values_P[generator.integers(len(values_P), size=(rows, len(values_P)))].mean(axis=1))
    return np.concatenate(means)


def percentile_interval(values_R: np.ndarray, *, confidence: float) -> tuple[float, float]:
    """The central `confidence` of resampled values."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values_R, [tail, 1.0 - tail])
    return float(low), float(high)


def _check_counts(num_samples: int, num_correct: int, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 <= num_correct <= num_samples or num_samples < 1:
        raise ValueError(f"{num_correct} correct of {num_samples} samples is impossible")
