"""The servers of a weight sync, and those among them that take part in one update: all of these are told the same thing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import Any

from rollout.background import in_background
from rollout.sglang import control as sglang_control
from rollout.sglang.control import ServerRefused, control_key
from rollout.weights.checksums import server_checksums
from rollout.weights.time_limits import WeightTimeLimits
from rollout.weights.weight_sync import WeightSyncFailed

log = logging.getLogger(__name__)

_SILENT_LOOK_S = 2.0  # at a server that gave no answer the last time: it may never come back


class ServerSet:
    """All servers, and those among them that take part in the present publish; these are told the same thing at the same time.

    Endpoints that control a server take the admin key (the api key where no admin key is set), those that only tell about it the api key.
    """

    def __init__(self, endpoints: Sequence[str], *, api_key: str | None, admin_key: str | None, limits: WeightTimeLimits) -> None:
        if not endpoints:
            raise ValueError("weight sync: no endpoints, expected at least one")
        self.endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self.members: tuple[str, ...] = ()
        self.api_key = api_key
        self.admin_key = control_key(api_key=api_key, admin_key=admin_key)
        self.limits = limits
        self.num_restarts = 0
        self._expected: dict[str, set[str]] = {}  # what each server reports unless it was restarted; after a failed publish one of several
        self._silent: frozenset[str] = frozenset()  # endpoints that did not answer at the last look
        self._failed: tuple[int, set[str]] = (-1, set())  # a policy version, and the servers on which its publish failed

    def gather(self, policy_version: int) -> bool:
        """Choose the members of a publish. True when they are those of the last one and hold what it gave them.

        Raises WeightSyncFailed when no server answers.
        """
        asked = [in_background(partial(self._look, endpoint), name="weight sync look") for endpoint in self.endpoints]
        wait(asked)
        reasons = {e: call.exception() for e, call in zip(self.endpoints, asked, strict=True) if call.exception() is not None}
        found = {e: call.result() for e, call in zip(self.endpoints, asked, strict=True) if e not in reasons}
        for endpoint, reason in reasons.items():
            if endpoint not in self._silent:
                log.warning("weight version %d, and later ones, are published without %s: %s", policy_version, endpoint, reason)
        self._silent = frozenset(reasons)
        if not found:
            raise WeightSyncFailed(f"policy version {policy_version}: no server answers: {'; '.join(map(str, reasons.values()))}")
        if self._failed[0] != policy_version:
            self._failed = (policy_version, set())
        restarted = {e: version for e, version in found.items() if version not in self._expected.setdefault(e, {version})}
        for endpoint, version in restarted.items():
            log.warning("%s was restarted: it holds weight version %r, not %s", endpoint, version, sorted(self._expected[endpoint]))
            self._expected[endpoint] = {version}
        self.num_restarts += len(restarted)
        before, self.members = self.members, tuple(e for e in found if e not in self._failed[1]) or tuple(found)
        return before == self.members and not restarted and all(len(self._expected[endpoint]) == 1 for endpoint in self.members)

    def may_hold(self, *versions: str) -> None:
        """From now on the members hold what they held or one of these versions."""
        for endpoint in self.members:
            self._expected[endpoint].update(versions)

    def hold(self, version: str) -> None:
        """The members hold this version."""
        self._expected |= {endpoint: {version} for endpoint in self.members}

    def _look(self, endpoint: str) -> str:
        # One that cannot compute would make everybody wait for it in the group.
        limit_s = self.limits.control_s if endpoint not in self._silent else min(_SILENT_LOOK_S, self.limits.control_s)
        sglang_control.check_engine(endpoint, key=self.api_key, timeout_s=limit_s)
        return self._version(endpoint)

    def _version(self, endpoint: str) -> str:
        return sglang_control.weight_version(endpoint, key=self.api_key, timeout_s=self.limits.control_s)

    def begin(self, path: str, bodies: Sequence[dict[str, Any]], *, limit_s: float) -> list[Future[Any]]:
        """Start one call per member, each with its own body."""
        return [
            in_background(
                partial(sglang_control.call, endpoint, path, body, key=self.admin_key, timeout_s=limit_s), name=f"weight sync {path}"
            )
            for endpoint, body in zip(self.members, bodies, strict=True)
        ]

    def tell(self, path: str, body: dict[str, Any], *, limit_s: float | None = None) -> None:
        """The same call to every member; returns when all have answered. Raises ServerRefused as soon as one did not, naming it.

        limit_s: None: that of what moves no weights.
        """
        self.collect(self._begin_one(path, body, limit_s))

    def tell_all(self, path: str, body: dict[str, Any]) -> None:
        """`tell`, but waits for every server's answer before it returns or raises."""
        calls = self._begin_one(path, body, None)
        wait(calls)
        self.refuse_failed(calls)

    def try_to_tell(self, path: str, body: dict[str, Any]) -> None:
        """The same call to every member, whatever they answer, if they do so in time."""
        wait(self._begin_one(path, body, None))

    def _begin_one(self, path: str, body: dict[str, Any], limit_s: float | None) -> list[Future[Any]]:
        return self.begin(path, [body] * len(self.members), limit_s=self.limits.control_s if limit_s is None else limit_s)

    def silent(self, calls: Sequence[Future[Any]]) -> list[str]:
        """The members that have not answered a call of `begin` yet."""
        return [endpoint for endpoint, call in zip(self.members, calls, strict=True) if not call.done()]

    def collect(self, calls: Sequence[Future[Any]]) -> None:
        """Wait for the answers to `begin`; one failure decides, and a server that hangs is not waited for then."""
        wait(calls, return_when=FIRST_EXCEPTION)
        self.refuse_failed(calls)

    def refuse_failed(self, calls: Sequence[Future[Any]]) -> None:
        """Raises ServerRefused when a call to a member has failed by now."""
        failed = {e: call.exception() for e, call in zip(self.members, calls, strict=True) if call.done() and call.exception() is not None}
        if failed:
            self._failed[1].update(failed)
            raise ServerRefused("; ".join(str(error) for error in failed.values()))

    def check_versions(self, expected: int) -> None:
        for endpoint in self.members:
            if (found := self._version(endpoint)) != str(expected):
                raise ServerRefused(f"{endpoint}: reports weight version {found!r} after version {expected} was published")

    def parameter_names(self, *, num_bytes: int) -> set[str]:
        """What the first member says it has. num_bytes: of its weights, all of which it reads."""
        return set(server_checksums(self.members[0], admin_key=self.admin_key, timeout_s=self.limits.moving(num_bytes))[0])
