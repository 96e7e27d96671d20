"""Where a run stands: what the loop counts, and a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# Of the batch that a global step samples. none: the step samples nothing. missing: it is not here yet. unscored: it is here, without
# behaviour log-probs. waiting: it is the youngest one in the staleness buffer.
BatchState = Literal["none", "missing", "unscored", "waiting"]


@dataclass(slots=True, kw_only=True)
class RunCounters:
    """Where a run stands. Seconds and what counts lost responses are kept by rank 0; the rest is the same on all ranks."""

    next_step: int = 0  # the global step that comes next
    trained_batches: int = 0
    rollouts_sampled: int = 0
    rollouts_trained: int = 0
    rollouts_lost: int = 0
    rollouts_dropped: int = 0  # by dynamic sampling
    tokens_trained: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, over all attempts

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Count wall seconds of a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def count_lost(self, sampled: int, *, recorded: int) -> None:
        """Count as lost what earlier attempts sampled after this checkpoint and will be sampled anew.

        Args:
            sampled: by all attempts so far, see tracking/sampled_count.py.
            recorded: lost responses known when the last attempt started.
        """
        kept = self.rollouts_sampled - self.rollouts_lost
        self.rollouts_lost = recorded + max(0, sampled - (kept + recorded))
        self.rollouts_sampled = kept + self.rollouts_lost


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Wall seconds that were spent on a global step."""

    phases: dict[str, float]
    scored_before: float  # of scoring the batch before, where that is part of the step
    wall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedStep:
    """The part of a global step that is done, in JSON's types. step_under_way.py makes it and continues from it.

    The batch that is being trained stays among the waiting ones until its last update. Which mini-batch comes next is a function of the
    batch and of `updates`.
    """

    batch: BatchState  # never unscored. missing: it is sampled again, under the weights that the actor keeps
    updates: int  # optimizer steps done
    lags: tuple[int, ...]  # of those updates
    reports: tuple[dict[str, Any], ...]  # of those updates: UpdateReport, with lists; empty once all are done
    metrics: dict[str, float]  # of the step so far
    seconds: StepSeconds
