"""Which schedule a run follows, and what is saved when it is told to stop or its servers fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

from megatron_minpro.loop.counters import UnfinishedStep
from megatron_minpro.loop.overlapped import train_overlapped
from megatron_minpro.loop.serial import train_serially
from megatron_minpro.loop.servers import ServersFailed, evaluate
from megatron_minpro.loop.step_under_way import continued
from megatron_minpro.loop.training_run import StopRequested, TrainingRun, save

log = logging.getLogger(__name__)

# A schedule continues the step that is under way, if any, and runs until all batches are trained.
Schedule = Callable[[TrainingRun], None]
SCHEDULES: Mapping[str, Schedule] = MappingProxyType({"serial": train_serially, "overlapped": train_overlapped})


def train(run: TrainingRun, *, unfinished: UnfinishedStep | None = None, measure: tuple[str, ...] = ()) -> bool:
    """Train by the schedule of the configuration. True when all batches are trained, False after a stop. Checkpoints are then on disk.

    Args:
        run: the run, its servers holding the weights that are to sample next.
        unfinished: the part of a global step that an earlier attempt has done.
        measure: which held-out measurements to make: before, after.

    Raises:
        ServersFailed: with a checkpoint on disk from which the run continues to the same numbers.
    """
    if unfinished is not None:
        run.under_way = continued(unfinished, step=run.counters.next_step, timer=run.timer(unfinished))
    try:
        if "before" in measure:
            evaluate(run, "before")
        SCHEDULES[run.config.effective_schedule](run)
        run.checkpoints.wait()
        if "after" in measure:
            evaluate(run, "after")
    except StopRequested:
        save(run)
        run.checkpoints.wait()
        log.warning("stopped %s, checkpoint written", _where(run))
        return False
    except ServersFailed as failed:
        save(run)
        try:
            run.checkpoints.wait()
        except RuntimeError as not_saved:
            raise ServersFailed(f"{failed}; {not_saved}") from not_saved
        raise
    return True


def _where(run: TrainingRun) -> str:
    """What a log line says of a stop."""
    if run.under_way is None or run.under_way.record() is None:
        return f"before global step {run.counters.next_step}"
    return f"in global step {run.under_way.step}, after {run.under_way.updates} of {run.config.actor.updates_per_step} updates"
