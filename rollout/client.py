"""Responses from SGLang servers: token ids in and out, log-probs and policy version on every token, every request accounted for.

How requests travel. A client opens a session for one policy version. Requests with one request_id have one server, dealt in turn, and
are sent there in few batched HTTP calls. A server takes one batched call in as one unit, so on a CPU its batches, and with them the last
bits of its numbers, do not depend on timing. They do not depend on which server gets a call either: requests are dealt to all configured
servers, dead or alive, and the calls of a dead one are made unchanged to others.

A request that fails (connection, time limit, server error, abort, weights of another version) is sent again with the same seed, after a
pause and to another server; what it had generated is dropped. A response is counted once, from the one attempt that succeeded.
gate.py decides which servers may be asked; rolling_gate.py does where each server is given its weights when it is free.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from rollout.event_loop import BackgroundLoop, Result
from rollout.gate import Gate, RolloutFailed, SessionGate, WeightsMissing
from rollout.records import Generation, GenerationRequest, SamplingParams
from rollout.refusals import refusal
from rollout.rolling_gate import Give, RollingServers
from rollout.sglang.control import KEEPALIVE
from rollout.sglang.generate import read_generation, request_body, response_seed

__all__ = ["RETRIED_STATUS", "GenerationClient", "GenerationSession", "RolloutFailed", "WeightsMissing", "response_seed", "run_all"]

log = logging.getLogger(__name__)

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

OnGeneration = Callable[[GenerationRequest, Generation], None]


class _Retryable(Exception):
    """One attempt failed in a way that another attempt may not."""


@dataclass(slots=True)
class _Arrived:
    """What a session got before it broke off. The same session, opened again, asks only for the rest."""

    policy_version: int | None
    sampling: SamplingParams
    generations: dict[GenerationRequest, Generation] = field(default_factory=dict)
    retries: Counter[GenerationRequest] = field(default_factory=Counter)


@dataclass(slots=True)
class _Report:
    """What `take_report` tells of the sessions of one policy version."""

    num_retries: int = 0
    servers_used: set[str] = field(default_factory=set)
    last_response_at: dict[str, float] = field(default_factory=dict)  # by server, in the latest session
    waits: dict[str, float] = field(default_factory=dict)  # by server: seconds without work before the first request


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
        give: Give | None = None,
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
        self.endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self.samples_per_call = samples_per_call
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._request_timeout_s = request_timeout_s
        self._max_retries = max_retries
        self._max_in_flight = max_in_flight
        self._backoff_s = backoff_s
        self._wait_s = wait_s
        self._arrived: dict[tuple[int, SamplingParams], _Arrived] = {}  # of sessions that are open or broke off
        self._reports: dict[int | None, _Report] = {}  # by policy version
        self._last_answers: dict[str, tuple[int | None, float]] = {}  # by server: policy version and time of its last response
        self._loop = None if give is None else BackgroundLoop(name="sessions")
        self._rolling = None if give is None else RollingServers(self.endpoints, give=give, wait_s=wait_s)

    @property
    def is_rolling(self) -> bool:
        """Whether sessions of several versions may be open at once."""
        return self._rolling is not None

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
    async def session(self, sampling: SamplingParams, *, policy_version: int | None) -> AsyncIterator[GenerationSession]:
        """Connections to the servers for all calls of one batch.

        A session that ends with an exception is not lost: a session opened next with the same arguments gives the responses that had
        arrived at once, and goes on counting the retries of the others.

        Args:
            sampling: how to sample.
            policy_version: every token is sampled under these weights; servers that hold others are not asked. None: any weights.
        """
        arrived = _Arrived(policy_version, sampling)
        if policy_version is not None:
            arrived = self._arrived.setdefault((policy_version, sampling), arrived)
        self._report(policy_version).last_response_at.clear()
        async with self._connections() as http, self._gate(http, policy_version) as gate:
            yield self._open(http, arrived, gate, one_at_a_time=self.samples_per_call is None)
        self._arrived.clear()

    def take_report(self, policy_version: int | None = None) -> dict[str, float]:
        """Metrics of the sessions of one version since the last report of it.

        servers/used: servers that gave at least one response; servers/retries: requests that were sent again; time/tail: in the last
        session, from the first server's last response to the last response of all; time/servers_wait: from a server's last response under
        other weights to its first request under these, mean over servers, where there was one.
        """
        report = self._reports.pop(policy_version, _Report())
        ends, waits = report.last_response_at.values(), report.waits.values()
        return {
            "servers/used": float(len(report.servers_used)),
            "servers/retries": float(report.num_retries),
            "time/tail": max(ends, default=0.0) - min(ends, default=0.0),
            **({"time/servers_wait": sum(waits) / len(waits)} if waits else {}),
        }

    def _report(self, policy_version: int | None) -> _Report:
        return self._reports.setdefault(policy_version, _Report())

    def stream(self, requests: Iterable[GenerationRequest], sampling: SamplingParams, *, on_generation: OnGeneration) -> None:
        """One response for each request, handed over in order of arrival, in this thread, and then forgotten.

        A request is drawn from `requests` when there is a place for it and sent as one HTTP call. So memory stays bounded by
        max_in_flight however many there are, and no later failure loses what has arrived. Raises what `generate` raises.
        """
        self.run(self._stream(enumerate(requests), sampling, on_generation))

    async def _stream(self, source: Iterator[tuple[int, GenerationRequest]], sampling: SamplingParams, on_generation: OnGeneration) -> None:
        async with self._connections() as http:
            session = self._open(http, _Arrived(None, sampling), self._gate_to_all(http, None), one_at_a_time=False)

            async def draw() -> None:
                for index, request in source:  # shared by all: each request goes to one of them
                    await session.fill([request], index % len(self.endpoints), on_generation)

            await run_all([draw() for _ in range(self._max_in_flight)])

    @asynccontextmanager
    async def _gate(self, http: httpx.AsyncClient, policy_version: int | None) -> AsyncIterator[SessionGate]:
        if self._rolling is None or policy_version is None:
            yield self._gate_to_all(http, policy_version)
        else:
            async with self._rolling.session(http, policy_version) as gate:
                yield gate

    def _gate_to_all(self, http: httpx.AsyncClient, policy_version: int | None) -> Gate:
        return Gate(self.endpoints, http, policy_version=policy_version, wait_s=self._wait_s)

    def _open(self, http: httpx.AsyncClient, arrived: _Arrived, gate: SessionGate, *, one_at_a_time: bool) -> GenerationSession:
        return GenerationSession(
            client=self,
            http=http,
            arrived=arrived,
            gate=gate,
            places=asyncio.Semaphore(self._max_in_flight),
            turns={endpoint: asyncio.Lock() for endpoint in self.endpoints} if one_at_a_time else {},
        )

    def _connections(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(self._request_timeout_s, connect=min(10.0, self._request_timeout_s))
        # trust_env=False: servers are reached directly, whatever http_proxy says.
        transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=KEEPALIVE)
        return httpx.AsyncClient(headers=self._headers, timeout=timeout, transport=transport, trust_env=False)


@dataclass(slots=True, kw_only=True)
class GenerationSession:
    """An open `GenerationClient.session`. Several `generate` calls may run at once."""

    client: GenerationClient
    http: httpx.AsyncClient
    arrived: _Arrived
    gate: SessionGate
    places: asyncio.Semaphore  # one per request under way
    turns: Mapping[str, asyncio.Lock]  # of servers that get one call at a time; empty: they get as many as there are places for
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)  # one call takes its places before the next one begins to
    homes: dict[str, int] = field(default_factory=dict)  # request_id -> the number of its server
    first_sent: dict[GenerationRequest, float] = field(default_factory=dict)
    failures: dict[GenerationRequest, str] = field(default_factory=dict)  # why the last attempt failed

    async def generate(self, requests: Sequence[GenerationRequest], *, on_generation: OnGeneration | None = None) -> list[Generation]:
        """One response for each request, in their order.

        Args:
            requests: all different.
            on_generation: called once per new response, in order of arrival, in this thread.

        Raises:
            RolloutFailed: a response cannot be had.
            WeightsMissing: servers answer and none holds the weights. Publish them, open the session again and make the same calls.
            ValueError: two requests are the same.
        """
        names = Counter(request.name for request in requests)
        if len(names) != len(requests):
            raise ValueError(f"generate: two requests have the name {names.most_common(1)[0][0]}")
        for request in requests:  # also of what has arrived already: the deal stays the same
            self._home(request.request_id)
        waiting = [request for request in requests if request not in self.arrived.generations]

        def keep(request: GenerationRequest, generation: Generation) -> None:
            assert request not in self.arrived.generations, f"{request.name} was answered twice"
            self.arrived.generations[request] = generation
            if on_generation is not None:
                on_generation(request, generation)

        await run_all([self.fill(share, turn, keep) for turn, share in self._deal(waiting)])
        return [self.arrived.generations[request] for request in requests]

    def begin(self, request_ids: Iterable[str]) -> None:
        """Conversations begin, each named by the request_id of its requests. Until its `end` its server gets no newer weights."""
        for request_id in request_ids:
            self.gate.expect(self._home(request_id))

    def end(self, request_id: str) -> None:
        """One conversation asks nothing more."""
        self.gate.release(self.homes[request_id])

    def _home(self, request_id: str) -> int:
        return self.homes.setdefault(request_id, len(self.homes) % len(self.client.endpoints))

    async def fill(self, requests: Sequence[GenerationRequest], turn: int, keep: OnGeneration) -> None:
        """Get all of `requests`, first from the server whose number is `turn`. Whatever fails in an attempt goes into the next one."""
        attempt = 0
        self.gate.expect(turn)
        try:
            while requests:
                async with self.taking:  # two calls that each hold some of their places would wait for each other
                    for _ in requests:
                        await self.places.acquire()
                try:
                    async with self.gate.server(turn + attempt) as endpoint, self.turns.get(endpoint, nullcontext()):
                        again = await self._attempt(requests, endpoint, keep)
                        if again:
                            self.gate.close(endpoint)
                finally:
                    for _ in requests:
                        self.places.release()
                requests = again
                if requests:
                    self.gate.expect(turn + attempt + 1)  # before the release: nobody else gets in between
                    self.gate.release(turn + attempt)
                    attempt += 1
                    await self._prepare_retry(requests, endpoint, attempt)
        finally:
            self.gate.release(turn + attempt)

    def _deal(self, requests: Sequence[GenerationRequest]) -> list[tuple[int, list[GenerationRequest]]]:
        """(number of the server, requests of one call). The deal ignores which servers are alive: it is the same whatever happens."""
        client = self.client
        shares: list[list[GenerationRequest]] = [[] for _ in client.endpoints]
        for request in requests:
            shares[self.homes[request.request_id]].append(request)
        most = min(client._max_in_flight, client.samples_per_call if client.samples_per_call is not None else len(requests) or 1)
        return [(number, share[at : at + most]) for number, share in enumerate(shares) for at in range(0, len(share), most)]

    async def _prepare_retry(self, requests: Sequence[GenerationRequest], endpoint: str, attempt: int) -> None:
        """Give up or pause, and look whether the server that failed may be asked again."""
        client, retries = self.client, self.arrived.retries
        client._report(self.gate.policy_version).num_retries += len(requests)
        for request in requests:
            if retries[request] > client._max_retries:
                raise RolloutFailed(
                    f"{endpoint}: request {request.name}: {self.failures[request]} (gave up after {retries[request]} attempts)"
                )
        log.warning("%s: %s: %d request(s) are sent again", endpoint, self.failures[requests[0]], len(requests))
        await asyncio.sleep(min(30.0, client._backoff_s * 2 ** (attempt - 1)))
        await self.gate.look([endpoint])

    async def _attempt(self, requests: Sequence[GenerationRequest], endpoint: str, keep: OnGeneration) -> list[GenerationRequest]:
        """One HTTP call. Keeps what came back whole; returns the requests to send again."""
        self._note_call(endpoint)
        for request in requests:
            self.first_sent.setdefault(request, time.monotonic())
        try:
            answers = await self._post(requests, endpoint)
        except _Retryable as failure:
            for request in requests:
                self._note_failure(request, str(failure))
            return list(requests)
        again = []
        for request, answer in zip(requests, answers, strict=True):
            try:
                generation = read_generation(
                    answer,
                    request,
                    num_retries=self.arrived.retries[request],
                    latency_s=time.monotonic() - self.first_sent[request],
                )
            except ValueError as error:
                raise RolloutFailed(f"{endpoint}: request {request.name}: {error}") from error
            if generation.finish_reason == "abort":
                self._note_failure(request, f"aborted by the server: {answer['meta_info']['finish_reason'].get('message')}")
                again.append(request)
            elif self.gate.policy_version is not None and generation.policy_versions != (self.gate.policy_version,) * 2:
                reason = "sampled under policy versions {} to {}".format(*generation.policy_versions)
                self._note_failure(request, f"{reason}, wanted is {self.gate.policy_version}")
                again.append(request)
            else:
                self._note_response(endpoint)
                del self.first_sent[request]
                self.failures.pop(request, None)
                keep(request, generation)
        return again

    def _note_call(self, endpoint: str) -> None:
        version = self.gate.policy_version
        last_version, at = self.client._last_answers.get(endpoint, (version, 0.0))
        if last_version != version:
            self.client._report(version).waits.setdefault(endpoint, time.monotonic() - at)

    def _note_response(self, endpoint: str) -> None:
        version, now = self.gate.policy_version, time.monotonic()
        report = self.client._report(version)
        report.servers_used.add(endpoint)
        report.last_response_at[endpoint] = now
        self.client._last_answers[endpoint] = (version, now)

    def _note_failure(self, request: GenerationRequest, reason: str) -> None:
        self.arrived.retries[request] += 1
        self.failures[request] = reason

    async def _post(self, requests: Sequence[GenerationRequest], endpoint: str) -> list[dict[str, Any]]:
        body = request_body(requests, self.arrived.sampling)
        try:
            response = await self.http.post(f"{endpoint}/generate", json=body)
        except httpx.HTTPError as error:
            raise _Retryable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        name = requests[0].name if len(requests) == 1 else f"{requests[0].name} and {len(requests) - 1} more"
        if response.status_code in RETRIED_STATUS:
            raise _Retryable(refusal(response.status_code, response.text))
        if response.status_code != 200:
            raise RolloutFailed(f"{endpoint}: request {name}: {refusal(response.status_code, response.text)}")
        try:
            answers = response.json()
        except ValueError as error:
            raise _Retryable(f"the answer is not JSON: {response.text[:100]!r}") from error
        if not isinstance(answers, list) or len(answers) != len(requests):
            got = len(answers) if isinstance(answers, list) else type(answers).__name__
            raise RolloutFailed(f"{endpoint}: request {name}: {got} answers for {len(requests)} prompts")
        return answers


async def run_all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
