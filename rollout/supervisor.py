"""Keeps servers running: restarts a server that died or hangs, on its port, a limited number of times within a window.

A server hangs if its HTTP process is silent (`/health`), or if that one answers and the process that computes does not: the latter
answers `/server_info` between any two of its steps, also while it is paused for new weights, also with a full batch. See README.md.

A restarted server holds the weights of the model folder. It gets no requests before the trainer has published the current ones into it:
gate.py decides that, where requests are sent. A server that has been restarted too often is given up; the others go on.
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
_ASK_ENGINE_EVERY = 5  # probes


class Supervisor:
    """Watches a pool whose servers are ready. Call `check` about once a second from the thread that owns the pool.

    unresponsive_after_s: a server whose /health is silent for so long, while others answer, hangs. progress_timeout_s: the same for its
    computing process, whatever the others do: longer than the longest step of a weight update. max_restarts: of one server within
    window_s seconds; at the next death it is given up. start_timeout_s: a restarted server must be ready by then, or else counts as dead
    again. announce: takes lines for people.
    """

    def __init__(
        self,
        pool: ServerPool,
        *,
        max_restarts: int,
        window_s: float,
        unresponsive_after_s: float,
        progress_timeout_s: float,
        start_timeout_s: float,
        announce: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._most_silent = max(1, round(unresponsive_after_s / _PROBE_TIMEOUT_S))
        self._most_stuck = max(1, round(progress_timeout_s / _PROBE_EVERY_S))
        self._start_timeout_s = start_timeout_s
        self._announce = announce
        num_servers = len(pool.processes)
        self._restarts: list[deque[float]] = [deque() for _ in range(num_servers)]
        self._starting: dict[int, Future[None]] = {}
        self._given_up: set[int] = set()
        # Probes in a row without an answer: of the HTTP process, of the computing one. Counted, not timed: we may have been asleep.
        self._silent = [0] * num_servers
        self._stuck = [0] * num_servers
        self._closed = threading.Event()
        for index in range(num_servers):
            threading.Thread(target=self._probe, args=(index,), name=f"health of server {index}", daemon=True).start()

    def check(self) -> None:
        """Start what is dead or hangs again, in the background.

        Raises ServerDied, with its last log lines, when the last server that was left has been restarted too often.
        """
        for index, server in enumerate(self._pool.processes):
            if index in self._given_up:
                continue
            start = self._starting.get(index)
            if start is not None:
                if not start.done():
                    continue
                del self._starting[index]
                self._silent[index] = self._stuck[index] = 0
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
            elif self._stuck[index] >= self._most_stuck:
                seconds = self._stuck[index] * _PROBE_EVERY_S
                self._restart(index, f"its computing process has answered nothing for {seconds:g} s: {server.describe_end()}")

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
            self._give_up(index, f"after {len(times)} restarts within {self._window_s:g} s: {reason}")
            return
        times.append(now)
        self._announce(f"{_in_short(reason)}; restarting it ({len(times)} of at most {self._max_restarts} times)")
        restart = partial(self._pool.restart, index, start_timeout_s=self._start_timeout_s)
        self._starting[index] = in_background(restart, name=f"restart of server {index}")

    def _give_up(self, index: int, reason: str) -> None:
        self._given_up.add(index)
        num_servers = len(self._pool.processes)
        if len(self._given_up) == num_servers:
            raise ServerDied(reason)
        self._pool.processes[index].terminate(deadline_s=0.0)  # it may still run, and hang
        left = num_servers - len(self._given_up)
        self._announce(f"{_in_short(reason)}; it is given up, {left} of {num_servers} server(s) here are left")

    def _probe(self, index: int) -> None:
        endpoint = self._pool.endpoints[index]
        asked: Future[None] | None = None
        pause = 0  # probes until the computing process is asked again
        while not self._closed.wait(_PROBE_EVERY_S):
            self._probe_http(index, endpoint)
            if asked is not None and not asked.done():  # one question at a time: a process that is stuck would answer them all later
                self._stuck[index] += 1
                continue
            if asked is not None and _is_answer(asked):
                self._stuck[index] = 0
                asked, pause = None, _ASK_ENGINE_EVERY
            pause -= 1
            if pause <= 0:
                asked = in_background(partial(self._ask_engine, endpoint), name=f"progress of server {index}")

    def _probe_http(self, index: int, endpoint: str) -> None:
        try:
            sglang_control.call(endpoint, "/health", key=None, timeout_s=_PROBE_TIMEOUT_S)
        except sglang_control.ServerRefused as refused:
            # An error is an answer: this probe finds out whether the server is stuck.
            self._silent[index] = self._silent[index] + 1 if refused.status is None else 0
        else:
            self._silent[index] = 0

    def _ask_engine(self, endpoint: str) -> None:
        limit_s = self._most_stuck * _PROBE_EVERY_S + 60.0  # the count decides, not this
        sglang_control.check_engine(endpoint, key=self._pool.settings.api_key, timeout_s=limit_s)


def _is_answer(asked: Future[None]) -> bool:
    """Whether something came back. A connection that breaks says nothing: the process has ended, or has just begun."""
    error = asked.exception()
    return error is None or (isinstance(error, sglang_control.ServerRefused) and error.status is not None)


def _in_short(reason: str) -> str:
    return reason.partition("; last lines")[0]
