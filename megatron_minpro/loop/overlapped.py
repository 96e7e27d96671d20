"""The overlapped schedule: batch k is sampled while batch k-1 is scored and batch k-n is trained. For staleness n >= 1.

Both sides need only the weights of step k, so the numbers are those of the serial schedule, bit for bit. One step k:

    servers   | sample k under version v_k ........................ | take v_k+1 | sample k+1 ...
    trainer   | score k-1 | checkpoint | keep v_k | update k-n | wait | publish    | score k ...

With rollout.publish: rolling a server that has finished its share of batch k takes v_k+1 and begins with batch k+1, while another one still
samples batch k. So the trainer waits for batch k one step later, before it is scored, and at most two batches are sampled at once:

    server 0  | its share of k ........ | k+1 ................... | k+2 ...
    server 1  | its share of k ....................... | k+1 .............. | k+2 ...
    trainer   | wait for k-1, score it | keep v_k | update k-n | offer v_k+1 | wait for k, score it ...

Batch k-1 is scored under the weights that sampled it: they were kept before the update of step k-1 and are swapped in. Metrics of step k-1
are written then. A checkpoint at step k holds what the serial schedule's holds: the weights of step k, n scored batches, and the prompt
cursor as it was before batch k was drawn. Only the main thread of a rank enters a collective.
"""

from __future__ import annotations

import logging
import threading
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

    def __init__(self, run: TrainingRun, step: int, *, policy_version: int, before: SamplingTask | None = None) -> None:
        """Begin.

        Args:
            run: the run.
            step: global step of the batch.
            policy_version: of the weights that sample it. The held-out measurement that is due before the step uses them too.
            before: the task of the batch before, which may be under way.
        """
        self.step = step
        self.policy_version = policy_version
        self.seconds = 0.0  # of sampling, once the batch is there
        self.evaluation_s: float | None = None  # of the held-out measurement, where one was due
        self._evaluation = run.evaluation_label(step)
        self._measured = threading.Event()  # nothing is measured any more, the batch itself is sampled
        self._followed = False  # the task of the next batch has begun
        self._future: Future[SampledBatch] | None = None
        if run.driver is not None:
            if before is not None:
                before._measured.wait()  # its batch has precedence, and the servers know of it only then
                before._followed = True
            if run.is_rolling:
                run.driver.draw(step)
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
            self._measured.set()
            driver.beside("sample")
            sampled = driver.collect(self.step, policy_version=self.policy_version)
            self.seconds = time.perf_counter() - start
            return sampled
        finally:
            self._measured.set()
            if not self._followed:
                driver.beside("")

    def _ask(self, driver: Driver) -> SampledBatch:
        future = self._begin(driver) if self._future is None else self._future
        self._future = None
        return future.result()


@dataclass(slots=True, kw_only=True)
class Unfinished:
    """A global step whose batch is not scored yet and whose metrics are not written."""

    step: int
    task: SamplingTask | None  # None in the last n steps, which sample nothing
    batch: RolloutBatch | None = None  # of the task, once it has been received
    trained: RolloutBatch | None
    timer: PhaseTimer
    metrics: dict[str, float]


def train_overlapped(run: TrainingRun) -> bool:
    """Run to the end, or until a stop is asked for. True when all batches are trained, False after a stop. Raises ServersFailed."""
    unfinished: Unfinished | None = None
    while True:
        step = run.counters.next_step if unfinished is None else unfinished.step + 1
        done, stopping = step == run.last_step, stop_requested(run)
        timer = run.timer()
        if not (done or stopping):
            run.at_step(step)
        task = None
        if step < run.config.num_global_steps and not stopping:
            before = None if unfinished is None else unfinished.task
            task = SamplingTask(run, step, policy_version=run.actor.policy_version, before=before)
        if unfinished is not None:
            if run.is_rolling:
                receive(run, unfinished, timer)
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


def train_and_sample(run: TrainingRun, step: int, task: SamplingTask | None, timer: PhaseTimer) -> Unfinished:
    """Keep the weights that sample batch `step`, train the batch that is due, take in batch `step`, publish.

    With rolling publish batch `step` is taken in later. Raises ServersFailed, as `receive`.
    """
    metrics: dict[str, float] = {}
    if task is not None:
        run.actor.keep_weights(place=run.config.actor.kept_weights)
    due = run.buffer.pop(step)
    if due is not None:
        update(run, due, timer, metrics)
    unfinished = Unfinished(step=step, task=task, trained=due, timer=timer, metrics=metrics)
    if not run.is_rolling:
        receive(run, unfinished, timer)
    if due is not None and run.needs_publish(step):
        with timer("sync"):
            publish(run)
    timer.stop()
    return unfinished


def receive(run: TrainingRun, unfinished: Unfinished, timer: PhaseTimer) -> None:
    """Wait for the step's batch, where it has one; then the next step is the one that comes next.

    Args:
        run: the run.
        unfinished: the step; gets the batch, and how long it was sampled.
        timer: of the step that is under way. time/wait: how long the trainer had nothing else to do.

    Raises:
        ServersFailed: with `half_step` set where the update is done and the batch is missing.
    """
    task = unfinished.task
    if task is not None:
        try:
            with timer("wait"):
                sampled = task.join(run)
        except ServersFailed as failed:
            if unfinished.trained is not None:
                failed.half_step = HalfStep(metrics=unfinished.metrics, seconds=unfinished.timer.seconds)
            raise
        queued_s = 0.0 if sampled is None else sampled.metrics.get("time/queued", 0.0)
        unfinished.timer.seconds["sample"] = task.seconds - queued_s
        if task.evaluation_s is not None:
            unfinished.timer.seconds["evaluate"] = task.evaluation_s
        unfinished.batch = take_in(run, sampled, unfinished.timer, unfinished.metrics)
    run.counters.next_step = unfinished.step + 1


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
    timer, step = run.timer(), run.counters.next_step
    timer.seconds |= half_step.seconds
    task = SamplingTask(run, step, policy_version=run.actor.kept_version)
    unfinished = Unfinished(step=step, task=task, trained=None, timer=timer, metrics=dict(half_step.metrics))
    try:
        receive(run, unfinished, timer)
    except ServersFailed as failed:
        failed.half_step = half_step
        raise
    if run.needs_publish(step):
        publish(run)
    timer.stop()
    finish(run, unfinished)
    if run.checkpoint_is_due(step + 1):
        save(run)
