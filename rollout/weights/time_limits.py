"""How long the steps of a weight update may take: seconds that follow from the bytes that a step moves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTimeLimits:
    """Limits of every step, each for all servers together.

    control_s: what moves no weights: a look at a server, pause, version, continue, leaving a group.
    step_s: what moves weights, before the bytes are counted: members meet, memory is allocated, layouts are repacked.
    bytes_per_s: weights that arrive at a lower rate count as stuck.
    """

    control_s: float = 30.0
    step_s: float = 60.0
    bytes_per_s: float = 1e8

    def moving(self, num_bytes: int) -> float:
        """Seconds for a step that moves so many bytes."""
        return self.step_s + num_bytes / self.bytes_per_s


class BucketLimits:
    """Limits of the buckets of one update: each has that of its own bytes, and together they have no more than that of all their bytes."""

    def __init__(self, limits: WeightTimeLimits) -> None:
        self._limits = limits
        self._num_bytes = 0
        self._spent_s = 0.0

    def next_s(self, num_bytes: int) -> float:
        """Seconds for the next bucket."""
        self._num_bytes += num_bytes
        return min(self._limits.moving(num_bytes), max(0.0, self._limits.moving(self._num_bytes) - self._spent_s))

    def spend(self, seconds: float) -> None:
        """The bucket is there; it took so long."""
        self._spent_s += seconds
