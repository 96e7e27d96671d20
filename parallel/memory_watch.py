"""Resident memory of this process at its fullest, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Highest resident set size since the process began, or since the last reset."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def reset_peak_rss() -> None:
    """From now on peak_rss_bytes speaks of what comes."""
    _CLEAR.write_text("5")
