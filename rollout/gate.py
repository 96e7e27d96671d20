"""Which servers may be asked for a response: those that answer and hold the wanted weights.

Two gates: `Gate` here, for servers that change their weights together, and rolling_gate.py, for servers that do so one by one.

There is no router between client and servers. A router hides which server answers, and so which weights; it would send requests to a
server that has just been restarted with the base model's weights. Here every server is asked for its weight version before it gets a
sample, and again after every failure, and a server with another version is passed over until the next publish.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import httpx

log = logging.getLogger(__name__)

LOOK_TIMEOUT_S = 10.0
SILENT_LOOK_TIMEOUT_S = 2.0  # for a server that gave no answer the last time: it may never come back
_LOOK_AGAIN_S = 0.5


class RolloutFailed(RuntimeError):
    """A response could not be had. Names the endpoint, the request and the reason."""


class WeightsMissing(RuntimeError):
    """Servers answer, but none holds the wanted weights: publish them, then ask again."""


class SessionGate(Protocol):
    """What a session asks before each call."""

    @property
    def policy_version(self) -> int | None:
        """Every token is sampled under these weights; None: under any."""

    def expect(self, turn: int | None) -> None:
        """A conversation, or a call, begins whose turn it is on the server with this number; None: on a server that is not chosen yet."""

    def release(self, turn: int | None) -> None:
        """It asks nothing more."""

    def server(self, turn: int) -> AbstractAsyncContextManager[str]:
        """The endpoint that one call is made to, while it is made: the server whose turn it is, or another one."""

    def askable(self) -> list[int]:
        """Numbers of the servers that may be asked; all where none may."""

    def close(self, endpoint: str) -> None:
        """A call failed: ask nothing of this server until it has been looked at again."""

    async def look(self, endpoints: Iterable[str]) -> None:
        """Ask servers for their weight version."""

    def num_silent(self) -> int:
        """Servers that did not answer when they were last looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a look at a server found. version: the weight version that it reports; None: it cannot be asked, for this reason.

    hangs: its HTTP process answers and the one that computes does not.
    """

    version: str | None
    reason: str
    hangs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long calls wait while no server can be asked.

    wait_s: while none answers at all: a dead one may be started again meanwhile. hang_s: longer where one hangs: this has to be noticed
    first.
    """

    wait_s: float
    hang_s: float

    def limit_s(self, *, one_hangs: bool) -> float:
        return self.wait_s + (self.hang_s if one_hangs else 0.0)


class Gate:
    """Lets requests through to servers that hold the weights of `policy_version`; None: to all of them, unasked.

    patience: of `pick`. silent: endpoint -> why it did not answer; shared by all gates of a client, one after the other.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        http: httpx.AsyncClient,
        *,
        policy_version: int | None,
        patience: Patience,
        silent: dict[str, str],
    ) -> None:
        self.policy_version = policy_version
        self._endpoints = tuple(endpoints)
        self._http = http
        self._patience = patience
        self._open = set(endpoints) if policy_version is None else set[str]()
        self._found: dict[str, str] = {}  # endpoint -> the weight version it reported, if it answered the last time it was looked at
        self._silent = silent
        self._hanging: set[str] = set()
        self._looking = asyncio.Lock()

    def expect(self, turn: int | None) -> None:
        """Nothing changes before the whole session has ended."""

    def release(self, turn: int | None) -> None:
        """See `expect`."""

    @asynccontextmanager
    async def server(self, turn: int) -> AsyncIterator[str]:
        """See SessionGate. Raises what `pick` raises."""
        yield await self.pick(turn)

    async def pick(self, turn: int) -> str:
        """The server whose turn it is, or another one where that one may not be asked.

        Raises WeightsMissing when servers answer but none holds the weights, RolloutFailed when none answers in time.
        """
        began = time.monotonic()
        while True:
            preferred = self._endpoints[turn % len(self._endpoints)]
            if preferred in self._open:
                return preferred
            if self._open:
                others = [endpoint for endpoint in self._endpoints if endpoint in self._open]
                return others[turn % len(others)]
            async with self._looking:
                if not self._open:
                    await self.look(self._endpoints)
            if self._open:
                continue
            if self._found:
                held = ", ".join(f"{endpoint} has {version!r}" for endpoint, version in self._found.items())
                raise WeightsMissing(f"no server holds policy version {self.policy_version}: {held}")
            limit_s = self._patience.limit_s(one_hangs=bool(self._hanging))
            if time.monotonic() - began > limit_s:
                reasons = "; ".join(f"{endpoint}: {reason}" for endpoint, reason in self._silent.items())
                raise RolloutFailed(f"no server answered within {limit_s:g} s: {reasons}")
            await asyncio.sleep(_LOOK_AGAIN_S)

    def askable(self) -> list[int]:
        """See SessionGate."""
        numbers = range(len(self._endpoints))
        return [number for number in numbers if self._endpoints[number] in self._open] or list(numbers)

    def close(self, endpoint: str) -> None:
        """Ask nothing of this server until it has been looked at again."""
        if self.policy_version is not None:
            self._open.discard(endpoint)

    async def look(self, endpoints: Iterable[str]) -> None:
        """Ask servers for their weight version; those that hold the wanted one may be asked for responses from now on."""
        if self.policy_version is None:
            return
        await asyncio.gather(*(self._look(endpoint) for endpoint in endpoints))

    def num_silent(self) -> int:
        """See SessionGate."""
        return len(self._silent)

    async def _look(self, endpoint: str) -> None:
        found = await look_at(endpoint, self._http, timeout_s=SILENT_LOOK_TIMEOUT_S if endpoint in self._silent else LOOK_TIMEOUT_S)
        version = found.version
        (self._hanging.add if found.hangs else self._hanging.discard)(endpoint)
        if version is None:
            if self._silent.get(endpoint) != found.reason:
                log.warning("%s does not answer (%s): it gets no requests", endpoint, found.reason)
            self._found.pop(endpoint, None)
            self._silent[endpoint] = found.reason
        else:
            if version != str(self.policy_version) and self._found.get(endpoint) != version:
                log.warning("%s holds weight version %r, wanted is %s: it gets no requests", endpoint, version, self.policy_version)
            self._found[endpoint] = version
            if self._silent.pop(endpoint, None) is not None:
                log.warning("%s answers again", endpoint)
        (self._open.add if version == str(self.policy_version) else self._open.discard)(endpoint)


async def look_at(endpoint: str, http: httpx.AsyncClient, *, timeout_s: float) -> Look:
    """Ask a server for its weight version, and whether the process that computes answers. Raises RolloutFailed where a key is wrong."""
    try:
        answer = await http.get(f"{endpoint}/model_info", timeout=timeout_s)
        if answer.status_code in (401, 403):
            raise RolloutFailed(f"{endpoint}/model_info: HTTP {answer.status_code}: {answer.text[:300]}")
        version: str | None = answer.json()["weight_version"]
        if version is None:
            return Look(version=None, reason=f"HTTP {answer.status_code}")
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return Look(version=None, reason=f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    try:
        await http.get(f"{endpoint}/server_info", timeout=timeout_s)
    except httpx.TimeoutException:
        return Look(version=None, reason=f"its computing process gave no answer within {timeout_s:g} s", hangs=True)
    except httpx.HTTPError as error:
        return Look(version=None, reason=f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    return Look(version=version, reason="")
