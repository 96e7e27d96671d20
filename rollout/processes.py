"""Supervised child processes: own session, a log file, an end together with their parent, and an end of the whole tree.

Every child is started by one thread that lives as long as this process (see `die_with_parent`: the kernel watches the thread that
started a child, not the process), through exec_with_parent.py rather than preexec_fn, which is unsafe in a process with threads.
Every child carries a mark in its environment, by which all of its offspring is found, also by the reaper when this process is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from rollout import reaper
from rollout.exec_with_parent import die_with_parent, with_parent

__all__ = ["ManagedProcess", "die_with_parent", "fork", "spawn", "terminate_all"]

_REDACTED = "[redacted]"
_KILL_WAIT_S = 10.0
_ORPHANS_GRACE_S = 1.0  # for the offspring, once the children themselves have ended


class _Starter:
    """The thread that starts all children of this process, and ends only with it; beside it the reaper, for a sudden end."""

    def __init__(self) -> None:
        self.owner = uuid.uuid4().hex[:16]
        self._num_marks = itertools.count()
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, self.owner],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # a signal to this process's group must not end it
        )
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="process starter", daemon=True).start()

    def _serve(self) -> None:
        while True:
            options, answer = self._requests.get()
            try:
                answer.put(subprocess.Popen(**options))
            except Exception as error:  # handed to the caller, who raises it
                answer.put(error)

    def next_mark(self) -> str:
        """A mark that no other child of any process carries."""
        return f"{self.owner}/{next(self._num_marks)}"

    def leave_reaper(self) -> None:
        """Close this process's end of the reaper's pipe."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()

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
        if _starter is None:
            _starter = _Starter()
        return _starter


def _forget_starter() -> None:
    """In a forked child: it has no copy of the thread, and must not keep the reaper from noticing its owner's end."""
    global _starter, _starter_lock
    if _starter is not None:
        _starter.leave_reaper()
    _starter, _starter_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_starter)


class Child(Protocol):
    """What is needed of subprocess.Popen; `ForkedChild` is the other one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...


class ForkedChild:
    """A child that was forked from this process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._exit_code: int | None = None

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._exit_code is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked child", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, sig: int) -> None:
        """To the child, unless it has ended."""
        if self.poll() is None:
            os.kill(self._pid, sig)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedProcess:
    """A running (or ended) child. Made by `spawn` or `fork`.

    mark: carried by all of its offspring. secrets: never shown, though the log has them.
    """

    name: str
    command: tuple[str, ...]
    log_path: Path
    log_start: int  # bytes already in the log when this child started
    popen: Child
    mark: str
    secrets: tuple[str, ...] = field(default=(), repr=False)

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
        """The last lines this child (not an earlier one with the same log) wrote, its secrets replaced."""
        max_bytes = 1000 * num_lines
        secrets = [secret.encode() for secret in self.secrets]
        # A secret that the beginning of the window cuts in two is not recognised: a margin of its length is read and not shown.
        margin = max((len(secret) for secret in secrets), default=0)
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            begin = max(self.log_start, size - max_bytes - margin)
            log.seek(begin)
            content = log.read()
        for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
            content = content.replace(secret, _REDACTED.encode())
        shown = content if begin == self.log_start else content[margin:]
        return shown.decode(errors="replace").splitlines()[-num_lines:]

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
        """This process, its descendants, and everything else in its session or with its mark (descendants whose own parent has ended).

        The session as well as the mark: a process may overwrite its environment, as those do that change their titles.
        """
        members: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            for process in [root, *root.children(recursive=True)]:
                members[process.pid] = process
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if process.pid not in members and os.getsid(process.pid) == self.pid:
                    members[process.pid] = process
        for pid in reaper.marked_pids(self.mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                members.setdefault(pid, psutil.Process(pid))
        return [process for process in members.values() if _is_alive(process)]

    def terminate(self, deadline_s: float = 10.0) -> None:
        """End the whole tree: SIGTERM to the child, and SIGKILL to everything that is left after `deadline_s` seconds at most.

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
    secrets: tuple[str, ...] = (),
) -> ManagedProcess:
    """Start `command` in a session of its own, with output appended to `log_path`; it and its offspring are killed when this process ends.

    env: the child's whole environment; nothing but the mark (MINPRO_TREE) is added.
    secrets: keys that the command may write into its log, which only this user can read; they are replaced wherever lines of it are shown.
    ignore_signals: ignored by the child from its first instruction on.
    Ctrl-C in the terminal does not reach the child (own session); its owner decides.
    Raises OSError if the log cannot be written; a command that cannot run shows as exit code 127 with one line in the log.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    starter = _get_starter()
    mark = starter.next_mark()
    outer_marks = [os.environ[reaper.VARIABLE]] if reaper.VARIABLE in os.environ else []
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        os.fchmod(log.fileno(), 0o600)  # an earlier log of that name may be open to others
        log_start = log.seek(0, os.SEEK_END)
        popen = starter.start(
            args=with_parent(command, ignored=ignore_signals),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**env, reaper.VARIABLE: ":".join([*outer_marks, mark])},
            start_new_session=True,
        )
    return ManagedProcess(
        name=name, command=tuple(command), log_path=log_path, log_start=log_start, popen=popen, mark=mark, secrets=tuple(secrets)
    )


