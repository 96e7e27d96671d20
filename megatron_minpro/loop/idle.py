"""How much of a global step the trainer and the servers do nothing, and how near the step is to the ideal of its schedule."""

from __future__ import annotations

from collections.abc import Mapping


def idle_metrics(seconds: Mapping[str, float], *, wall_s: float, overlapped: bool) -> dict[str, float]:
    """Metrics of one step.

    Args:
        seconds: by phase, of what took place in the step: the overlapped schedule scores the batch before in it. Without an entry "wait"
            of that schedule the trainer waited for nothing.
        wall_s: of the whole step.
        overlapped: whether sampling and training ran at the same time; else the trainer waits for all of sampling.
    """

    def spent(*phases: str) -> float:
        return sum(seconds.get(phase, 0.0) for phase in phases)

    sampling, training = spent("sample", "reward"), spent("score", "update")
    found = {
        "time/wait": spent("wait") if overlapped else sampling,
        "time/idle_servers": max(0.0, wall_s - spent("sample", "evaluate")),
    }
    if overlapped:
        found["throughput/overlap_efficiency"] = (max(sampling, training) + spent("sync")) / wall_s
    return found
