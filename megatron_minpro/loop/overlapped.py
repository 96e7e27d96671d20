"""The overlapped schedule: batch k is sampled while batch k-1 is scored and batch k-n is trained. For staleness n >= 1.

Both sides need only the weights of step k, so the numbers are those of the serial schedule, bit for bit. One step k:

    servers   | sample k under version v_k ........................ | take v_k+1 | sample k+1 ...
    trainer   | score k-1 | checkpoint | keep v_k | update k-n | wait | publish    | score k ...

Batch k-1 is scored under the weights that sampled it: they were kept before the update of step k-1 and are swapped in. Metrics of step k-1
are written then. A checkpoint at step k holds what the serial schedule's holds: the weights of step k, n scored batches, and the prompt
cursor as it was before batch k was drawn. Only the main thread of a rank enters a collective.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.loop.counters import HalfStep
from megatron_minpro.loop.finish_step import finish_step
from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.loop.scoring import score, take_in
from megatron_minpro.loop.servers import ServersFailed, ask_servers, evaluate, publish, weights_of
from megatron_minpro.loop.training_run import Driver, PhaseTimer, TrainingRun, save, stop_requested
from megatron_minpro.loop.update import update
from rollout.background import in_background

log = logging.getLogger(__name__)


class SamplingTask:
    """The batch of one global step under way: rank 0 asks the servers in a thread, the other ranks hold nothing."""

    def __init__(self, run: TrainingRun, step: int, *, policy_version: int) -> None:
        """Begin.

        Args:
            run: the run.
            step: global step of the batch.
            policy_version: of the weights that sample it. The held-out measurement that is due before the step uses them too.
        """
        self.step = step
        self.policy_version = policy_version
        self.seconds = 0.0  # of sampling, once the batch is there
        self.evaluation_s: float | None = None  # of the held-out measurement, where one was due
        self._evaluation = run.evaluation_label(step)
        self._future: Future[SampledBatch] | None = None
        if run.driver is not None:
            self._begin(run.driver)

    def join(self, run: TrainingRun) -> SampledBatch | None:
        """Collective. The batch on rank 0, None elsewhere. Publishes the sampling weights again where they are missing.

        Raises ServersFailed.
        """
        return ask_servers(run, self._ask, policy_version=self.policy_version)

    def _begin(self, driver: Driver) -> Future[SampledBatch]:
        self._future = in_background(lambda: self._work(driver), name=f"sampling of step {self.step}")
        return self._future

    def _work(self, driver: Driver) -> SampledBatch:
        try:
            start = time.perf_counter()
            if self._evaluation is not None:
                driver.beside(f"evaluation {self._evaluation}")
                driver.evaluate(self._evaluation, policy_version=self.policy_version)
                self._evaluation = None  # measured: a second attempt at the batch does not repeat it
                self.evaluation_s = time.perf_counter() - start
                start = time.perf_counter()
            driver.beside("sample")
            sampled = driver.collect(self.step, policy_version=self.policy_version)
            self.seconds = time.perf_counter() - start
            return sampled
        finally:
            driver.beside("")

    def _ask(self, driver: Driver) -> SampledBatch:
        future = self._begin(driver) if self._future is None else self._future
        self._future = None
        return future.result()


@dataclass(slots=True, kw_only=True)
class Unfinished:
    """A global step whose batch is not scored yet and whose metrics are not written."""

    step: int
    batch: RolloutBatch | None  # None in the last n steps, which sample nothing
    trained: RolloutBatch | None
    timer: PhaseTimer
    metrics: dict[str, float]


def train_overlapped(run: TrainingRun) -> bool:
    """Run to the end, or until a stop is asked for. True when all batches are trained, False after a stop. Raises ServersFailed."""
    unfinished: Unfinished | None = None
    while True:
        step = run.counters.next_step
        done, stopping = step == run.last_step, stop_requested(run)
        timer = run.timer()
        if not (done or stopping):
            run.at_step(step)
        task = None
        if step < run.config.num_global_steps and not stopping:
            task = SamplingTask(run, step, policy_version=run.actor.policy_version)
        if unfinished is not None:
            finish(run, unfinished)
            timer.scored_before_s = unfinished.timer.seconds.get("score", 0.0)
        if stopping or (unfinished is not None and run.checkpoint_is_due(step)):
            save(run)
        if done or stopping:
            run.checkpoints.wait()
            if not done:
                log.warning("stopped before global step %d, checkpoint written", step)
            return done
        if task is None and (label := run.evaluation_label(step)) is not None:
            evaluate(run, label)
        unfinished = train_and_sample(run, step, task, timer)
        run.counters.next_step = step + 1


def train_and_sample(run: TrainingRun, step: int, task: SamplingTask | None, timer: PhaseTimer) -> Unfinished:
    """Keep the weights that sample batch `step`, train the batch that is due, take in batch `step`, publish.

    Raises ServersFailed, with `half_step` set where the update is done and batch `step` is missing.
    """
    metrics: dict[str, float] = {}
    if task is not None:
        run.actor.keep_weights(place=run.config.actor.kept_weights)
    due = run.buffer.pop(step)
    if due is not None:
        update(run, due, timer, metrics)
    batch = None
    if task is not None:
        try:
            batch = receive(run, task, timer, metrics)
        except ServersFailed as failed:
            failed.half_step = None if due is None else HalfStep(metrics=metrics, seconds=timer.seconds)
            raise
    if due is not None and run.needs_publish(step):
        with timer("sync"):
            publish(run)
    timer.stop()
    return Unfinished(step=step, batch=batch, trained=due, timer=timer, metrics=metrics)


def receive(run: TrainingRun, task: SamplingTask, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """Wait for the batch of a task. time/wait: how long the trainer had nothing else to do. Raises ServersFailed."""
    with timer("wait"):
        sampled = task.join(run)
    timer.seconds["sample"] = task.seconds
    if task.evaluation_s is not None:
        timer.seconds["evaluate"] = task.evaluation_s
    return take_in(run, sampled, timer, metrics)


def finish(run: TrainingRun, unfinished: Unfinished) -> None:
    """Score the step's batch under the weights that sampled it, let it wait for its turn, write the step's metrics."""
    if unfinished.batch is not None:
        with weights_of(run, unfinished.batch.policy_version):
            scored = score(run, unfinished.batch, unfinished.timer, unfinished.metrics)
        run.buffer.push(unfinished.step, scored)
    finish_step(run, unfinished.step, unfinished.trained, unfinished.timer, unfinished.metrics)


def complete_half_step(run: TrainingRun, half_step: HalfStep) -> None:
    """Sample and score the batch that was missing when the servers failed. The actor keeps the weights that sample it.

    Raises ServersFailed, with `half_step` set again.
    """
    assert run.actor.kept_version is not None
    timer, metrics, step = run.timer(), dict(half_step.metrics), run.counters.next_step
    timer.seconds |= half_step.seconds
    try:
        batch = receive(run, SamplingTask(run, step, policy_version=run.actor.kept_version), timer, metrics)
    except ServersFailed as failed:
        failed.half_step = half_step
        raise
    if run.needs_publish(step):
        publish(run)
    timer.stop()
    run.counters.next_step = step + 1
    finish(run, Unfinished(step=step, batch=batch, trained=None, timer=timer, metrics=metrics))
    if run.checkpoint_is_due(step + 1):
        save(run)
