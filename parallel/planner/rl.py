"""Seconds of one global step of reinforcement learning by schedule: sampling, log-probabilities, updates, weight sync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallel.planner.hardware import Hardware
from parallel.planner.rollout_server import cache_bytes
from parallel.planner.sampling import Rollouts, Sampling
from parallel.planner.shape import ModelShape

_WEIGHT_SYNC_GBS = 10.0  # one sender, gathering as it goes: 30B bf16 in 5 to 10 s in every published figure
_COLOCATED_CACHE_SHARE = 0.2  # of a GPU that the trainer uses too


# serial: one thing after the other. overlapped: a batch is sampled while another is trained; the next begins when both are done.
# rolling: overlapped, and a server that is done with its share begins the next batch while others still decode.
Schedule = Literal["serial", "overlapped", "rolling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalStep:
    """Seconds of the phases of one global step, and of the step by schedule."""

    sampling: Sampling
    logprobs_s: float
    updates_s: float
    sync_s: float
    staleness: int
    schedule: Schedule

    @property
    def step_s(self) -> float:
        """By the step's own schedule."""
        return self.seconds(self.schedule)

    def seconds(self, schedule: Schedule) -> float:
        """One global step by a schedule."""
        training_s = self.logprobs_s + self.updates_s
        if schedule == "serial":
            return self.sampling.batch_s + training_s + self.sync_s
        if schedule == "overlapped":
            return max(self.sampling.batch_s, training_s) + self.sync_s
        return self.sampling.rolling_step_s(training_s=training_s, sync_s=self.sync_s)

    def trainer_idle(self, schedule: Schedule) -> float:
        """Share of the step in which the trainer has nothing to do."""
        return 1 - (self.logprobs_s + self.updates_s + self.sync_s) / self.seconds(schedule)

    def servers_idle(self, schedule: Schedule) -> float:
        """Share of the step in which a server does not sample, mean over the servers: some are done before others."""
        return 1 - self.sampling.server_s / self.seconds(schedule)


def schedules(step: GlobalStep) -> tuple[Schedule, ...]:
    """Those that staleness and the number of servers allow."""
    if step.staleness == 0:
        return ("serial",)
    return ("serial", "overlapped", "rolling") if step.sampling.servers > 1 else ("serial", "overlapped")


def sync_seconds(shape: ModelShape) -> float:
    """bf16 weights of the whole model from the trainer to the servers."""
    return 2 * shape.total_parameters / (1e9 * _WEIGHT_SYNC_GBS)


def server_bytes(shape: ModelShape, hardware: Hardware, rollouts: Rollouts) -> float:
    """Bytes of one server on a GPU it shares with the trainer: its part of the bf16 weights, and keys and values.

    What exceeds a fifth of the GPU waits its turn.
    """
    cache = rollouts.sequences / rollouts.servers * (rollouts.prompt_tokens + rollouts.lengths.under_way) * cache_bytes(shape)
    return 2 * shape.total_parameters / rollouts.tp + min(cache / rollouts.tp, _COLOCATED_CACHE_SHARE * hardware.usable_bytes)
