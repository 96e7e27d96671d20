"""Supervised child processes: own session, a log file, an end together with their parent, and an end of the whole tree.

Every child is started by one thread that lives as long as this process (see `die_with_parent`: the kernel watches the thread that
started a child, not the process), through exec_with_parent.py rather than preexec_fn, which is unsafe in a process with threads.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rollout import exec_with_parent
from rollout.exec_with_parent import die_with_parent

__all__ = ["ManagedProcess", "die_with_parent", "spawn", "terminate_all"]


class _Starter:
    """The thread that starts all children of this process, and ends only with it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="process starter", daemon=True).start()

    def _serve(self) -> None:
        while True:
            options, answer = self._requests.get()
            try:
                answer.put(subprocess.Popen(**options))
            except Exception as error:  # handed to the caller, who raises it
                answer.put(error)

    def start(self, **options: Any) -> subprocess.Popen[bytes]:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests.put((options, answer))
        result = answer.get()
        if isinstance(result, Exception):
            raise result
        return result


_starter: _Starter | None = None
_starter_lock = threading.Lock()


def _get_starter() -> _Starter:
    global _starter
    with _starter_lock:
        if _starter is None or _starter.pid != os.getpid():  # a forked child has no copy of the thread
            _starter = _Starter()
        return _starter


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedProcess:
    """A running (or ended) child. Made by `spawn`."""

    name: str
    command: tuple[str, ...]
    log_path: Path
    log_start: int  # bytes already in the log when this child started
    popen: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        return self.popen.poll()

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end; its exit code. Raises subprocess.TimeoutExpired."""
        return self.popen.wait(timeout_s)

    def last_log_lines(self, num_lines: int) -> list[str]:
        """The last lines this child (not an earlier one with the same log) wrote."""
        max_bytes = 1000 * num_lines
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_start, size - max_bytes))
            return log.read().decode(errors="replace").splitlines()[-num_lines:]

    def describe_end(self, *, num_lines: int = 20) -> str:
        """How it ended, for an error message: exit code or signal, where the log is, and its last lines."""
        code = self.exit_code
        if code is None:
            how = "is still running"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        lines = "\n".join(f"    {line}" for line in self.last_log_lines(num_lines))
        return f"{self.name} (pid {self.pid}) {how}; last lines of {self.log_path}:\n{lines}"

    def tree(self) -> list[psutil.Process]:
        """This process, its descendants, and everything else in its session (descendants whose own parent has ended)."""
        members: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            for process in [root, *root.children(recursive=True)]:
                members[process.pid] = process
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if process.pid not in members and os.getsid(process.pid) == self.pid:
                    members[process.pid] = process
        return [process for process in members.values() if _is_alive(process)]

    def terminate(self, deadline_s: float = 10.0) -> None:
        """End the whole tree: SIGTERM to the child, and SIGKILL to everything that is left after `deadline_s` seconds.

        Returns when nothing of it is left. Calling it again, or after the child ended by itself, only sweeps up what is left.
        """
        terminate_all([self], deadline_s=deadline_s)


def spawn(
    command: Sequence[str],
    *,
    log_path: Path,
    env: Mapping[str, str],
    name: str,
    ignore_signals: Iterable[signal.Signals] = (),
    cwd: Path | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
) -> ManagedProcess:
    """Start `command` in a session of its own, with output appended to `log_path`; it ends (`death_signal`) when this process ends.

    env: the child's whole environment; nothing of this process's own is added.
    ignore_signals: ignored by the child from its first instruction on.
    Ctrl-C in the terminal does not reach the child (own session); its owner decides.
    Raises OSError if the log cannot be written; a command that cannot run shows as exit code 127 with one line in the log.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    ignored = ",".join(str(int(number)) for number in ignore_signals)
    shim = [sys.executable, "-I", "-S", exec_with_parent.__file__, str(os.getpid()), str(int(death_signal)), ignored, "--"]
    with log_path.open("ab") as log:
        log_start = log.tell()
        popen = _get_starter().start(
            args=[*shim, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    return ManagedProcess(name=name, command=tuple(command), log_path=log_path, log_start=log_start, popen=popen)


def terminate_all(processes: Sequence[ManagedProcess], *, deadline_s: float) -> None:
    """End several trees together, within one deadline: SIGTERM to each child, then SIGKILL to everything left of any tree."""
    members = {member.pid: member for process in processes for member in process.tree()}
    for process in processes:
        if process.is_running:
            with contextlib.suppress(ProcessLookupError):
                process.popen.terminate()
    deadline = time.monotonic() + deadline_s
    _wait_until_gone(processes, list(members.values()), deadline)
    # Once more: a tree may have grown, or a member lost its parent, since the first look.
    members |= {member.pid: member for process in processes for member in process.tree()}
    for member in members.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _wait_until_gone(processes, list(members.values()), time.monotonic() + 10.0)


def _wait_until_gone(processes: Sequence[ManagedProcess], members: Sequence[psutil.Process], deadline: float) -> None:
    while time.monotonic() < deadline:
        # poll() of every child also reaps it, so that it does not stay in the table as a zombie.
        if not any([process.is_running for process in processes]) and not any(_is_alive(member) for member in members):
            return
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
