from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.report.summary import build_summary, paragraph, write_summary

UPDATES = 16


def run_lines(*, num_batches: int, staleness: int) -> list[dict[str, Any]]:
    """What a run of num_batches batches writes: the trained batches' rewards are 0, 1, 2, ... hundredths, they have 100 tokens each.

    The first steps only sample, the last only train. What is sampled has a reward of its own, which the summary must not take.
    """
    lines: list[dict[str, Any]] = []
    for step in range(num_batches + staleness):
        line: dict[str, Any] = {"global_step": step, "time/step": 2.0}
        if step < num_batches:
            line["reward/sampled"] = 0.9
        if step >= staleness:
            behind = min(step - staleness, staleness)
            line |= {"batch/lag_min": UPDATES * behind, "batch/lag_max": UPDATES * (behind + 1) - 1}
            line |= {"reward/trained": (step - staleness) / 100, "batch/tokens": 100}
        lines.append(line)
    return lines


def summary_of(lines: list[dict[str, Any]], *, staleness: int, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "updates": 160,
        "rollouts_sampled": 2560,
        "rollouts_trained": 2560,
        "rollouts_lost": 0,
        "rollouts_dropped": 0,
        "seconds": {"sample": 12.34567, "base model": 60.0},
        "evaluation_before": {"pass_at_1": 0.34, "pass_at_8": 0.71},
        "evaluation_after": {"pass_at_1": 0.86, "pass_at_8": 0.99},
    }
    return build_summary(lines, staleness=staleness, **(options | changes))


def test_the_summary_holds_every_promised_key_with_hand_computed_values() -> None:
    assert summary_of(run_lines(num_batches=10, staleness=2), staleness=2) == {
        "reward_first": pytest.approx((0 + 1 + 2 + 3 + 4) / 500),
        "reward_last": pytest.approx((5 + 6 + 7 + 8 + 9) / 500),
        "reward_window": 5,
        "pass_at_1_before": 0.34,
        "pass_at_1_after": 0.86,
        "pass_at_8_before": 0.71,
        "pass_at_8_after": 0.99,
        "global_steps": 10,
        "updates": 160,
        "lag_min": 32,
        "lag_max": 47,
        "rollouts_sampled": 2560,
        "rollouts_trained": 2560,
        "rollouts_lost": 0,
        "rollouts_dropped": 0,
        "seconds": {"sample": 12.346, "base model": 60.0},
        "tokens_per_second": pytest.approx(10 * 100 / (12 * 2.0)),
    }


def test_on_policy_training_has_no_ramp() -> None:
    summary = summary_of(run_lines(num_batches=3, staleness=0), staleness=0)
    assert (summary["lag_min"], summary["lag_max"], summary["reward_window"]) == (0, 15, 1)


def test_a_run_shorter_than_the_ramp_has_no_lag_after_it() -> None:
    summary = summary_of(run_lines(num_batches=2, staleness=2), staleness=2)
    assert (summary["global_steps"], summary["lag_min"], summary["lag_max"]) == (2, None, None)


def test_nothing_trained_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="at least one trained batch, the metrics hold none"):
        summary_of([], staleness=2)
    with pytest.raises(ValueError, match="at least one trained batch"):
        summary_of([{"global_step": 0, "reward/sampled": 0.5}], staleness=2)


def test_evaluations_must_measure_the_same() -> None:
    with pytest.raises(ValueError, match="expected the same measures"):
        summary_of(run_lines(num_batches=3, staleness=0), staleness=0, evaluation_after={"pass_at_1": 1.0})


def test_the_summary_is_written_as_json(tmp_path: Path) -> None:
    summary = summary_of(run_lines(num_batches=10, staleness=2), staleness=2)
    assert json.loads(write_summary(tmp_path, summary).read_text()) == summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_paragraph_tells_what_was_achieved() -> None:
    summary = summary_of(run_lines(num_batches=10, staleness=2), staleness=2)
    assert paragraph(summary, name="tiny", objective="minpro", staleness=2, run_dir="runs/tiny") == (
        "tiny: 10 global steps (160 updates) of minpro with staleness 2 (policy lag 32 to 47 updates after the ramp). "
        "Reward 0.020 -> 0.070; held-out pass@1 0.340 -> 0.860, pass@8 0.710 -> 0.990. "
        "2,560 responses sampled, 2,560 trained, none lost at 42 response tokens/s. "
        "Everything is in runs/tiny: curves, metrics, rollouts, checkpoints and the exported policy."
    )
    dropped = paragraph(summary | {"rollouts_dropped": 1200}, name="tiny", objective="minpro", staleness=2, run_dir="runs/tiny")
    assert "2,560 trained, 1,200 dropped by dynamic sampling, none lost" in dropped
    assert "3 lost" in paragraph(summary | {"rollouts_lost": 3}, name="tiny", objective="minpro", staleness=2, run_dir="runs/tiny")
