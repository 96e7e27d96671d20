"""Worker processes that compare answers with math-verify, each answer under a wall-clock limit.

A worker that overruns its limit is stopped, one that dies is replaced, and the answer at fault gets an error instead of a verdict: grading
never stops a run. The successor stands ready (see grader_worker.py), so an overrun costs its time limit and a few milliseconds.
Only a worker that cannot even start is fatal, for then no answer could be graded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_minpro.rewards.answers import EXACT, Tolerance
from megatron_minpro.rewards.grader_signal import STOP_SIGNAL
from megatron_minpro.working_folder import child_environment

_WORKER_MODULE = "megatron_minpro.rewards.grader_worker"
_START_TIMEOUT_S = 120.0  # importing sympy on a busy machine
_END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Exactly one of the two is set."""

    equal: bool | None
    error: str | None  # "timeout", "crash", or the exception math-verify raised


class _Worker:
    """One grading worker. Replies are read from the raw pipe, because select does not see what a buffered reader already holds."""

    def __init__(self, memory_bytes: int) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        # -P: the current folder must not shadow modules. No thread pools in a process that does one thing.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER_MODULE, str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**child_environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C is for the run, which then closes its workers
        )
        assert self._process.stdout is not None
        self._replies = self._process.stdout.fileno()
        self._received = b""
        self._asked = 0
        self.pid = 0  # of the process that answers; a new one after each that was stopped or died
        if not self._becomes_ready(_START_TIMEOUT_S):
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().split("\n")
            self.close()
            raise RuntimeError(f"the math-verify worker ({sys.executable} -m {_WORKER_MODULE}) did not start: {' | '.join(lines[-3:])}")

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, label: str, answer: str, tolerance: Tolerance, timeout_s: float) -> Verdict:
        """A verdict on one answer. After a timeout or a crash the next question finds a new process."""
        self._asked += 1
        fields = {"label": label, "answer": answer, "relative": tolerance.relative, "absolute": tolerance.absolute, "limit_s": timeout_s}
        while self._received or select.select([self._replies], [], [], 0)[0]:  # late replies, and a successor's first word
            if (late := self._read_line(1.0)) is None:
                break
            self.pid = late.get("ready", self.pid)
        if not self._send((json.dumps({"number": self._asked, **fields}) + "\n").encode()):
            return Verdict(equal=None, error="crash")
        deadline = time.monotonic() + timeout_s
        began = False
        while (reply := self._read_line(deadline - time.monotonic())) is not None:
            if "ready" in reply:  # the process that was to answer has died, and this is its successor
                self.pid = reply["ready"]
                if began:
                    return Verdict(equal=None, error="crash")
                # Otherwise it died while idle: the successor reads the question, and no answer is to blame.
            elif reply.get("began") == self._asked:
                began = True
            elif reply.get("number") == self._asked:
                return Verdict(equal=reply.get("equal"), error=reply.get("error"))
        if not self.alive():
            return Verdict(equal=None, error="crash")
        self._process.send_signal(STOP_SIGNAL)
        self._becomes_ready(_START_TIMEOUT_S)
        return Verdict(equal=None, error="timeout")

    def close(self) -> None:
        """End and reap both processes; harmless when they are gone."""
        self._process.terminate()
        try:
            self._process.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # start_new_session made it the group's leader
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # unsent bytes for a process that is gone
                stream.close()
        self._stderr.close()

    def _send(self, request: bytes) -> bool:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def _becomes_ready(self, timeout_s: float) -> bool:
        """Read until a process says that it is ready; False at the time limit or when none is left."""
        deadline = time.monotonic() + timeout_s
        while (reply := self._read_line(deadline - time.monotonic())) is not None:
            if "ready" in reply:
                self.pid = reply["ready"]
                return True
        return False

    def _read_line(self, timeout_s: float) -> dict[str, Any] | None:
        """The next reply, or None at the time limit or when the processes have ended."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._replies], [], [], remaining)[0]:
                return None
            chunk = os.read(self._replies, 65536)
            if not chunk:
                self._process.wait()  # so that alive() tells the truth
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


class GraderPool:
    """`workers` processes, started at the first use and kept. Close it, or use it as a context manager."""

    def __init__(self, *, workers: int, timeout_s: float, memory_mb: int) -> None:
        """A pool without processes yet.

        Args:
            workers: answers graded at the same time.
            timeout_s: wall-clock limit per answer.
            memory_mb: address space of one worker.

        Raises:
            ValueError: a value is out of range.
        """
        if workers < 1:
            raise ValueError(f"math_verify: workers must be at least 1, got {workers}")
        if not timeout_s > 0:
            raise ValueError(f"math_verify: timeout_s must be positive, got {timeout_s}")
        if memory_mb < 512:
            raise ValueError(f"math_verify: memory_mb must be at least 512 (sympy needs that much), got {memory_mb}")
        self._timeout_s, self._memory_bytes = timeout_s, memory_mb * 2**20
        self._slots: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()  # None: a worker still to be started
        self._num_workers = workers
        for _ in range(workers):
            self._slots.put(None)
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="math-verify")

    def compare(self, pairs: Sequence[tuple[str, str]], *, tolerances: Sequence[Tolerance] | None = None) -> list[Verdict]:
        """Grade answers.

        Args:
            pairs: (label, answer).
            tolerances: one per pair; None: numbers must be equal.

        Returns:
            One verdict per pair, in order.

        Raises:
            RuntimeError: a worker did not start.
        """
        return list(self._threads.map(self._compare_one, pairs, [EXACT] * len(pairs) if tolerances is None else tolerances))

    async def compare_one(self, label: str, answer: str) -> Verdict:
        """Grade one answer; numbers must be equal. Many calls may be under way. Raises RuntimeError when a worker did not start."""
        return await asyncio.wrap_future(self._threads.submit(self._compare_one, (label, answer), EXACT))

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that have been started. Call it between two compares."""
        workers = [self._slots.get() for _ in range(self._num_workers)]
        for worker in workers:
            self._slots.put(worker)
        return [worker.pid for worker in workers if worker is not None]

    def close(self) -> None:
        """End all workers. The pool cannot be used afterwards; closing twice is harmless."""
        self._threads.shutdown(wait=True)
        while not self._slots.empty():
            worker = self._slots.get()
            if worker is not None:
                worker.close()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compare_one(self, pair: tuple[str, str], tolerance: Tolerance) -> Verdict:
        worker = self._slots.get()
        try:
            if worker is not None and not worker.alive():  # it died while idle: no answer is to blame
                worker.close()
                worker = None
            if worker is None:
                worker = _Worker(self._memory_bytes)
            verdict = worker.ask(*pair, tolerance, self._timeout_s)
            if not worker.alive():
                worker.close()
                worker = None
            return verdict
        finally:
            self._slots.put(worker)
