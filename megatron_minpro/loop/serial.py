"""The serial schedule: sample, score, delay, update, publish, one after the other. Every rank runs it."""

from __future__ import annotations

import logging

from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.loop.finish_step import finish_step
from megatron_minpro.loop.scoring import score, take_in
from megatron_minpro.loop.servers import ask_servers, evaluate, publish
from megatron_minpro.loop.training_run import PhaseTimer, TrainingRun, save, stop_requested
from megatron_minpro.loop.update import update

log = logging.getLogger(__name__)


def train_serially(run: TrainingRun) -> bool:
    """Sample, score, update and publish, one after the other. True when all batches are trained, False after a stop.

    The last `staleness` global steps sample nothing: they train what is still waiting, so that nothing sampled is lost.
    Raises ServersFailed.
    """
    config, counters = run.config, run.counters
    while counters.next_step < run.last_step:
        step = counters.next_step
        if (label := run.evaluation_label(step)) is not None:
            evaluate(run, label)
        run.at_step(step)
        timer = run.timer()
        metrics: dict[str, float] = {}
        if step < config.num_global_steps:
            batch = collect(run, step, timer, metrics)
            run.buffer.push(step, batch)
        due = run.buffer.pop(step)
        if due is not None:
            update(run, due, timer, metrics)
            if run.needs_publish(step):
                with timer("sync"):
                    publish(run)
        counters.next_step = step + 1
        finish_step(run, step, due, timer, metrics)
        done = counters.next_step == run.last_step
        stopping = stop_requested(run)
        if stopping or run.checkpoint_is_due(counters.next_step):
            save(run)
        if stopping and not done:
            run.checkpoints.wait()
            log.warning("stopped after global step %d, checkpoint written", step)
            return False
    run.checkpoints.wait()
    return True


def collect(run: TrainingRun, step: int, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """Sample a batch under the current weights and attach its behaviour log-probs. Raises ServersFailed."""
    with timer("sample"):
        sampled = ask_servers(run, lambda driver: driver.collect(step, policy_version=run.actor.policy_version))
        batch = take_in(run, sampled, timer, metrics)
    return score(run, batch, timer, metrics)
