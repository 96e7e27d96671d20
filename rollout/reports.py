"""How the servers fared in one session, as metrics of a batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_VERSIONS = 4  # of which waits are remembered: more than are ever sampled at once


class ServerClock:
    """When each server of a client had something to do; shared by all sessions."""

    def __init__(self) -> None:
        self._last_answers: dict[str, tuple[int | None, float]] = {}  # by server: policy version and time of its last response
        self._waits: dict[int | None, dict[str, float]] = {}  # by policy version and server: see `waits`

    def called(self, policy_version: int | None, endpoint: str) -> None:
        """A call is made to a server."""
        now = time.monotonic()
        last_version, at = self._last_answers.get(endpoint, (policy_version, now))
        if last_version != policy_version:
            self._waits.setdefault(policy_version, {}).setdefault(endpoint, now - at)
            while len(self._waits) > _VERSIONS:
                del self._waits[next(iter(self._waits))]

    def answered(self, policy_version: int | None, endpoint: str) -> None:
        """A response came, whole."""
        self._last_answers[endpoint] = (policy_version, time.monotonic())

    def waits(self, policy_version: int | None) -> list[float]:
        """For each server: seconds from its last response under other weights to its first request under these."""
        return list(self._waits.get(policy_version, {}).values())


@dataclass(slots=True, kw_only=True)
class SessionReport:
    """What a session notes down while it goes."""

    policy_version: int | None
    clock: ServerClock
    opened_at: float = field(default_factory=time.monotonic)
    first_call_at: float | None = None
    last_response_at: dict[str, float] = field(default_factory=dict)  # by server

    def called(self, endpoint: str) -> None:
        """A call is made to a server."""
        self.clock.called(self.policy_version, endpoint)
        if self.first_call_at is None:
            self.first_call_at = time.monotonic()

    def answered(self, endpoint: str) -> None:
        """A response came, whole."""
        self.clock.answered(self.policy_version, endpoint)
        self.last_response_at[endpoint] = time.monotonic()

    def metrics(self, *, num_retries: int, num_silent: int) -> dict[str, float]:
        """servers/used: that gave at least one response. servers/retries: `num_retries`. servers/silent: `num_silent`.

        time/tail: from the first server's last response to the last response of all. time/queued: from the session's beginning to its
        first request. time/servers_wait: mean over servers of ServerClock.waits, where there are any.
        """
        ends, waits = self.last_response_at.values(), self.clock.waits(self.policy_version)
        return {
            "servers/used": float(len(ends)),
            "servers/retries": float(num_retries),
            "servers/silent": float(num_silent),
            "time/tail": max(ends, default=0.0) - min(ends, default=0.0),
            "time/queued": 0.0 if self.first_call_at is None else self.first_call_at - self.opened_at,
            **({"time/servers_wait": sum(waits) / len(waits)} if waits else {}),
        }
