"""What /proc says of a forked process: arguments and environment as if a program had been started with them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

_PR_SET_MM, _PR_SET_MM_MAP = 35, 14  # prctl(2)
# Fields of /proc/PID/stat, counted from 1, that are fields of the map.
_STAT = {
    "start_code": 26,
    "end_code": 27,
    "start_stack": 28,
    "start_data": 45,
    "end_data": 46,
    "start_brk": 47,
    "arg_start": 48,
    "arg_end": 49,
    "env_start": 50,
    "env_end": 51,
}
_shown: list[ctypes.Array[ctypes.c_char]] = []  # the kernel reads these buffers, so they must live as long as the process


class _Map(ctypes.Structure):
    """struct prctl_mm_map of the kernel."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack")),
        *((name, ctypes.c_uint64) for name in ("arg_start", "arg_end", "env_start", "env_end", "auxv")),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


def show(*, arguments: Sequence[str] = (), environment: Sequence[str] = ()) -> bool:
    """Of this process and of those that it forks from now on. Nothing given: as it was. False where the system does not allow it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    found = {name: int(fields[number - 3]) for name, number in _STAT.items()}  # the first field behind the name is number 3
    for kind, words in (("arg", arguments), ("env", environment)):
        if words:
            text = b"".join(word.encode() + b"\0" for word in words)
            _shown.append(ctypes.create_string_buffer(text, len(text)))
            start = ctypes.addressof(_shown[-1])
            found |= {f"{kind}_start": start, f"{kind}_end": start + len(text)}
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_void_p
    described = _Map(**found, exe_fd=2**32 - 1)  # -1: the program stays
    described.brk = libc.sbrk(0)  # last: the heap may have grown meanwhile
    return bool(libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.byref(described), ctypes.c_ulong(ctypes.sizeof(described)), 0) == 0)
