"""Steps of the tiny main job as they were measured, beside what the formula of their schedule makes of their measured phases.

Phases that run beside others were measured there: on two cores they take longer than alone. So this checks how phases make a step, not
how long they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from parallel.planner.published import ROWS
from parallel.planner.rl import GlobalStep, Schedule
from parallel.planner.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """Consecutive steps of one run."""

    id: str
    schedule: Schedule
    measured_s: float  # mean of a step
    steps: tuple[GlobalStep, ...]

    @property
    def composed_s(self) -> float:
        """Mean step by the formula."""
        return sum(step.step_s for step in self.steps) / len(self.steps)


def read_measured_runs() -> list[MeasuredRun]:
    """The rows that ship with the planner."""
    return [_row(values) for values in yaml.safe_load(ROWS.read_text())["measured"]]


def _row(values: dict[str, Any]) -> MeasuredRun:
    steps = values["steps"]
    return MeasuredRun(
        id=values["id"],
        schedule=values["schedule"],
        measured_s=sum(step_s for *_, step_s in steps) / len(steps),
        steps=tuple(_step(phases, values["schedule"]) for *phases, _ in steps),
    )


def _step(phases: Sequence[float], schedule: Schedule) -> GlobalStep:
    sample_s, score_s, update_s, sync_s = phases
    return GlobalStep(
        sampling=Sampling(shares_s=(sample_s,), servers=1),  # until the last server was done
        logprobs_s=score_s,
        updates_s=update_s,
        sync_s=sync_s,
        staleness=2,
        schedule=schedule,
    )
