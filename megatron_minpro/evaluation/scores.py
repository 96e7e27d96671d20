"""From grades to numbers: pass@k with intervals, and how the samples ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_minpro.evaluation.grade_file import read_grades
from megatron_minpro.evaluation.problems import Problem
from megatron_minpro.evaluation.responses import read_responses
from megatron_minpro.report.pass_at_k import (
    Estimator,
    PassAtK,
    bootstrap_means,
    estimate_pass_at_k,
    pass_at_k_values,
    percentile_interval,
    powers_of_two,
)

ESTIMATORS: tuple[Estimator, ...] = ("unbiased", "bootstrap")
CONFIDENCE, NUM_RESAMPLES, SEED = 0.95, 10_000, 0
_LARGEST_K = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The graded samples of one benchmark. P problems."""

    benchmark: str
    title: str
    problem_ids: tuple[str, ...]  # [P]
    num_samples: tuple[int, ...]  # [P]
    num_correct: tuple[int, ...]  # [P]
    without_answer: int
    truncated: int  # cut by the length limit
    other_endings: dict[str, int]  # what an endpoint called the end of a response, other than stop and length: content_filter ...
    without_content: int  # an endpoint gave reasoning or nothing, but no content
    grading_errors: dict[str, int]  # timeout, crash, exceptions: math-verify failed on so many samples
    num_tokens: int

    @property
    def ks(self) -> list[int]:
        """1, 2, 4, ... 128, as far as every problem has the samples for it."""
        return powers_of_two(min(_LARGEST_K, *self.num_samples))


class Incomplete(ValueError):
    """A benchmark lacks responses or grades: an evaluation was interrupted and not continued."""


def count(benchmark: str, title: str, problems: Sequence[Problem], *, responses: Path, grades: Path, samples: int) -> Counts:
    """Read both files once. Raises Incomplete when they do not hold exactly `samples` graded responses to every problem."""
    sampled: Counter[str] = Counter()
    truncated = num_tokens = without_content = 0
    other_endings: Counter[str] = Counter()
    for _, response in read_responses(responses):
        sampled[response.problem_id] += 1
        truncated += response.finish_reason == "length"
        other_endings.update([response.finish_reason] if response.finish_reason not in ("stop", "length") else [])
        without_content += response.without_content
        num_tokens += response.num_tokens
    graded: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    without_answer = 0
    for grade in read_grades(grades):
        graded[grade.problem_id] += 1
        correct[grade.problem_id] += grade.correct
        without_answer += grade.extracted is None
        if grade.error is not None:
            errors[grade.error.partition(":")[0]] += 1
    ids = [problem.problem_id for problem in problems]
    for what, counted in (("responses", sampled), ("grades", graded)):
        wrong = next((name for name in ids if counted[name] != samples), None)
        if wrong is not None or len(counted) != len(ids):
            have = "strange problems" if wrong is None else f"{counted[wrong]} {what} for problem {wrong}"
            raise Incomplete(f"{grades.parent.parent}: {benchmark} has {have}, expected {samples} for each of {len(ids)} problems")
    return Counts(
        benchmark=benchmark,
        title=title,
        problem_ids=tuple(ids),
        num_samples=tuple(graded[name] for name in ids),
        num_correct=tuple(correct[name] for name in ids),
        without_answer=without_answer,
        truncated=truncated,
        other_endings=dict(other_endings),
        without_content=without_content,
        grading_errors=dict(errors),
        num_tokens=num_tokens,
    )


def pass_at_k_table(counts: Counts) -> list[PassAtK]:
    """Both estimators for every k, each with its interval over problems."""
    return [
        estimate_pass_at_k(
            counts.num_samples,
            counts.num_correct,
            k=k,
            estimator=estimator,
            seed=SEED,
            num_resamples=NUM_RESAMPLES,
            confidence=CONFIDENCE,
        )
        for estimator in ESTIMATORS
        for k in counts.ks
    ]


# The benchmarks over which table 2 of the MinPRO paper averages pass@k: those with enough samples per problem for large k.
PASS_AT_K_BENCHMARKS = ("amc23", "aime24", "aime25")


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The plain mean of several numbers, and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageCurve:
    """One estimator's pass@k, averaged over benchmarks: for every k, and over all k."""

    estimator: Estimator
    by_k: dict[int, Average]
    over_k: Average


def average_pass_at_1(all_counts: Sequence[Counts]) -> Average:
    """Mean over benchmarks. Every benchmark weighs the same, whatever its size."""
    return _average(*_benchmark_mean(all_counts, k=1, estimator="unbiased"))


def average_curves(all_counts: Sequence[Counts]) -> list[AverageCurve]:
    """The layout of the paper's table 2: mean over benchmarks of pass@k for every k that all of them have, and the mean of these over k."""
    ks = sorted(set.intersection(*(set(counts.ks) for counts in all_counts)))
    curves = []
    for estimator in ESTIMATORS:
        found = {k: _benchmark_mean(all_counts, k=k, estimator=estimator) for k in ks}
        # The same problems are drawn for every k, so the interval of the mean over k knows that its parts move together.
        over_k = float(np.mean([mean for mean, _ in found.values()])), np.mean([means_R for _, means_R in found.values()], axis=0)
        by_k = {k: _average(mean, means_R) for k, (mean, means_R) in found.items()}
        curves.append(AverageCurve(estimator=estimator, by_k=by_k, over_k=_average(*over_k)))
    return curves


def _benchmark_mean(all_counts: Sequence[Counts], *, k: int, estimator: Estimator) -> tuple[float, np.ndarray]:
    """The mean over benchmarks, and its resamples [R]: each benchmark's problems are drawn on their own."""
    values = [pass_at_k_values(counts.num_samples, counts.num_correct, k=k, estimator=estimator) for counts in all_counts]
    resampled = [bootstrap_means(values_P, seed=[SEED, index], num_resamples=NUM_RESAMPLES) for index, values_P in enumerate(values)]
    return float(np.mean([values_P.mean() for values_P in values])), np.mean(resampled, axis=0)


def _average(mean: float, means_R: np.ndarray) -> Average:
    low, high = percentile_interval(means_R, confidence=CONFIDENCE)
    return Average(mean=mean, low=low, high=high)


def as_json(counts: Counts) -> dict[str, Any]:
    """One benchmark's part of results.json."""
    samples = sum(counts.num_samples)
    return {
        "title": counts.title,
        "problems": len(counts.problem_ids),
        "samples_per_problem": counts.num_samples[0],
        "samples": samples,
        "correct": sum(counts.num_correct),
        "without_answer": counts.without_answer,
        "truncated": counts.truncated,
        "other_endings": counts.other_endings,
        "without_content": counts.without_content,
        "grading_errors": counts.grading_errors,
        "mean_tokens": counts.num_tokens / samples,
        "pass_at_k": [
            {"k": entry.k, "estimator": entry.estimator, "mean": entry.mean, "low": entry.low, "high": entry.high}
            for entry in pass_at_k_table(counts)
        ],
        "correct_per_problem": dict(zip(counts.problem_ids, counts.num_correct, strict=True)),
    }
