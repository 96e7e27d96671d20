"""Responses from SGLang servers: token ids in and out, log-probs and policy version on every token, every request accounted for.

How requests travel. A client opens a session for one policy version. Requests with one request_id have one server: dealt in turn, or the
one with the least to do (`assignment`). They are sent there in few batched HTTP calls. A server takes one batched call in as one unit, so
on a CPU its batches, and with them the last bits of its numbers, do not depend on timing. With the fixed deal they do not depend on which
server gets a call either: requests are dealt to all configured servers, dead or alive, and the calls of a dead one are made unchanged to
others.

A request that fails (connection, time limit, server error, abort, weights of another version) is sent again with the same seed, after a
pause and to another server; what it had generated is dropped. A response is counted once, from the one attempt that succeeded.
gate.py decides which servers may be asked; rolling_gate.py does where each server is given its weights when it is free.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx

from rollout.event_loop import BackgroundLoop, Result
from rollout.gate import Gate, Patience, RolloutFailed, SessionGate, WeightsMissing
from rollout.records import NO_SINKS, Generation, GenerationRequest, SamplingParams, Sinks
from rollout.reports import ServerClock, SessionReport
from rollout.rolling_gate import Give, RollingServers
from rollout.session import RETRIED_STATUS, Arrived, Assignment, GenerationSession, OnGeneration, SessionSettings, run_all
from rollout.sglang.control import KEEPALIVE
from rollout.sglang.generate import response_seed

__all__ = [
    "RETRIED_STATUS",
    "GenerationClient",
    "GenerationSession",
    "OnGeneration",
    "RolloutFailed",
    "WeightsMissing",
    "response_seed",
    "run_all",
]


class GenerationClient:
    """Asks a fixed set of servers for responses."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        api_key: str | None = None,
        request_timeout_s: float,
        max_retries: int,
        max_in_flight: int,
        samples_per_call: int | None = None,
        backoff_s: float = 0.5,
        wait_s: float = 300.0,
        hang_s: float = 0.0,
        give: Give | None = None,
        assignment: Assignment = "fixed",
    ) -> None:
        """
        Args:
            endpoints: base URLs.
            api_key: bearer token, or None.
            request_timeout_s: for one HTTP call, which may hold many requests.
            max_retries: further attempts per request.
            max_in_flight: requests under way at once, over all servers.
            samples_per_call: most requests in one HTTP call. None: a server's whole share in one call, and one call at a time; this is
                the fastest way and, on a CPU, the repeatable one. Small calls lose less when a server dies during long responses.
            backoff_s: pause before the first retry; it doubles with each.
            wait_s: how long to wait for a server while none answers.
            hang_s: how much longer where one hangs: until whoever started it has noticed.
            assignment: fixed: requests are dealt to all servers in turn, dead or alive. least_outstanding: a call for which there is a
                place goes to the server with the fewest tokens under way (prompts and longest answers); not with samples_per_call None.
            give: puts the weights of a version into a server. Sessions of several versions may then be open at once, each server is given
                what the oldest one wants of it, and WeightsMissing is never raised. None: the servers get their weights from elsewhere.

        Raises:
            ValueError: no endpoint, or a number out of range.
        """
        if not endpoints:
            raise ValueError("GenerationClient: no endpoints, expected at least one")
        for name, value, least in (
            ("max_retries", max_retries, 0),
            ("max_in_flight", max_in_flight, 1),
            ("samples_per_call", samples_per_call, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"GenerationClient: {name} is {value}, expected at least {least}")
        if assignment == "least_outstanding" and samples_per_call is None:
            raise ValueError("GenerationClient: assignment is 'least_outstanding', expected 'fixed' with samples_per_call None")
        self.endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self._settings = SessionSettings(
            endpoints=self.endpoints,
            max_retries=max_retries,
            max_in_flight=max_in_flight,
            samples_per_call=samples_per_call,
            backoff_s=backoff_s,
            assignment=assignment,
            is_rolling=give is not None,
        )
        self._ssl = httpx.create_ssl_context(trust_env=False)  # reading the certificates takes a while: not in a session's event loop
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._request_timeout_s = request_timeout_s
        self._patience = Patience(wait_s=wait_s, hang_s=hang_s)
        self._silent: dict[str, str] = {}  # endpoint -> why it did not answer when it was last looked at
        self._arrived: dict[tuple[int, SamplingParams], Arrived] = {}  # of sessions that are open or broke off
        self._clock = ServerClock()
        self.last_report: dict[str, float] = {}  # metrics of the session that ended last
        self._tokens_under_way = [0] * len(self.endpoints)
        self._loop = None if give is None else BackgroundLoop(name="sessions")
        self._rolling = None if give is None else RollingServers(self.endpoints, give=give, patience=self._patience)

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine that opens a session, to its end. With `give` several threads may do so at once."""
        return asyncio.run(coroutine) if self._loop is None else self._loop.run(coroutine)

    def close(self) -> None:
        """No session is opened any more."""
        if self._loop is not None:
            self._loop.close()

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        num_samples: int,
        policy_version: int | None = None,
        on_generation: OnGeneration | None = None,
    ) -> list[list[Generation]]:
        """Exactly `num_samples` responses for each request, in the order of `requests` and of the sample index.

        Args:
            requests: one per prompt; their sample index is counted here.
            sampling: how to sample.
            num_samples: responses per prompt.
            policy_version: as in `session`.
            on_generation: called once per response, in order of arrival, in this thread.

        Raises:
            RolloutFailed, WeightsMissing, ValueError: as `GenerationSession.generate`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        wanted = [replace(request, sample_index=index) for request in requests for index in range(num_samples)]

        async def ask() -> list[Generation]:
            async with self.session(sampling, policy_version=policy_version) as session:
                return await session.generate(wanted, on_generation=on_generation)

        generations = self.run(ask())
        return [generations[start : start + num_samples] for start in range(0, len(generations), num_samples)]

    @asynccontextmanager
    async def session(
        self, sampling: SamplingParams, *, policy_version: int | None, sinks: Sinks = NO_SINKS
    ) -> AsyncIterator[GenerationSession]:
        """Connections to the servers for all calls of one batch.

        A session that ends with an exception is not lost: a session opened next with the same arguments gives the responses that had
        arrived at once, and goes on counting the retries of the others.

        Args:
            sampling: how to sample.
            policy_version: every token is sampled under these weights; servers that hold others are not asked. None: any weights.
            sinks: keep what else is asked for, also of a session that is opened again.
        """
        arrived = Arrived(policy_version, sampling)
        if policy_version is not None:
            arrived = self._arrived.setdefault((policy_version, sampling), arrived)
        async with self._connections() as http, self._gate(http, policy_version) as gate:
            session = self._open(http, arrived, gate, one_at_a_time=self._settings.samples_per_call is None, sinks=sinks)
            yield session
        self._arrived.clear()
        self.last_report = session.metrics()

    def stream(self, requests: Iterable[GenerationRequest], sampling: SamplingParams, *, on_generation: OnGeneration) -> None:
        """One response for each request, handed over in order of arrival, in this thread, and then forgotten.

        A request is drawn from `requests` when there is a place for it and sent as one HTTP call. So memory stays bounded by
        max_in_flight however many there are, and no later failure loses what has arrived. Raises what `generate` raises.
        """
        self.run(self._stream(enumerate(requests), sampling, on_generation))

    async def _stream(self, source: Iterator[tuple[int, GenerationRequest]], sampling: SamplingParams, on_generation: OnGeneration) -> None:
        async with self._connections() as http:
            session = self._open(http, Arrived(None, sampling), self._gate_to_all(http, None), one_at_a_time=False)

            async def draw() -> None:
                for index, request in source:  # shared by all: each request goes to one of them
                    await session.fill([request], index % len(self.endpoints), on_generation)

            await run_all([draw() for _ in range(self._settings.max_in_flight)])

    @asynccontextmanager
    async def _gate(self, http: httpx.AsyncClient, policy_version: int | None) -> AsyncIterator[SessionGate]:
        if self._rolling is None or policy_version is None:
            yield self._gate_to_all(http, policy_version)
        else:
            async with self._rolling.session(http, policy_version) as gate:
                yield gate

    def _gate_to_all(self, http: httpx.AsyncClient, policy_version: int | None) -> Gate:
        return Gate(self.endpoints, http, policy_version=policy_version, patience=self._patience, silent=self._silent)

    def _open(
        self, http: httpx.AsyncClient, arrived: Arrived, gate: SessionGate, *, one_at_a_time: bool, sinks: Sinks = NO_SINKS
    ) -> GenerationSession:
        return GenerationSession(
            settings=self._settings,
            report=SessionReport(policy_version=arrived.policy_version, clock=self._clock),
            tokens_under_way=self._tokens_under_way,
            http=http,
            arrived=arrived,
            gate=gate,
            places=asyncio.Semaphore(self._settings.max_in_flight),
            waiting_tokens=[0] * len(self.endpoints),
            turns={endpoint: asyncio.Lock() for endpoint in self.endpoints} if one_at_a_time else {},
            sinks=sinks,
        )

    def _connections(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # It also counts while thousands of connections that open at once wait for each other in this loop.
        timeout = httpx.Timeout(self._request_timeout_s, connect=min(60.0, self._request_timeout_s))
        # trust_env=False: servers are reached directly, whatever http_proxy says.
        transport = httpx.AsyncHTTPTransport(verify=self._ssl, limits=limits, trust_env=False, socket_options=KEEPALIVE)
        return httpx.AsyncClient(headers=self._headers, timeout=timeout, transport=transport, trust_env=False)
