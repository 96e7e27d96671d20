"""Rolling publish: each server changes its weights when it has finished its share of a batch, while others still sample.

Every open session names the policy version that it samples under, and counts, for each server, what it still wants of it: conversations
that are at home there, and calls. A server serves one session at a time, the one of the oldest version that wants something of it. The next
session's calls wait. When nothing of the older one is wanted or under way any more, the server is given the next version and calls go on.

All else follows from this rule:
- No response mixes versions: weights change only on a server that nothing is asked of.
- What a dead server was wanted for is wanted of the next one. That one may be at a newer version already; it finishes the calls that it
  has, is given the older version back, and then the newer one again.
- A restarted server is found by the version that it reports, and is given what is wanted of it at once.
- A server is believed to hold only what it was given here: one that outlived an earlier run may report the wanted version too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import httpx

from rollout.background import in_background
from rollout.gate import LOOK_TIMEOUT_S, SILENT_LOOK_TIMEOUT_S, Patience, RolloutFailed, look_at
from rollout.weights.weight_sync import WeightSyncFailed

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5
_MOST_FAILED_GIVES = 3  # in a row; then a server is left out until the next session, because the cause is not temporary

Give = Callable[[str, int], None]  # (endpoint, policy version): puts the weights into the server; raises WeightSyncFailed


@dataclass(slots=True, eq=False)
class _Server:
    """What is known of one server."""

    endpoint: str
    given: str | None = None  # the weight version that it was given last, whole
    holds: str | None = None  # the same, as long as it reports it; None: other weights, or not known which
    usable: bool = False  # it answered when it was last looked at, and no call has failed since
    hangs: bool = False  # when it was last looked at, only its HTTP process answered
    reason: str = "not asked yet"  # why it is not usable
    serves: RollingGate | None = None  # the session that made the latest call
    calls: int = 0  # under way
    switching: bool = False  # it is being given weights
    num_gives: int = 0
    failed_gives: int = 0  # in a row

    def free_for(self, session: RollingGate) -> bool:
        return not self.switching and (self.calls == 0 or self.serves is session)


class RollingServers:
    """The servers of one client, for as long as it lives. Everything here runs in one event loop."""

    def __init__(self, endpoints: Sequence[str], *, give: Give, patience: Patience) -> None:
        """
        Args:
            endpoints: base URLs.
            give: called in a thread, for one server at a time never twice at once.
            patience: of calls while no server can be asked.
        """
        self.servers = tuple(_Server(endpoint) for endpoint in endpoints)
        self.patience = patience
        self.failure: Exception | None = None  # what ends everything: weights that are not kept, or differ from the trainer's
        self._give = give
        self._sessions: list[RollingGate] = []  # open ones, oldest version first
        self._changed = asyncio.Event()
        self._gives: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def session(self, http: httpx.AsyncClient, policy_version: int) -> AsyncIterator[RollingGate]:
        """The gate of a session that samples under `policy_version`."""
        gate = RollingGate(self, http, policy_version=policy_version)
        for server in self.servers:
            server.failed_gives = 0
        self._sessions.append(gate)
        self._sessions.sort(key=lambda session: session.policy_version)  # stable: of one version the first comes first
        watching: asyncio.Task[None] | None = None
        try:
            await gate.look(server.endpoint for server in self.servers)
            watching = asyncio.create_task(gate.watch())
            yield gate
        finally:
            if watching is not None:
                watching.cancel()
            self._sessions.remove(gate)
            self.notify()

    def target(self, turn: int) -> _Server | None:
        """The server whose turn it is, or the next one that is usable."""
        order = (self.servers[(turn + step) % len(self.servers)] for step in range(len(self.servers)))
        return next((server for server in order if server.usable), None)

    def first(self, server: _Server) -> RollingGate | None:
        """The session that `server` serves now or next."""
        return next((session for session in self._sessions if session.wants(server)), None)

    def begin_to_give(self, server: _Server, policy_version: int) -> None:
        """Start to put weights into a server on which nothing is under way."""
        server.switching = True
        server.num_gives += 1
        task = asyncio.create_task(self._finish_giving(server, policy_version))
        self._gives.add(task)  # asyncio itself keeps no reference
        task.add_done_callback(self._gives.discard)

    async def _finish_giving(self, server: _Server, policy_version: int) -> None:
        server.holds = server.given = None
        try:
            work = in_background(partial(self._give, server.endpoint, policy_version), name=f"weights for {server.endpoint}")
            await asyncio.wrap_future(work)
        except WeightSyncFailed as failed:
            log.warning("%s", failed)
            server.failed_gives += 1
            server.usable, server.reason = False, str(failed)
        except Exception as error:  # raised by every call that waits
            self.failure = error
        else:
            server.failed_gives = 0
            server.holds = server.given = str(policy_version)
        finally:
            server.switching = False
            self.notify()

    def notify(self) -> None:
        """Something changed: everybody who waits looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Wait for the next `notify`."""
        await self._changed.wait()


class RollingGate:
    """What one session wants of the servers."""

    def __init__(self, servers: RollingServers, http: httpx.AsyncClient, *, policy_version: int) -> None:
        self.policy_version = policy_version
        self._all = servers
        self._http = http
        self._wanted: Counter[int | None] = Counter()  # number of the server whose turn it is, None: any -> conversations and calls
        self._failure: Exception | None = None

    def expect(self, turn: int | None) -> None:
        """See SessionGate. The server gets no newer weights before `release`; none does while one is not chosen."""
        self._wanted[turn] += 1

    def release(self, turn: int | None) -> None:
        """It asks nothing more."""
        self._wanted[turn] -= 1
        if not self._wanted[turn]:
            del self._wanted[turn]
            self._all.notify()

    def wants(self, server: _Server) -> bool:
        """Whether the session may still ask this server, as things stand."""
        return any(server.usable if turn is None else self._all.target(turn) is server for turn in self._wanted)

    def askable(self) -> list[int]:
        """See SessionGate."""
        return [number for number, server in enumerate(self._all.servers) if server.usable] or list(range(len(self._all.servers)))

    @asynccontextmanager
    async def server(self, turn: int) -> AsyncIterator[str]:
        """The endpoint that one call is made to, while it is made. The call has been expected.

        Raises RolloutFailed when no server can be asked in time, and what `give` raises beside WeightSyncFailed.
        """
        server = await self._enter(turn)
        try:
            yield server.endpoint
        finally:
            server.calls -= 1
            self._all.notify()

    async def _enter(self, turn: int) -> _Server:
        """Wait until the session is served by the server whose turn it is, under its own weights."""
        while True:
            if (failure := self._all.failure or self._failure) is not None:
                raise failure
            server = self._all.target(turn)
            if server is not None and self._all.first(server) is self and server.free_for(self):
                if server.holds == str(self.policy_version):
                    server.serves = self
                    server.calls += 1
                    return server
                if server.calls == 0:
                    self._all.begin_to_give(server, self.policy_version)
            await self._all.change()

    def close(self, endpoint: str) -> None:
        """A call failed: ask nothing of this server until it has been looked at again."""
        for server in self._all.servers:
            if server.endpoint == endpoint:
                server.usable, server.holds, server.reason = False, None, "its last answer was a failure"
        self._all.notify()

    async def look(self, endpoints: Iterable[str]) -> None:
        """Ask servers for their weight version, those excepted that answer calls or are being given weights."""
        wanted = set(endpoints)
        await asyncio.gather(*(self._look(server) for server in self._all.servers if server.endpoint in wanted))

    async def _look(self, server: _Server) -> None:
        if server.switching or (server.usable and server.calls) or server.failed_gives >= _MOST_FAILED_GIVES:
            return
        num_gives = server.num_gives
        timeout_s = LOOK_TIMEOUT_S if server.usable else SILENT_LOOK_TIMEOUT_S  # it is looked at again
        found = await look_at(server.endpoint, self._http, timeout_s=timeout_s)
        version, reason = found.version, found.reason
        if server.num_gives != num_gives:
            return  # the answer is of the time before
        if version is None and server.reason != reason:
            log.warning("%s does not answer (%s): it gets no requests", server.endpoint, reason)
        server.hangs = found.hangs
        # Under the same version an earlier run may have given it others, or a time limit may have left it paused.
        server.holds = version if version == server.given else None
        server.usable, server.reason = version is not None, reason
        self._all.notify()

    def num_silent(self) -> int:
        """See SessionGate."""
        return sum(not server.usable for server in self._all.servers)

    async def watch(self) -> None:
        """Look again at servers that are not usable; give up when none is for too long."""
        silent_since = None
        try:
            while True:
                if any(server.usable or server.switching for server in self._all.servers):
                    silent_since = None
                elif silent_since is None:
                    silent_since = time.monotonic()
                else:
                    limit_s = self._all.patience.limit_s(one_hangs=any(server.hangs for server in self._all.servers))
                    if time.monotonic() - silent_since > limit_s:
                        reasons = "; ".join(f"{server.endpoint}: {server.reason}" for server in self._all.servers)
                        raise RolloutFailed(f"no server answered within {limit_s:g} s: {reasons}")
                await asyncio.sleep(_LOOK_AGAIN_S)
                await self.look([server.endpoint for server in self._all.servers if not server.usable])
        except Exception as error:  # raised by every call that waits
            self._failure = error
            self._all.notify()
