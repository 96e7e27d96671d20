"""Memory that a process frees stays with it: on a CPU, tensors of the same sizes come and go at every step.

glibc gives large blocks back to the system at once, and the system clears their pages again at the next request: a fifth of a small run's
system time.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
# Bytes; larger blocks still come from the system and go back. glibc before 2.35 refuses more than mallopt(3) promises, 32 MB.
_LARGEST_KEPT_BLOCKS = (2**28, 2**25)
_MOST_KEPT = 2**30  # bytes that are free at the end of the heap


def keep_freed_memory() -> None:
    """Keep freed memory in this process and in those that it forks. Raises RuntimeError where the C library refuses."""
    libc = ctypes.CDLL(None)
    for setting, values in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCKS), (_M_TRIM_THRESHOLD, (_MOST_KEPT,))):
        if not any(libc.mallopt(setting, value) == 1 for value in values):
            raise RuntimeError(f"mallopt({setting}, {values[-1]}) was refused")
