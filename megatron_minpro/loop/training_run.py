"""What the loop works with: one run on one rank, what rank 0 does for all, the clock of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.counters import HalfStep, RunCounters
from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.objectives import Objective
from parallel.actor import MegatronActor

T = TypeVar("T")


class Driver(Protocol):
    """What happens on rank 0 alone."""

    def draw(self, step: int) -> None: ...  # the prompts of a batch that is sampled while others are under way
    def collect(self, step: int, *, policy_version: int) -> SampledBatch: ...
    def publish(self, policy_version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> str | None: ...
    def check_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None: ...
    def record(self, step: int, metrics: Mapping[str, float], trained: RolloutBatch | None) -> None: ...
    def evaluate(self, label: str, *, policy_version: int) -> Mapping[str, float]: ...
    def taken_in(self, *, cursor: Mapping[str, Any], rollouts_sampled: int) -> None: ...  # see RunDriver
    def heartbeat(self, phase: str) -> None: ...  # what the trainer does now
    def beside(self, activity: str) -> None: ...  # what the servers do beside the trainer; "" when nothing


class Checkpoints(Protocol):
    """On every rank. `save` returns once the state is copied; `wait` when it is on disk. Both raise on all ranks together."""

    def save(self, half_step: HalfStep | None = None) -> None: ...
    def wait(self) -> None: ...
    def failure(self) -> str | None: ...


@dataclass(kw_only=True)
class TrainingRun:
    """Everything the loop works with. `driver` is None on all ranks but the first."""

    config: RunConfig
    actor: MegatronActor
    objective: Objective
    buffer: StalenessBuffer
    counters: RunCounters
    driver: Driver | None
    control_group: dist.ProcessGroup
    stop_requested: Callable[[], bool]  # asked on rank 0
    checkpoints: Checkpoints
    at_step: Callable[[int], None] = lambda step: None  # called when a global step begins
    reported: set[str] = field(default_factory=set)  # kinds of warnings that were given; each is given once

    @property
    def is_rolling(self) -> bool:
        """Whether each server takes new weights when it is free, so that two batches may be sampled at once."""
        return self.config.rollout.publish == "rolling"

    @property
    def last_step(self) -> int:
        """The global step at which nothing is left to train."""
        return self.config.num_global_steps + self.config.staleness

    def timer(self) -> PhaseTimer:
        """The clock of a global step that begins now. Rank 0 tells the console of each phase."""
        return PhaseTimer(_say_nothing if self.driver is None else self.driver.heartbeat)

    def evaluation_label(self, step: int) -> str | None:
        """The name of the held-out measurement that is due before global step `step`; None where none is."""
        every = 0 if self.config.evaluation is None else self.config.evaluation.every
        return f"step_{step:06d}" if every and step % every == 0 and 0 < step < self.last_step else None

    def checkpoint_is_due(self, step: int) -> bool:
        """Whether the state before global step `step` is saved. A checkpoint where sampling ends is needed to prolong the run."""
        return step % self.config.checkpoint.every == 0 or step in (self.config.num_global_steps, self.last_step)

    def needs_publish(self, step: int) -> bool:
        """Whether the servers must sample or evaluate with the weights that global step `step` ends with."""
        return step + 1 < self.config.num_global_steps or step + 1 == self.last_step or self.evaluation_label(step + 1) is not None


def stop_requested(run: TrainingRun) -> bool:
    """Collective. Whether rank 0 was asked to stop. Raises RuntimeError on all ranks when a checkpoint could not be written."""
    stopping, failure = share(run, (run.stop_requested(), run.checkpoints.failure()) if run.driver else None)
    if failure is not None:
        raise RuntimeError(failure)
    return stopping


def save(run: TrainingRun) -> None:
    """Begin to write a checkpoint; the pause is counted."""
    start = time.perf_counter()
    run.checkpoints.save()
    run.counters.add_seconds("checkpoint", time.perf_counter() - start)


def share(run: TrainingRun, value: T | None) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=run.control_group)
    return box[0]


def _say_nothing(phase: str) -> None:
    """On ranks without a console."""


class PhaseTimer:
    """Wall seconds of one step, and of its phases. Phases may overlap, so their sum can exceed the wall time."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """tell: called with the name of each phase when it begins."""
        self.seconds: dict[str, float] = {}
        self.scored_before_s = 0.0  # of scoring the batch before, where that takes place in this step
        self._tell = tell
        self._started_at = time.perf_counter()
        self._wall_s: float | None = None

    def stop(self) -> None:
        """The step ends now; what is measured later still counts for its phases."""
        self._wall_s = time.perf_counter() - self._started_at

    def wall_s(self) -> float:
        """From the beginning of the step to `stop`, or to now."""
        return time.perf_counter() - self._started_at if self._wall_s is None else self._wall_s

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Count `seconds` of a phase under a name of their own."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) - seconds
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self._tell(phase)
        with torch.profiler.record_function(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
