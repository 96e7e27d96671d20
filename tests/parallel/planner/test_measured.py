"""What the schedules make of measured phases, against the steps that were measured with them."""

from __future__ import annotations

import pytest

from parallel.planner.measured import MeasuredRun, read_measured_runs

RUNS = read_measured_runs()


def test_every_schedule_that_was_measured_has_one_and_two_servers() -> None:
    assert {run.id for run in RUNS} >= {f"tiny-{schedule}-{servers}" for schedule in ("serial", "overlapped") for servers in (1, 2)}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.id)
def test_measured_phases_make_the_measured_step(run: MeasuredRun) -> None:
    # A tenth: what a step does beside its phases, such as writing metrics.
    assert run.composed_s == pytest.approx(run.measured_s, rel=0.10)


@pytest.mark.parametrize("run", [run for run in RUNS if run.schedule == "overlapped"], ids=lambda run: run.id)
def test_one_after_the_other_these_phases_would_take_much_longer(run: MeasuredRun) -> None:
    assert sum(step.seconds("serial") for step in run.steps) / len(run.steps) > 1.3 * run.measured_s
