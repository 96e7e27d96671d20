"""How the servers fared, by policy version: metrics of the batch that was sampled under it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Report:
    """Of the sessions of one policy version since the last report."""

    num_retries: int = 0
    servers_used: set[str] = field(default_factory=set)
    waits: dict[str, float] = field(default_factory=dict)  # by server: seconds without work before the first request
    opened_at: float = 0.0  # the latest session, as the next two fields
    first_call_at: float | None = None
    last_response_at: dict[str, float] = field(default_factory=dict)  # by server


class Reports:
    """Of one client."""

    def __init__(self) -> None:
        self._reports: dict[int | None, _Report] = {}
        self._last_answers: dict[str, tuple[int | None, float]] = {}  # by server: policy version and time of its last response

    def opened(self, policy_version: int | None) -> None:
        """A session begins."""
        report = self._of(policy_version)
        report.opened_at, report.first_call_at = time.monotonic(), None
        report.last_response_at.clear()

    def called(self, policy_version: int | None, endpoint: str) -> None:
        """A call is made to a server."""
        now = time.monotonic()
        report = self._of(policy_version)
        if report.first_call_at is None:
            report.first_call_at = now
        last_version, at = self._last_answers.get(endpoint, (policy_version, now))
        if last_version != policy_version:
            report.waits.setdefault(endpoint, now - at)

    def answered(self, policy_version: int | None, endpoint: str) -> None:
        """A response came, whole."""
        now = time.monotonic()
        report = self._of(policy_version)
        report.servers_used.add(endpoint)
        report.last_response_at[endpoint] = now
        self._last_answers[endpoint] = (policy_version, now)

    def sent_again(self, policy_version: int | None, num_requests: int) -> None:
        """Requests failed and are sent again."""
        self._of(policy_version).num_retries += num_requests

    def take(self, policy_version: int | None) -> dict[str, float]:
        """Metrics of the sessions of one version since its last report.

        servers/used: servers that gave at least one response; servers/retries: requests that were sent again; time/tail: in the last
        session, from the first server's last response to the last response of all; time/queued: from its beginning to its first request;
        time/servers_wait: from a server's last response under other weights to its first request under these, mean over servers.
        """
        report = self._reports.pop(policy_version, _Report())
        ends, waits = report.last_response_at.values(), report.waits.values()
        return {
            "servers/used": float(len(report.servers_used)),
            "servers/retries": float(report.num_retries),
            "time/tail": max(ends, default=0.0) - min(ends, default=0.0),
            **({} if report.first_call_at is None else {"time/queued": report.first_call_at - report.opened_at}),
            **({"time/servers_wait": sum(waits) / len(waits)} if waits else {}),
        }

    def _of(self, policy_version: int | None) -> _Report:
        return self._reports.setdefault(policy_version, _Report())
