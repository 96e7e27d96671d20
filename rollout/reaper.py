"""Everything that carries a mark in its environment, and its end: `python reaper.py MARK`, with a pipe as standard input.

A child's offspring cannot be found by parentage and session alone: torchrun starts each worker in a session of its own, and when a worker
is killed, the helpers of its `multiprocessing` (resource tracker, spawned writers) go to init and live on, each holding open the pipe
whose end the other waits for. The environment, though, is inherited by all of them.

The reaper covers the owner's own sudden death. Only the owner holds the other end of its pipe: when that closes, whatever still carries
the owner's mark is killed. A file of its own, standard library only, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

VARIABLE = "MINPRO_TREE"  # marks, outermost first, separated by colons: "OWNER/0:INNER_OWNER/3"
_GIVE_UP_S = 30.0
_PAUSE_S = 0.05


def marked_pids(mark: str) -> list[int]:
    """Living processes of this user whose environment carries `mark` ("OWNER/3") or a mark below it ("OWNER": all of an owner's)."""
    found = []
    for name in os.listdir("/proc"):
        # Gone meanwhile, or another user's. A zombie's environment reads as empty.
        with contextlib.suppress(OSError):
            if name.isdigit() and _carries(mark, f"/proc/{name}/environ"):
                found.append(int(name))
    return found


def _carries(mark: str, environ_path: str) -> bool:
    with open(environ_path, "rb") as file:
        content = file.read()
    for entry in content.split(b"\0"):
        variable, _, value = entry.partition(b"=")
        if variable == VARIABLE.encode():
            return any(carried == mark or carried.startswith(f"{mark}/") for carried in value.decode(errors="replace").split(":"))
    return False


def kill_marked(mark: str) -> None:
    """SIGKILL to everything that carries `mark`, until two looks in a row find nothing (one can miss a process just forked)."""
    give_up = time.monotonic() + _GIVE_UP_S
    empty_looks = 0
    while empty_looks < 2 and time.monotonic() < give_up:
        pids = marked_pids(mark)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        empty_looks = 0 if pids else empty_looks + 1
        time.sleep(_PAUSE_S)


def main(arguments: list[str]) -> None:
    sys.stdin.buffer.read()  # returns when the owner has ended
    kill_marked(arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
