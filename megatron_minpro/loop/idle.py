"""How much of a global step the trainer and the servers do nothing, and how near the step is to the ideal of its schedule."""

from __future__ import annotations

from collections.abc import Mapping


def idle_metrics(seconds: Mapping[str, float], *, wall_s: float, overlapped: bool, servers_wait_s: float | None = None) -> dict[str, float]:
    """Metrics of one step.

    Args:
        seconds: by phase, of what took place in the step: the overlapped schedule scores the batch before in it. Without an entry "wait"
            of that schedule the trainer waited for nothing.
        wall_s: of the whole step.
        overlapped: whether sampling and training ran at the same time; else the trainer waits for all of sampling.
        servers_wait_s: how long servers had nothing to do, mean over servers, where each changes its weights when it is free; None: all
            do so together.
    """

    def spent(*phases: str) -> float:
        return sum(seconds.get(phase, 0.0) for phase in phases)

    sampling, training = spent("sample", "reward"), spent("score", "update")
    idle = max(0.0, wall_s - spent("sample", "evaluate")) if servers_wait_s is None else min(wall_s, servers_wait_s)
    found = {"time/wait": spent("wait") if overlapped else sampling, "time/idle_servers": idle}
    if overlapped:
        ideal = max(sampling, training) + spent("sync") if servers_wait_s is None else max(wall_s - idle, training + spent("sync"))
        found["throughput/overlap_efficiency"] = ideal / wall_s
    return found
