"""Keeps servers running: restarts a server that died or hangs, on its port, a limited number of times within a window.

A restarted server holds the weights of the model folder. It gets no requests before the trainer has published the current ones into it:
gate.py decides that, where requests are sent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from rollout.background import in_background
from rollout.sglang import control as sglang_control
from rollout.sglang.server import ServerDied, ServerPool

_PROBE_EVERY_S = 1.0
_PROBE_TIMEOUT_S = 2.0
_ALL_SILENT_PATIENCE = 4  # if no server answers, the machine may be overloaded: wait this many times longer


class Supervisor:
    """Watches a pool whose servers are ready. Call `check` about once a second from the thread that owns the pool.

    unresponsive_after_s: a server whose /health is silent for so long, while others answer, hangs. max_restarts: of one server within
    window_s seconds; the next death raises. start_timeout_s: a restarted server must be ready by then, or else counts as dead again.
    announce: takes lines for people.
    """

    def __init__(
        self,
        pool: ServerPool,
        *,
        max_restarts: int,
        window_s: float,
        unresponsive_after_s: float,
        start_timeout_s: float,
        announce: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._most_silent = max(1, round(unresponsive_after_s / _PROBE_TIMEOUT_S))
        self._start_timeout_s = start_timeout_s
        self._announce = announce
        num_servers = len(pool.processes)
        self._restarts: list[deque[float]] = [deque() for _ in range(num_servers)]
        self._starting: dict[int, Future[None]] = {}
        self._silent = [0] * num_servers  # probes in a row without an answer; counted, not timed: this process may have been asleep
        self._closed = threading.Event()
        for index in range(num_servers):
            threading.Thread(target=self._probe, args=(index,), name=f"health of server {index}", daemon=True).start()

    def check(self) -> None:
        """Start what is dead or hangs again, in the background.

        Raises ServerDied, with its last log lines, when a server has been restarted too often.
        """
        for index, server in enumerate(self._pool.processes):
            start = self._starting.get(index)
            if start is not None:
                if not start.done():
                    continue
                del self._starting[index]
                self._silent[index] = 0
                if (error := start.exception()) is None:
                    self._announce(f"{server.name} runs again; it gets requests once it has the current weights")
                    continue
                if not isinstance(error, ServerDied):
                    raise error
                self._restart(index, str(error))
            elif not server.is_running:
                self._restart(index, server.describe_end())
            elif self._hangs(index):
                self._restart(index, f"no answer to {self._silent[index]} health checks in a row: {server.describe_end()}")

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _hangs(self, index: int) -> bool:
        others_answer = any(silent == 0 for other, silent in enumerate(self._silent) if other != index and other not in self._starting)
        return self._silent[index] >= self._most_silent * (1 if others_answer else _ALL_SILENT_PATIENCE)

    def _restart(self, index: int, reason: str) -> None:
        now = time.monotonic()
        times = self._restarts[index]
        while times and now - times[0] > self._window_s:
            times.popleft()
        if len(times) >= self._max_restarts:
            raise ServerDied(f"after {len(times)} restarts within {self._window_s:g} s: {reason}")
        times.append(now)
        self._announce(f"{reason.partition('; last lines')[0]}; restarting it ({len(times)} of at most {self._max_restarts} times)")
        restart = partial(self._pool.restart, index, start_timeout_s=self._start_timeout_s)
        self._starting[index] = in_background(restart, name=f"restart of server {index}")

    def _probe(self, index: int) -> None:
        endpoint = self._pool.endpoints[index]
        while not self._closed.wait(_PROBE_EVERY_S):
            try:
                sglang_control.call(endpoint, "/health", key=None, timeout_s=_PROBE_TIMEOUT_S)
            except sglang_control.ServerRefused as refused:
                # An error is an answer: this probe finds out whether the server is stuck.
                self._silent[index] = self._silent[index] + 1 if refused.status is None else 0
            else:
                self._silent[index] = 0
