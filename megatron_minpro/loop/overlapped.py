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

import threading
import time
from concurrent.futures import Future

from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.loop.finish_step import finish_step
from megatron_minpro.loop.phase_timer import PhaseTimer
from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.loop.scoring import score, take_in
from megatron_minpro.loop.servers import ask_servers, evaluate, publish, weights_of
from megatron_minpro.loop.step_under_way import StepUnderWay
from megatron_minpro.loop.training_run import Driver, StopRequested, TrainingRun, look, save
from megatron_minpro.loop.update import update
from rollout.background import in_background


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
        self.batch: RolloutBatch | None = None  # on all ranks, once it has been received
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

        Raises ServersFailed, StopRequested.
        """
        return ask_servers(run, self._ask, policy_version=self.policy_version)

    def wait_until_measured(self, run: TrainingRun) -> None:
        """Collective. Returns when the held-out measurement that is due before the batch is over. Raises StopRequested."""
        if run.evaluation_label(self.step) is not None:
            ask_servers(run, lambda driver: self._measured.wait(), policy_version=self.policy_version)

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


def train_overlapped(run: TrainingRun) -> None:
    """Run until all batches are trained. Continues a step that is under way. Raises ServersFailed, StopRequested."""
    task: SamplingTask | None = None  # of the step under way
    if run.under_way is not None:
        run.at_step(run.under_way.step)
        if run.under_way.batch == "missing":
            task = SamplingTask(run, run.under_way.step, policy_version=run.sampling_version)
        train_and_sample(run, run.under_way, task)
    while True:
        finished = run.under_way  # all but scoring its batch
        step = run.counters.next_step if finished is None else finished.step + 1
        done, stopping = step == run.last_step, look(run).stop
        timer = run.timer()
        if not (done or stopping):
            run.at_step(step)
        before, task = task, None
        if run.is_rolling and before is not None:
            before.wait_until_measured(run)
        if step < run.config.num_global_steps and not stopping:
            task = SamplingTask(run, step, policy_version=run.actor.policy_version, before=before)
        if finished is not None:
            if run.is_rolling:
                receive(run, finished, before, timer)
            finish(run, finished, before)
            timer.scored_before_s = finished.timer.seconds.get("score", 0.0)
        if stopping and not done:
            raise StopRequested
        if finished is not None and run.checkpoint_is_due(step):
            save(run)
        if done:
            return
        if task is None and (label := run.evaluation_label(step)) is not None:
            evaluate(run, label)
        train_and_sample(run, run.begin_step(step, timer), task)


def train_and_sample(run: TrainingRun, under_way: StepUnderWay, task: SamplingTask | None) -> None:
    """Keep the weights that sample the step's batch, train the batch that is due, take in the step's batch, publish.

    With rolling publish the step's batch is taken in later. Raises ServersFailed, StopRequested.
    """
    if task is not None and under_way.updates == 0:  # else they are kept already
        run.actor.keep_weights(place=run.config.actor.kept_weights)
    update(run, under_way)
    if task is not None and look(run).save:  # now rather than during the long wait
        save(run)
    if not run.is_rolling:
        receive(run, under_way, task, under_way.timer)
    if under_way.updates and run.needs_publish(under_way.step):
        with under_way.timer("sync"):
            publish(run)
    under_way.timer.stop()


def receive(run: TrainingRun, under_way: StepUnderWay, task: SamplingTask | None, timer: PhaseTimer) -> None:
    """Wait for the step's batch, where it has one; then the next step is the one that comes next.

    Args:
        run: the run.
        under_way: the step whose update is done.
        task: samples the step's batch; gets it. None where it samples nothing, or its batch waits already.
        timer: of the step that the trainer is at. time/wait: how long the trainer had nothing else to do.

    Raises:
        ServersFailed, StopRequested: the batch is missing.
    """
    if task is not None:
        with timer("wait"):
            sampled = task.join(run)
        queued_s = 0.0 if sampled is None else sampled.metrics.get("time/queued", 0.0)
        under_way.timer.seconds["sample"] = task.seconds - queued_s
        if task.evaluation_s is not None:
            under_way.timer.seconds["evaluate"] = task.evaluation_s
        task.batch = take_in(run, sampled, under_way.timer, under_way.metrics)
        under_way.batch = "unscored"
    run.counters.next_step = under_way.step + 1


def finish(run: TrainingRun, under_way: StepUnderWay, task: SamplingTask | None) -> None:
    """Score the step's batch under the weights that sampled it, let it wait for its turn, write the step's metrics."""
    if task is not None:
        batch, task.batch = task.batch, None
        assert batch is not None
        with weights_of(run, task.policy_version):
            scored = score(run, batch, under_way.timer, under_way.metrics)
        run.buffer.push(under_way.step, scored)
        under_way.batch = "waiting"
    finish_step(run, under_way)
