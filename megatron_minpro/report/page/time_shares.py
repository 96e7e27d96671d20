"""Where a run's wall time went, by role: the trainer and the servers work at the same time, and each has a share of idleness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TRAINER = (("time/update", "update"), ("time/score", "score"), ("time/sync", "publish weights"))
_SERVERS = (("time/sample", "sample"), ("time/evaluate", "evaluate"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A phase of a role."""

    name: str
    seconds: float
    share: float  # of all steps' wall time
    idle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What a role did."""

    name: str
    parts: tuple[Part, ...]


def time_shares(metrics: Sequence[Mapping[str, float | None]]) -> list[Role]:
    """The trainer and the servers over all steps; [] where no step says how long it took.

    Phases are those of metrics_table.py, so what is neither measured nor idle is `other`. Servers sample while they are not idle.
    """
    whole = _total(metrics, "time/step")
    if whole <= 0:
        return []
    return [
        _role("Trainer", metrics, _TRAINER, idle=_total(metrics, "time/wait"), whole=whole),
        _role("Servers", metrics, _SERVERS, idle=_total(metrics, "time/idle_servers"), whole=whole),
    ]


def _role(
    name: str, metrics: Sequence[Mapping[str, float | None]], phases: Sequence[tuple[str, str]], *, idle: float, whole: float
) -> Role:
    seconds = {label: _total(metrics, metric) for metric, label in phases}
    busy = math.fsum(seconds.values())
    idle = min(idle, whole)
    scale = min(1.0, (whole - idle) / busy) if busy else 1.0  # phases that overlap do not make a step longer
    parts = [Part(name=label, seconds=spent * scale, share=spent * scale / whole) for label, spent in seconds.items() if spent]
    other = whole - idle - busy * scale
    if other > 0.005 * whole:
        parts.append(Part(name="other", seconds=other, share=other / whole))
    parts.append(Part(name="idle", seconds=idle, share=idle / whole, idle=True))
    return Role(name=name, parts=tuple(parts))


def _total(metrics: Sequence[Mapping[str, float | None]], name: str) -> float:
    return math.fsum(value for line in metrics if (value := line.get(name)) is not None)
