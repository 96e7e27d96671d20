"""The serial schedule: sample, score, delay, update, publish, one after the other. Every rank runs it."""

from __future__ import annotations

from megatron_minpro.loop.finish_step import finish_step
from megatron_minpro.loop.scoring import score, take_in
from megatron_minpro.loop.servers import ask_servers, evaluate, publish, weights_of
from megatron_minpro.loop.step_under_way import StepUnderWay
from megatron_minpro.loop.training_run import StopRequested, TrainingRun, look, save
from megatron_minpro.loop.update import update


def train_serially(run: TrainingRun) -> None:
    """Sample, score, update and publish, one after the other, until all batches are trained. Continues a step that is under way.

    The last `staleness` global steps sample nothing: they train what is still waiting, so that nothing sampled is lost.
    Raises ServersFailed, StopRequested.
    """
    counters = run.counters
    while counters.next_step < run.last_step:
        step = counters.next_step
        # Where the batch of a continued step is missing, the other schedule may not have measured either: it does both in one thread.
        if (label := run.evaluation_label(step)) is not None and (run.under_way is None or run.under_way.batch == "missing"):
            evaluate(run, label)
        run.at_step(step)
        under_way = run.begin_step(step, run.timer()) if run.under_way is None else run.under_way
        if under_way.batch == "missing":
            collect(run, under_way)
        update(run, under_way)
        if under_way.updates and run.needs_publish(step):
            with under_way.timer("sync"):
                publish(run)
        counters.next_step = step + 1
        finish_step(run, under_way)
        wishes = look(run)
        if wishes.stop and counters.next_step < run.last_step:
            raise StopRequested
        if wishes.save or run.checkpoint_is_due(counters.next_step):
            save(run)


def collect(run: TrainingRun, under_way: StepUnderWay) -> None:
    """Sample the step's batch under the weights that the step began with, and let it wait with their log-probs. Raises ServersFailed."""
    step, version, timer, metrics = under_way.step, run.sampling_version, under_way.timer, under_way.metrics
    with timer("sample"):
        sampled = ask_servers(run, lambda driver: driver.collect(step, policy_version=version), policy_version=version)
        batch = take_in(run, sampled, timer, metrics)
    under_way.batch = "unscored"
    with weights_of(run, version):
        scored = score(run, batch, timer, metrics)
    run.buffer.push(step, scored)
    under_way.batch = "waiting"
