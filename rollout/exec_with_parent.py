"""Run a command that cannot outlive its parent: `python exec_with_parent.py PARENT_PID SIGNAL IGNORED -- command ...`.

A file of its own, standard library only, so that it starts in milliseconds and runs under any Python, without importing this package.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Sequence

PR_SET_PDEATHSIG = 1


def die_with_parent(*, parent_pid: int, death_signal: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `death_signal` to this process when its parent ends (Linux, prctl(2) PR_SET_PDEATHSIG).

    "Parent" means the THREAD that started this process: if that thread ends, the signal comes although the process lives on.
    `parent_pid` closes the race with a parent that died before the request was made: then this process exits at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(128 + int(death_signal))


def with_parent(command: Sequence[str], *, ignored: Iterable[signal.Signals] = ()) -> list[str]:
    """The command line of a `command` that is killed when the thread of this process that starts it ends. ignored: signals."""
    numbers = ",".join(str(int(number)) for number in ignored)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(signal.SIGKILL)), numbers, "--", *command]


def main(arguments: list[str]) -> None:
    parent_pid, death_signal, ignored = arguments[:3]
    command = arguments[arguments.index("--") + 1 :]
    for number in ignored.split(","):
        if number:
            signal.signal(int(number), signal.SIG_IGN)  # survives exec
    # The request survives exec as well: the command inherits it without knowing.
    die_with_parent(parent_pid=int(parent_pid), death_signal=int(death_signal))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
