"""The end of a global step: its metrics."""

from __future__ import annotations

import logging

from megatron_minpro.loop.idle import idle_metrics
from megatron_minpro.loop.logprob_gap import gap_warning
from megatron_minpro.loop.step_under_way import StepUnderWay
from megatron_minpro.loop.stop_time import CHECKPOINT, stop_warning
from megatron_minpro.loop.training_run import TrainingRun
from megatron_minpro.objectives.idle_clip import idle_clip

log = logging.getLogger(__name__)


def finish_step(run: TrainingRun, under_way: StepUnderWay) -> None:
    """Write the step's metrics down: it is under way no more. Throughput counts a response token once, in the step that trains it."""
    step, timer, metrics = under_way.step, under_way.timer, under_way.metrics
    counters, overlapped = run.counters, run.config.effective_schedule == "overlapped"
    within = timer.seconds | {"score": timer.scored_before_s} if overlapped else timer.seconds
    seconds = timer.wall_s()
    servers_wait_s = metrics.get("time/servers_wait", 0.0) if run.is_rolling else None
    for phase, duration in timer.seconds.items():
        counters.add_seconds(phase, duration)
        metrics[f"time/{phase}"] = duration
    metrics |= {
        "policy/version": run.actor.policy_version,
        "total/batches_trained": counters.trained_batches,
        "batch/waiting": len(run.buffer),
        "total/rollouts_sampled": counters.rollouts_sampled,
        "total/rollouts_trained": counters.rollouts_trained,
        "total/rollouts_dropped": counters.rollouts_dropped,
        "time/step": seconds,
        "throughput/tokens_per_second": metrics.get("batch/tokens", 0.0) / seconds,
        **idle_metrics(within, wall_s=seconds, overlapped=overlapped, servers_wait_s=servers_wait_s),
    }
    if (written_s := run.checkpoints.seconds()) is not None:
        metrics[CHECKPOINT] = written_s
    warnings = {
        "idle clip": idle_clip(metrics),
        "log-prob gap": gap_warning(metrics, run.config),
        "stop": stop_warning(metrics, allowed_s=run.config.checkpoint.stop_within_s),
    }
    for kind, warning in warnings.items():
        if warning is not None and kind not in run.reported:
            log.warning("global step %d: %s", step, warning)
            run.reported.add(kind)
    if run.driver is not None:
        run.driver.record(step, metrics, under_way.histograms)
    run.under_way = None
