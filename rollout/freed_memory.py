"""Memory that a process frees stays with it: on a CPU, tensors of the same sizes come and go at every step.

glibc gives large blocks back to the system at once, and the system clears their pages again at the next request: a fifth of a small run's
system time.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_KEPT_BLOCK = 2**28  # bytes; larger ones still come from the system and go back
_MOST_KEPT = 2**30  # bytes that are free at the end of the heap


def keep_freed_memory() -> None:
    """Of this process and those it forks. Raises RuntimeError where the C library refuses."""
    libc = ctypes.CDLL(None)
    for setting, value in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK), (_M_TRIM_THRESHOLD, _MOST_KEPT)):
        if libc.mallopt(setting, value) != 1:
            raise RuntimeError(f"mallopt({setting}, {value}) was refused")
