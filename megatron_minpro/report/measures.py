"""What one run's curves and evaluations come to. These rules were fixed before any study was run.

The window is a tenth of the trained batches, at least 5, at most half of them (at least 1).

| measure | meaning |
|---|---|
| reward_first | mean of reward/trained over the first window |
| reward_last | the same over the last window |
| reward_best | largest mean of reward/trained over a window of consecutive batches |
| reward_area | mean of reward/trained over all trained batches: the area under the curve, a batch being 1/batches wide |
| collapsed | 1 if reward_last < reward_best - 0.1, else 0 |
| entropy_last | mean of policy/entropy over the last window |
| sample_size | mean over all trained batches of weight/effective_sample_size, of the weights that the objective gave |
| ratio_sample_size | the same of effective_sample_size/token, of the plain ratios, which does not depend on the objective's weights |
| clipped | mean over all trained batches of clip/hard + clip/soft |
| pass_at_K_before, _after | held-out pass@K of the base model and of the last policy |
| pass_at_K_best | largest held-out pass@K of all measurements after the first update |
| weight/..., log_prefix_min/... | mean over all trained batches, by place in the response: token_1, tokens_2_3, ... |
| lag | mean over all trained batches of the middle between batch/lag_min and batch/lag_max |
| tokens_per_s | response tokens trained per second of global steps |
| step_s | median wall time of a global step that trained a batch |
| seconds | wall time of all attempts at the run without the base model; of a Slurm job, of its global steps |

A batch in which a metric was not measured is left out of that metric's means. A measure without any batch is absent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from megatron_minpro.tracking.metrics_table import HEADLINE

COLLAPSE = 0.1  # absolute, in units of reward
WINDOW_SHARE, LEAST_WINDOW = 0.1, 5
# Curves that a row keeps: name in the row -> metric.
CURVES = {
    "reward": HEADLINE,
    "entropy": "policy/entropy",
    "sample_size": "weight/effective_sample_size",
    "ratio_sample_size": "effective_sample_size/token",
    "clip_hard": "clip/hard",
    "clip_soft": "clip/soft",
    "kl": "policy/kl_to_behaviour",
    "weight": "weight/mean",
    "grad_norm": "update/grad_norm",
    "length": "rollout/length",
}
# Measure -> what people read.
LABELS = {
    "reward_first": "reward, first",
    "reward_last": "reward, last",
    "reward_best": "reward, best",
    "reward_area": "reward, area",
    "entropy_last": "entropy, last",
    "sample_size": "sample size",
    "clipped": "clipped",
    "lag": "lag (updates)",
    "tokens_per_s": "tokens/s",
    "step_s": "s per step",
    "seconds": "seconds",
}
BY_PLACE = ("weight", "log_prefix_min")  # groups of metrics by place
_MOST_POINTS = 25
_DIGITS = 4

Curve = Sequence[float | None]


def run_measures(
    metrics: Sequence[Mapping[str, float | None]], evaluations: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float]
) -> dict[str, float]:
    """All measures of the table above.

    Args:
        metrics: the lines of metrics.jsonl.
        evaluations: before, step_000010, ..., after -> {"pass_at_1": 0.34, ...}, in this order.
        seconds: wall time by phase, of all attempts.

    Raises:
        ValueError: no batch was trained.
    """
    found = measures_of(trained_curves(metrics), evaluations) | measures_by_place(metrics)
    trained = [line for line in metrics if line.get(HEADLINE) is not None]
    lags = [(line.get("batch/lag_min"), line.get("batch/lag_max")) for line in trained]
    if known := [(low + high) / 2 for low, high in lags if low is not None and high is not None]:
        found["lag"] = _mean(known)
    if durations := _known([line.get("time/step") for line in trained]):
        found["step_s"] = statistics.median(durations)
    all_steps = math.fsum(_known([line.get("time/step") for line in metrics]))
    tokens = math.fsum(_known([line.get("batch/tokens") for line in trained]))
    if tokens and all_steps:
        found["tokens_per_s"] = tokens / all_steps
    found["seconds"] = seconds.get("train_and_servers", all_steps)
    return found


def trained_curves(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    """One value per trained batch of every curve; the steps that only sample, in which nothing is trained, are left out.

    metrics: the lines of metrics.jsonl.
    """
    trained = [line for line in metrics if line.get(HEADLINE) is not None]
    return {name: [line.get(metric) for line in trained] for name, metric in CURVES.items()}


def window_of(batches: int) -> int:
    """Batches in a window."""
    return max(1, min(max(LEAST_WINDOW, round(WINDOW_SHARE * batches)), batches // 2))


def collapsed(*, last: float, best: float) -> bool:
    """Whether the last window's reward lies more than COLLAPSE below the best window's."""
    return last < best - COLLAPSE


def measures_of(curves: Mapping[str, Curve], evaluations: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The measures of the curves and evaluations.

    Args:
        curves: of trained_curves.
        evaluations: before, step_000010, ..., after -> {"pass_at_1": 0.34, ...}, in this order.

    Raises:
        ValueError: no batch was trained.
    """
    rewards = _known(curves["reward"])
    if not rewards:
        raise ValueError("measures: expected at least one trained batch")
    window = window_of(len(rewards))
    means = [_mean(rewards[start : start + window]) for start in range(len(rewards) - window + 1)]
    last, best = means[-1], max(means)
    found = {"reward_first": means[0], "reward_last": last, "reward_best": best, "reward_area": _mean(rewards)}
    found["collapsed"] = float(collapsed(last=last, best=best))
    if entropies := _known(curves["entropy"]):
        found["entropy_last"] = _mean(entropies[-window:])
    for name in ("sample_size", "ratio_sample_size"):
        if values := _known(curves[name]):
            found[name] = _mean(values)
    clipped = [
        (hard or 0.0) + (soft or 0.0)
        for hard, soft in zip(curves["clip_hard"], curves["clip_soft"], strict=True)
        if hard is not None or soft is not None
    ]
    if clipped:
        found["clipped"] = _mean(clipped)
    return found | _held_out(evaluations)


def measures_by_place(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Means over the batches of weight and prefix minimum along a response: weight/token_1, weight/tokens_2_3, ...

    metrics: the lines of metrics.jsonl.
    """
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith(tuple(f"{group}/token" for group in BY_PLACE)))
    values = {name: _known([line.get(name) for line in metrics]) for name in names}
    return {name: _mean(known) for name, known in values.items() if known}


def _held_out(evaluations: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    found = {
        f"{name}_{label}": value
        for label in ("before", "after")
        for name, value in evaluations.get(label, {}).items()
        if name.startswith("pass_at_")
    }
    trained = [measured for label, measured in evaluations.items() if label != "before"]
    for name in dict.fromkeys(name for measured in trained for name in measured if name.startswith("pass_at_")):
        found[f"{name}_best"] = max(measured[name] for measured in trained if name in measured)
    return found


def thin(curve: Curve) -> list[float | None]:
    """Rounded to 4 significant digits; every k-th value, with the smallest k that leaves at most 25."""
    stride = max(1, math.ceil(len(curve) / _MOST_POINTS))
    return [None if value is None else rounded(value) for value in curve[::stride]]


def rounded(value: float) -> float:
    """To 4 significant digits."""
    return float(f"{value:.{_DIGITS}g}")


def _known(curve: Curve) -> list[float]:
    return [value for value in curve if value is not None]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
