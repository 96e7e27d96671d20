"""What the loop works with: one run on one rank, what rank 0 does for all, the questions that all ranks ask together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.counters import BatchState, RunCounters, UnfinishedStep
from megatron_minpro.loop.phase_timer import PhaseTimer
from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.loop.step_under_way import StepUnderWay
from megatron_minpro.objectives import Objective
from megatron_minpro.tracking.step_details import Histogram
from megatron_minpro.tracking.token_records import TokenRecords
from parallel.actor import MegatronActor

T = TypeVar("T")


class Driver(Protocol):
    """What happens on rank 0 alone."""

    def draw(self, step: int) -> None: ...  # the prompts of a batch that is sampled while others are under way
    def collect(self, step: int, *, policy_version: int) -> SampledBatch: ...
    def publish(self, policy_version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> str | None: ...
    def check_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None: ...
    def record(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None: ...
    def keep_tokens(self, records: TokenRecords) -> None: ...  # what the objective saw of single tokens
    def evaluate(self, label: str, *, policy_version: int) -> Mapping[str, float]: ...
    def taken_in(self, *, cursor: Mapping[str, Any], rollouts_sampled: int) -> None: ...  # see RunDriver
    def heartbeat(self, phase: str) -> None: ...  # what the trainer does now
    def beside(self, activity: str) -> None: ...  # what the servers do beside the trainer; "" when nothing


class Checkpoints(Protocol):
    """On every rank. `save` returns once the state is copied; `wait` when it is on disk, and raises on all ranks where it cannot be."""

    def save(self, unfinished: UnfinishedStep | None) -> None: ...
    def wait(self) -> None: ...
    def seconds(self) -> float | None: ...  # of writing the newest complete one, from its beginning; None before the first


class StopRequested(Exception):
    """The run was asked to stop. Raised on all ranks together, where the state can be saved: what is under way is dropped."""


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
    under_way: StepUnderWay | None = None  # None between two global steps
    now: Callable[[], float] = time.monotonic  # asked on rank 0
    saved_at: float | None = None  # by `now`; None before the first question
    reported: set[str] = field(default_factory=set)  # kinds of warnings that were given; each is given once

    @property
    def is_rolling(self) -> bool:
        """Whether each server takes new weights when it is free, so that two batches may be sampled at once."""
        return self.config.rollout.publish == "rolling"

    @property
    def last_step(self) -> int:
        """The global step at which nothing is left to train."""
        return self.config.num_global_steps + self.config.staleness

    @property
    def sampling_version(self) -> int:
        """Policy version of the weights that sample the batch of the step under way, or of the next one."""
        step = self.under_way
        if step is None or step.updates == 0 or step.batch != "missing":
            return self.actor.policy_version
        assert self.actor.kept_version is not None
        return self.actor.kept_version

    def timer(self, unfinished: UnfinishedStep | None = None) -> PhaseTimer:
        """The clock of a global step that begins now, or goes on. Rank 0 tells the console of each phase."""
        tell = _say_nothing if self.driver is None else self.driver.heartbeat
        return PhaseTimer(tell, before=None if unfinished is None else unfinished.seconds)

    def begin_step(self, step: int, timer: PhaseTimer) -> StepUnderWay:
        """From now on `step` is under way."""
        batch: BatchState = "missing" if step < self.config.num_global_steps else "none"
        self.under_way = StepUnderWay(step=step, timer=timer, batch=batch)
        return self.under_way

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What rank 0 was asked for. Equal on all ranks."""

    stop: bool
    save: bool  # checkpoint.every_minutes are over


def look(run: TrainingRun) -> Wishes:
    """Collective."""
    return share(run, _wishes(run) if run.driver else None)


def obey(run: TrainingRun) -> None:
    """Collective, between two optimizer steps: save if it is time to. Raises StopRequested when rank 0 was asked to stop."""
    wishes = look(run)
    if wishes.stop:
        raise StopRequested
    if wishes.save:
        save(run)


def save(run: TrainingRun) -> None:
    """Begin to write a checkpoint, also of a step that is under way; the pause is counted."""
    start = time.perf_counter()
    run.checkpoints.save(None if run.under_way is None else run.under_way.record())
    run.counters.add_seconds("checkpoint", time.perf_counter() - start)
    run.saved_at = run.now()


def _wishes(run: TrainingRun) -> Wishes:
    if run.saved_at is None:
        run.saved_at = run.now()
    minutes = run.config.checkpoint.every_minutes
    return Wishes(stop=run.stop_requested(), save=minutes is not None and run.now() - run.saved_at >= 60 * minutes)


def share(run: TrainingRun, value: T | None) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=run.control_group)
    return box[0]


def _say_nothing(phase: str) -> None:
    """On ranks without a console."""
