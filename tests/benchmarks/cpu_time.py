"""CPU seconds of a process and everything it started."""

from __future__ import annotations

from contextlib import suppress

import psutil


def tree_cpu_s(pid: int) -> float:
    """User and system seconds so far of a process, its living descendants, and the dead ones that were waited for."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile; its parent's times hold it
                total += sum(each.cpu_times()[:4])  # user, system, and both of children that were waited for
    return total
