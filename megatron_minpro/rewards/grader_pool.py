"""Worker processes that compare answers with math-verify, each answer under a wall-clock limit.

A worker that overruns its limit is killed, one that dies is replaced, and the answer at fault gets an error instead of a verdict: grading
never stops a run. Only a worker that cannot even start is fatal, for then no answer could be graded.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_minpro.rewards.answers import EXACT, Tolerance
from megatron_minpro.working_folder import child_environment

_WORKER_FILE = Path(__file__).with_name("grader_worker.py")
_START_TIMEOUT_S = 120.0  # importing sympy on a busy machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Exactly one of the two is set."""

    equal: bool | None
    error: str | None  # "timeout", "crash", or the exception math-verify raised


class _Worker:
    """One process. Replies are read from the raw pipe, because select does not see what a buffered reader already holds."""

    def __init__(self, memory_bytes: int) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        # -P: the package's own folder must not shadow modules of the same name. No thread pools in a process that does one thing.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_FILE), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**child_environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C is for the run, which then closes its workers
        )
        self._received = b""
        ready = self._read_line(_START_TIMEOUT_S)
        if ready is None or "ready" not in ready:
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise RuntimeError(f"the math-verify worker ({sys.executable} {_WORKER_FILE}) did not start: {' | '.join(lines[-3:])}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, label: str, answer: str, tolerance: Tolerance, timeout_s: float) -> Verdict:
        assert self._process.stdin is not None
        fields = {"label": label, "answer": answer, "relative": tolerance.relative, "absolute": tolerance.absolute, "limit_s": timeout_s}
        request = json.dumps(fields) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return Verdict(equal=None, error="crash")
        reply = self._read_line(timeout_s)
        if reply is None:
            return Verdict(equal=None, error="timeout" if self.alive() else "crash")
        return Verdict(equal=reply.get("equal"), error=reply.get("error"))

    def close(self) -> None:
        """Kill and reap; harmless when the process is gone."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # unsent bytes for a process that is gone
                stream.close()
        self._stderr.close()

    def _read_line(self, timeout_s: float) -> dict[str, Any] | None:
        """The next reply, or None at the time limit or when the process has ended."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                self._process.wait()  # so that alive() tells the truth
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


class GraderPool:
    """`workers` processes, started at the first use and kept. Close it, or use it as a context manager."""

    def __init__(self, *, workers: int, timeout_s: float, memory_mb: int) -> None:
        """timeout_s: wall-clock limit per answer. memory_mb: address space of one worker. Raises ValueError for values out of range."""
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
        """Verdicts on (label, answer) pairs, in order. tolerances: one per pair; None: numbers must be equal."""
        return list(self._threads.map(self._compare_one, pairs, [EXACT] * len(pairs) if tolerances is None else tolerances))

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
            if verdict.error in ("timeout", "crash"):
                worker.close()
                worker = None
            return verdict
        finally:
            self._slots.put(worker)
