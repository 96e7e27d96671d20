"""What a benchmark reports: its own seconds (or bytes) beside a peer's, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """seconds: median of our runs. peer_seconds: of what it is compared with. target: largest ratio that is good enough."""

    name: str
    seconds: float
    peer: str
    peer_seconds: float
    target: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds


def median_seconds(function: Callable[[], object], *, repeats: int) -> float:
    """Median wall seconds after one run that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = ["| what | ms | against | ms | ratio | target |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {1e3 * row.seconds:.2f} | {row.peer} | {1e3 * row.peer_seconds:.2f} | {row.ratio:.2f} | {row.target:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
