"""Which schedule a run follows, and what happens when its servers fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megatron_minpro.loop.counters import HalfStep
from megatron_minpro.loop.overlapped import complete_half_step, train_overlapped
from megatron_minpro.loop.serial import train_serially
from megatron_minpro.loop.servers import ServersFailed
from megatron_minpro.loop.training_run import TrainingRun

# A schedule runs to the end (True) or until a stop is asked for (False). Checkpoints are on disk when it returns.
Schedule = Callable[[TrainingRun], bool]
SCHEDULES: Mapping[str, Schedule] = MappingProxyType({"serial": train_serially, "overlapped": train_overlapped})


def train(run: TrainingRun, *, half_step: HalfStep | None = None) -> bool:
    """Train by the schedule of the configuration. True when all batches are trained, False after a stop.

    Args:
        run: the run, its servers holding the weights that are to sample next.
        half_step: what was left undone when the servers failed, see loop/counters.py.

    Raises:
        ServersFailed: with a checkpoint on disk from which the run continues to the same numbers.
    """
    try:
        if half_step is not None:
            complete_half_step(run, half_step)
        return SCHEDULES[run.config.effective_schedule](run)
    except ServersFailed as failed:
        run.checkpoints.save(failed.half_step)
        run.checkpoints.wait()
        raise
