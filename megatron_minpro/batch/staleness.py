"""Exactly controlled staleness: a batch is trained n global steps after it was sampled, never earlier, never later."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_minpro.batch.sample import RolloutBatch


@dataclass(frozen=True, slots=True)
class LagRange:
    """Optimizer steps between the weights that sampled a batch and the weights that one of its mini-batches meets."""

    smallest: int
    largest: int


def expected_lag(trained_index: int, *, staleness: int, updates_per_step: int) -> LagRange:
    """Lag over the mini-batches of the trained_index-th trained batch (from 0).

    The first n+1 batches were all sampled by the initial policy, so the lag rises over them: 0..u-1, u..2u-1, ..., and stays at
    u*n .. u*(n+1)-1 from then on (u updates a step).
    """
    steps_behind = min(trained_index, staleness)
    return LagRange(updates_per_step * steps_behind, updates_per_step * (steps_behind + 1) - 1)


class StalenessBuffer:
    """Holds the batches of the last n global steps."""

    def __init__(self, staleness: int) -> None:
        if staleness < 0:
            raise ValueError(f"staleness: {staleness} must be at least 0")
        self.staleness = staleness
        self._waiting: deque[RolloutBatch] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, step: int, batch: RolloutBatch) -> None:
        """Take in the batch sampled at global step `step`. Raises ValueError when a step is skipped or repeated."""
        if batch.sampled_at_step != step:
            raise ValueError(f"batch of step {batch.sampled_at_step} pushed at step {step}")
        if self._waiting and self._waiting[-1].sampled_at_step != step - 1:
            raise ValueError(f"batch of step {step} pushed after step {self._waiting[-1].sampled_at_step}")
        self._waiting.append(batch)

    def due(self, step: int) -> RolloutBatch | None:
        """The batch that global step `step` trains, sampled at step - n; None while step < n. It goes on waiting.

        Raises ValueError when that batch is not the oldest one waiting: something was lost, or is about to be trained late.
        """
        if step < self.staleness:
            return None
        due = step - self.staleness
        oldest = self._waiting[0].sampled_at_step if self._waiting else None
        if oldest != due:
            raise ValueError(f"step {step} trains the batch of step {due}, but the oldest batch waiting is of step {oldest}")
        return self._waiting[0]

    def pop(self, step: int) -> RolloutBatch | None:
        """As `due`; the batch is trained and waits no more."""
        batch = self.due(step)
        if batch is not None:
            self._waiting.popleft()
        return batch

    def waiting(self) -> tuple[RolloutBatch, ...]:
        """Oldest first; what a checkpoint must hold."""
        return tuple(self._waiting)

    def restore(self, batches: Iterable[RolloutBatch]) -> None:
        """The counterpart of `waiting`, into an empty buffer."""
        if self._waiting:
            raise ValueError(f"restore into a buffer that holds {len(self._waiting)} batches")
        for batch in batches:
            self.push(batch.sampled_at_step, batch)
