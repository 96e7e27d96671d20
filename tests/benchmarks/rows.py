"""What a benchmark reports: its own seconds (or bytes) beside a peer's, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """seconds: median of our runs. peer_seconds: of what it is compared with. target: largest ratio that is good enough, None if any is.

    own_bytes, peer_bytes, bytes_target: the same for bytes, where a row is about what is sent or held too (its name says which).
    peak_bytes: largest resident memory of the process that did it, where that was measured; peak_target: the most that is good enough.
    """

    name: str
    seconds: float
    peer: str
    peer_seconds: float
    target: float | None
    own_bytes: int | None = None
    peer_bytes: int | None = None
    bytes_target: float | None = None
    peak_bytes: int | None = None
    peak_target: int | None = None

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds

    @property
    def bytes_ratio(self) -> float | None:
        return None if self.own_bytes is None or self.peer_bytes is None else self.own_bytes / self.peer_bytes


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
    """A Markdown table; columns of bytes and of peak memory only where a row has them."""
    with_bytes = any(row.own_bytes is not None for row in rows)
    with_peak = any(row.peak_bytes is not None for row in rows)
    head = ["what", "ms", "against", "ms", "ratio", "target"]
    head += ["bytes", "against", "ratio", "target"] * with_bytes + ["peak MB", "target"] * with_peak
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.name, f"{1e3 * row.seconds:.2f}", row.peer, f"{1e3 * row.peer_seconds:.2f}", f"{row.ratio:.2f}"]
        cells += [_cell(row.target, ".2f")]
        if with_bytes:
            cells += [_cell(row.own_bytes, ","), _cell(row.peer_bytes, ","), _cell(row.bytes_ratio, ".2g"), _cell(row.bytes_target, ".2g")]
        if with_peak:
            cells += ["" if number is None else f"{number / 1e6:.0f}" for number in (row.peak_bytes, row.peak_target)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(number: float | None, format_spec: str) -> str:
    return "" if number is None else format(number, format_spec)


def resident_bytes(field: str) -> int:
    """VmRSS: now; VmHWM: the most so far. Not getrusage, whose maximum a child inherits from a larger parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
