"""The global step that is under way: what is done of it, and what a checkpoint that is written in it must hold.

    batch              updates 0                      0 < updates < u                     updates = u
    none | missing     the whole state before it      kept weights if missing             kept weights if missing
    waiting            the batch is in the buffer     the batch is in the buffer          (the step ends)

`missing` batches are sampled again, under the weights that the step began with. With no update done these are the actor's own. Before it
the held-out measurement of the step is made, where one is due: it may be missing too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from megatron_minpro.loop.counters import BatchState, UnfinishedStep
from megatron_minpro.loop.phase_timer import PhaseTimer
from megatron_minpro.tracking.step_details import Histogram
from parallel.actor import UpdateReport
from parallel.routing_replay import RoutingCounts


@dataclass(slots=True, kw_only=True)
class StepUnderWay:
    """Changes while the step goes on. Equal on all ranks but for seconds and what is known of the sampled responses."""

    step: int
    timer: PhaseTimer
    batch: BatchState
    updates: int = 0  # optimizer steps done, on the batch that is due
    lags: list[int] = field(default_factory=list)  # of those updates
    reports: list[UpdateReport] = field(default_factory=list)  # of those updates, until the last one is done
    metrics: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)  # of all updates; no checkpoint holds them: a tracker may lack a step's

    def add_update(self, report: UpdateReport, *, lag: int) -> None:
        """Count one optimizer step.

        Raises ValueError when the names of its metrics differ from those of the update before, as after a checkpoint that another version
        wrote inside the step.
        """
        if self.reports and (other := self.reports[-1].metrics.keys() ^ report.metrics.keys()):
            raise ValueError(
                f"global step {self.step}: its updates have different metrics ({', '.join(sorted(other))}); if another version wrote this "
                "checkpoint, continue with that version, or write the name of a checkpoint before this step into checkpoints/latest"
            )
        self.updates += 1
        self.lags.append(lag)
        self.reports.append(report)

    def record(self) -> UnfinishedStep | None:
        """What a checkpoint holds of it. None where nothing is done that the state before the step does not hold."""
        assert self.batch != "unscored", "a batch waits in the buffer before anything is saved"
        if self.updates == 0 and self.batch != "waiting":
            return None
        return UnfinishedStep(
            batch=self.batch,
            updates=self.updates,
            lags=tuple(self.lags),
            reports=tuple(map(_as_json, self.reports)),
            metrics=dict(self.metrics),
            seconds=self.timer.reading(),
        )


def continued(record: UnfinishedStep, *, step: int, timer: PhaseTimer) -> StepUnderWay:
    """The step as it was when the record was made. timer: begins with the record's seconds."""
    return StepUnderWay(
        step=step,
        timer=timer,
        batch=record.batch,
        updates=record.updates,
        lags=list(record.lags),
        reports=[_from_json(report) for report in record.reports],
        metrics=dict(record.metrics),
    )


def _as_json(report: UpdateReport) -> dict[str, Any]:
    values = {one.name: getattr(report, one.name) for one in fields(UpdateReport)}
    routing = None if report.routing is None else asdict(report.routing)
    return {**values, "metrics": {name: sums.tolist() for name, sums in report.metrics.items()}, "routing": routing}


def _from_json(values: Mapping[str, Any]) -> UpdateReport:
    metrics = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in values["metrics"].items()}
    routing = None if values["routing"] is None else RoutingCounts(**values["routing"])
    return UpdateReport(**{**values, "metrics": metrics, "routing": routing})
