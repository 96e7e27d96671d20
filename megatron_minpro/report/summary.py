"""summary.json: what a finished run achieved, built from metrics.jsonl and the two evaluations; and one paragraph for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.tracking.metrics_table import HEADLINE

SUMMARY_FILE = "summary.json"
_REWARD_WINDOW = 5  # steps: one batch alone is too noisy to stand for a beginning or an end


def build_summary(
    metrics: Sequence[Mapping[str, float | None]],
    *,
    staleness: int,
    updates: int,
    rollouts_sampled: int,
    rollouts_trained: int,
    rollouts_lost: int,
    rollouts_dropped: int,
    seconds: Mapping[str, float],
    evaluation_before: Mapping[str, float],
    evaluation_after: Mapping[str, float],
) -> dict[str, Any]:
    """The contents of summary.json.

    reward_first and reward_last are means of reward/trained over the first and last reward_window batches. lag_min and lag_max are over
    the batches trained after the ramp (from the staleness-th on), None when there is none. global_steps counts trained batches.
    tokens_per_second counts every trained response token once, over the wall time of all steps.

    Args:
        metrics: the lines of metrics.jsonl, one per global step; metrics_table.py explains the names.
        staleness: of the run.
        updates: optimizer steps over the whole run, resumed parts included.
        rollouts_sampled: responses over the whole run; sampled = trained + lost + dropped.
        rollouts_trained: of these, trained.
        rollouts_lost: of these, sampled again after an interruption.
        rollouts_dropped: of these, dropped by dynamic sampling.
        seconds: wall time by phase.
        evaluation_before: such as {"pass_at_1": 0.34, "pass_at_8": 0.71}; every key appears with _before and _after. {} without evaluation.
        evaluation_after: the same, after training.

    Raises:
        ValueError: no batch was trained, or the two evaluations measured different things.
    """
    trained = [line for line in metrics if line.get("batch/lag_min") is not None]
    rewards = _known(trained, HEADLINE)
    if not rewards:
        raise ValueError("summary: expected at least one trained batch, the metrics hold none")
    window = min(_REWARD_WINDOW, max(1, len(rewards) // 2))  # the two ends never share a batch
    after_ramp = trained[staleness:]
    step_seconds = math.fsum(_known(metrics, "time/step"))
    tokens = math.fsum(_known(metrics, "batch/tokens"))
    return {
        "reward_first": math.fsum(rewards[:window]) / window,
        "reward_last": math.fsum(rewards[-window:]) / window,
        "reward_window": window,
        **_before_and_after(evaluation_before, evaluation_after),
        "global_steps": len(trained),
        "updates": updates,
        "lag_min": min(_known(after_ramp, "batch/lag_min"), default=None),
        "lag_max": max(_known(after_ramp, "batch/lag_max"), default=None),
        "rollouts_sampled": rollouts_sampled,
        "rollouts_trained": rollouts_trained,
        "rollouts_lost": rollouts_lost,
        "rollouts_dropped": rollouts_dropped,
        "seconds": {phase: round(duration, 3) for phase, duration in seconds.items()},
        "tokens_per_second": tokens / step_seconds if step_seconds > 0 else None,
    }


def _known(metrics: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    return [value for line in metrics if (value := line.get(name)) is not None]


def _before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    if set(before) != set(after):
        raise ValueError(f"summary: evaluated {sorted(before)} before and {sorted(after)} after; expected the same measures")
    return {f"{measure}_{moment}": values[measure] for measure in before for moment, values in (("before", before), ("after", after))}


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write run_dir/summary.json, whole or not at all."""
    path = Path(run_dir) / SUMMARY_FILE
    write_atomically(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return path


def paragraph(summary: Mapping[str, Any], *, name: str, objective: str, staleness: int, run_dir: str | Path) -> str:
    """One paragraph for the end of the run.

    Args:
        summary: of build_summary.
        name: of the run.
        objective: its name.
        staleness: of the run.
        run_dir: the run folder, for people to look into.
    """
    lag = "" if summary["lag_min"] is None else f" (policy lag {summary['lag_min']:.0f} to {summary['lag_max']:.0f} updates after the ramp)"
    measures = [key.removesuffix("_before") for key in summary if key.endswith("_before")]
    evaluated = ", ".join(
        f"{measure.replace('pass_at_', 'pass@')} {summary[measure + '_before']:.3f} -> {summary[measure + '_after']:.3f}"
        for measure in measures
    )
    lost = f"{summary['rollouts_lost']:,} lost" if summary["rollouts_lost"] else "none lost"
    dropped = f"{summary['rollouts_dropped']:,} dropped by dynamic sampling, " if summary["rollouts_dropped"] else ""
    speed = "" if summary["tokens_per_second"] is None else f" at {summary['tokens_per_second']:,.0f} response tokens/s"
    return (
        f"{name}: {summary['global_steps']} global steps ({summary['updates']} updates) of {objective} with staleness {staleness}{lag}. "
        f"Reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f}"
        f"{f'; held-out {evaluated}' if evaluated else ''}. "
        f"{summary['rollouts_sampled']:,} responses sampled, {summary['rollouts_trained']:,} trained, {dropped}{lost}{speed}. "
        f"Everything is in {run_dir}: curves, metrics, rollouts, checkpoints and the exported policy."
    )
