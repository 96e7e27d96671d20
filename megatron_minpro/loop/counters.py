"""Where a run stands: what the loop counts, and a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass, field


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
class HalfStep:
    """A global step whose update is done and whose batch is missing: no server answered. Only the overlapped schedule leaves one."""

    metrics: dict[str, float]  # of the update
    seconds: dict[str, float]  # by phase, so far