def fork(main: Callable[[], object], *, log_path: Path, name: str, ignore_signals: Iterable[signal.Signals] = ()) -> ManagedProcess:
    """A copy of this process runs `main` in a session of its own and ends, with output appended to `log_path`; it is killed when the
    calling thread ends.

    For a child that needs what this process has imported; it must not have looked at CUDA. Other threads do not exist in the child.

    Args:
        main: its exit code is 0 when it returns, that of SystemExit, or 1 after another exception, whose traceback the log has.
        log_path: of the output.
        name: for messages.
        ignore_signals: ignored by the child.

    Raises:
        OSError: the log cannot be written.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    parent_pid = os.getpid()
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        log_start = log.seek(0, os.SEEK_END)
        pid = os.fork()
        if pid == 0:
            _run_forked(main, parent_pid=parent_pid, log=log.fileno(), ignore_signals=ignore_signals)
    return ManagedProcess(
        name=name,
        command=(name,),
        log_path=log_path,
        log_start=log_start,
        popen=ForkedChild(pid),
        mark=f"{uuid.uuid4().hex[:16]}/forked",  # nobody carries it: an environment is read when a program begins
    )


def _run_forked(main: Callable[[], object], *, parent_pid: int, log: int, ignore_signals: Iterable[signal.Signals]) -> None:
    """Never returns: what the parent would do next, and at its end, is not the child's to do."""
    code = 1
    try:
        os.setsid()
        die_with_parent(parent_pid=parent_pid)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in ignore_signals:
            signal.signal(number, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        sys.stdout, sys.stderr = (os.fdopen(target, "w", buffering=1, closefd=False) for target in (1, 2))  # whatever replaced them
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def terminate_all(processes: Sequence[ManagedProcess], *, deadline_s: float) -> None:
    """End several trees together, within one deadline: SIGTERM to each child, then SIGKILL to everything left of any tree.

    Offspring that outlives the children (helpers that ignore SIGTERM and wait for nothing) is not waited for until the deadline.
    """
    members = _members(processes)
    for process in processes:
        if process.is_running:
            with contextlib.suppress(ProcessLookupError):
                process.popen.terminate()
    deadline = time.monotonic() + deadline_s
    _wait_until_gone(processes, [], deadline)
    _wait_until_gone(processes, members, min(deadline, time.monotonic() + _ORPHANS_GRACE_S))
    give_up = time.monotonic() + _KILL_WAIT_S
    # Again and again: a tree may have grown, or a member lost its parent, since the last look.
    while (members := _alive([*members, *_members(processes)])) and time.monotonic() < give_up:
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        _wait_until_gone(processes, members, give_up)


def _members(processes: Sequence[ManagedProcess]) -> list[psutil.Process]:
    return [member for process in processes for member in process.tree()]


def _alive(members: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [member for member in set(members) if _is_alive(member)]


def _wait_until_gone(processes: Sequence[ManagedProcess], members: Sequence[psutil.Process], deadline: float) -> None:
    while time.monotonic() < deadline:
        # poll() of every child also reaps it, so that it does not stay in the table as a zombie.
        if not any([process.is_running for process in processes]) and not _alive(members):
            return
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
