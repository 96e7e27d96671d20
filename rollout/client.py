"""Responses from SGLang servers: token ids in and out, log-probs and policy version on every token, every request accounted for.

How requests travel. The wanted samples are dealt to the servers in turn and sent as few batched HTTP calls: a server takes one batched
call in as one unit, so on a CPU its batches, and with them the last bits of its numbers, do not depend on timing, nor on which server
gets a call: they are dealt to all configured servers, dead or alive, and the calls of a dead one are made, as they are, to others.
A sample that fails (connection, time limit, server error, abort, weights of another version) is sent again, after a pause and to another
server, as a new request with the same seed; what it had generated is dropped. A sample is counted once, from the one attempt that
succeeded. Which servers may be asked is decided in gate.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from rollout.gate import Gate, RolloutFailed, WeightsMissing
from rollout.records import Generation, GenerationRequest, SamplingParams
from rollout.sglang.control import KEEPALIVE
from rollout.sglang.generate import read_generation, request_body, sample_seed

__all__ = ["RETRIED_STATUS", "GenerationClient", "RolloutFailed", "WeightsMissing", "run_all", "sample_seed"]

log = logging.getLogger(__name__)

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Retryable(Exception):
    """One attempt failed in a way that another attempt may not."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """One wanted response: sample `index` of request number `request_index`."""

    request: GenerationRequest
    request_index: int
    index: int
    num_retries: int = 0
    first_sent: float | None = None
    last_failure: str = ""

    @property
    def name(self) -> str:
        return f"{self.request.request_id}#{self.index}"


@dataclass(slots=True)
class _Arrived:
    """What a call of `generate` that had to break off (WeightsMissing) got so far: the same call, made again, asks only for the rest."""

    policy_version: int
    sampling: SamplingParams
    generations: dict[tuple[GenerationRequest, int], Generation] = field(default_factory=dict)  # by request and sample index
    retries: dict[tuple[GenerationRequest, int], int] = field(default_factory=dict)  # of samples that have failed


class GenerationClient:
    """Asks a fixed set of servers for responses.

    endpoints: base URLs. api_key: bearer token or None. request_timeout_s: for one HTTP call (a whole batch of samples).
    max_retries: further attempts per sample. max_in_flight: samples under way at once, over all servers.
    samples_per_call: most samples in one HTTP call; None: a server's whole share in one call, the fastest and, on a CPU, the repeatable
    way (a server then gets one call at a time). Small calls lose less when a server dies in the middle of long responses.
    backoff_s: pause before the first retry; doubles with each. wait_s: how long to wait for a server while none answers.
    """

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
    ) -> None:
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
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._request_timeout_s = request_timeout_s
        self._max_retries = max_retries
        self._max_in_flight = max_in_flight
        self._samples_per_call = samples_per_call
        self._backoff_s = backoff_s
        self._wait_s = wait_s
        self._arrived: _Arrived | None = None
        self._num_retries = 0
        self._servers_used: set[str] = set()

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        num_samples: int,
        policy_version: int | None = None,
        on_generation: Callable[[Generation], None] | None = None,
    ) -> list[list[Generation]]:
        """Exactly `num_samples` responses for each request, in the order of `requests` and of the sample index.

        policy_version: every token is sampled under these weights; servers that hold others are not asked. None: whatever they hold.
        on_generation: called once per response, in order of arrival, in this thread.
        Raises RolloutFailed when one cannot be had, ValueError for requests with equal ids, WeightsMissing when servers answer and none
        holds the weights: publish them and make the same call again. What had arrived by then is kept for that call.
        """
        return asyncio.run(
            self.generate_async(requests, sampling, num_samples=num_samples, policy_version=policy_version, on_generation=on_generation)
        )

    async def generate_async(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        num_samples: int,
        policy_version: int | None = None,
        on_generation: Callable[[Generation], None] | None = None,
    ) -> list[list[Generation]]:
        """`generate` for callers with an event loop of their own."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        if len({request.request_id for request in requests}) != len(requests):
            raise ValueError("generate: two requests have the same request_id")
        results: list[list[Generation | None]] = [[None] * num_samples for _ in requests]
        arrived = self._arrived
        if policy_version is None or arrived is None or (arrived.policy_version, arrived.sampling) != (policy_version, sampling):
            arrived = None if policy_version is None else _Arrived(policy_version, sampling)
        self._arrived = arrived

        def accept(sample: _Sample, generation: Generation) -> None:
            row = results[sample.request_index]
            assert row[sample.index] is None, f"{sample.name} was answered twice"
            row[sample.index] = generation
            if arrived is not None:
                arrived.generations[sample.request, sample.index] = generation
            if on_generation is not None:
                on_generation(generation)

        def failed(sample: _Sample) -> None:
            if arrived is not None:
                arrived.retries[sample.request, sample.index] = sample.num_retries

        samples = []
        for number, request in enumerate(requests):
            for index in range(num_samples):
                if arrived is not None and (request, index) in arrived.generations:
                    results[number][index] = arrived.generations[request, index]
                else:
                    retries = 0 if arrived is None else arrived.retries.get((request, index), 0)
                    samples.append(_Sample(request, number, index, num_retries=retries))
        async with self._connections() as http:
            call = self._call(http, sampling, accept, failed, policy_version=policy_version, one_at_a_time=self._samples_per_call is None)
            await run_all([call.run(share, turn) for turn, share in self._deal(samples)])
        self._arrived = None
        missing = [f"{request.request_id}" for request, row in zip(requests, results, strict=True) if any(g is None for g in row)]
        if missing:  # cannot happen: each task either fills its samples or raises
            raise RolloutFailed(f"no response for {len(missing)} requests, the first being {missing[0]}")
        return [[generation for generation in row if generation is not None] for row in results]

    def take_report(self) -> dict[str, float]:
        """Since the last report: servers/used (that gave at least one response) and servers/retries (samples that were sent again)."""
        report = {"servers/used": float(len(self._servers_used)), "servers/retries": float(self._num_retries)}
        self._servers_used.clear()
        self._num_retries = 0
        return report

    def stream(
        self, requests: Iterable[GenerationRequest], sampling: SamplingParams, *, on_generation: Callable[[Generation], None]
    ) -> None:
        """One response for each request, handed over in order of arrival, in this thread, and then forgotten.

        A request is drawn from `requests` when there is room for it and sent as one HTTP call, so memory stays bounded by max_in_flight
        however many there are, and what has arrived is lost by no later failure. Raises what `generate` raises.
        """
        asyncio.run(self._stream(enumerate(requests), sampling, on_generation))

    async def _stream(
        self, source: Iterator[tuple[int, GenerationRequest]], sampling: SamplingParams, on_generation: Callable[[Generation], None]
    ) -> None:
        async with self._connections() as http:
            call = self._call(
                http,
                sampling,
                lambda sample, generation: on_generation(generation),
                lambda sample: None,
                policy_version=None,
                one_at_a_time=False,
            )

            async def draw() -> None:
                for index, request in source:  # shared by all: each request goes to one of them
                    await call.run([_Sample(request, index, 0)], index % len(self.endpoints))

            await run_all([draw() for _ in range(self._max_in_flight)])

    def _call(
        self,
        http: httpx.AsyncClient,
        sampling: SamplingParams,
        accept: Callable[[_Sample, Generation], None],
        failed: Callable[[_Sample], None],
        *,
        policy_version: int | None,
        one_at_a_time: bool,
    ) -> _Call:
        return _Call(
            http=http,
            sampling=sampling,
            accept=accept,
            failed=failed,
            room=_Room(self._max_in_flight),
            gate=Gate(self.endpoints, http, policy_version=policy_version, wait_s=self._wait_s),
            turns={endpoint: asyncio.Lock() for endpoint in self.endpoints} if one_at_a_time else {},
            client=self,
        )

    def _connections(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(self._request_timeout_s, connect=min(10.0, self._request_timeout_s))
        # trust_env=False: servers are reached directly, whatever http_proxy says.
        transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=KEEPALIVE)
        return httpx.AsyncClient(headers=self._headers, timeout=timeout, transport=transport, trust_env=False)

    def _deal(self, samples: Sequence[_Sample]) -> list[tuple[int, list[_Sample]]]:
        """Samples of one request stay together (they share the prompt's cache); requests go to the servers in turn.

        (whose turn it is, samples of one call). The deal knows nothing of dead servers: it is the same whatever happens to them.
        """
        shares: list[list[_Sample]] = [[] for _ in self.endpoints]
        for sample in samples:
            shares[sample.request_index % len(shares)].append(sample)
        most = min(self._max_in_flight, self._samples_per_call if self._samples_per_call is not None else len(samples) or 1)
        return [(index, share[at : at + most]) for index, share in enumerate(shares) for at in range(0, len(share), most)]


class _Room:
    """At most `size` samples at once. Callers take as many places as they have samples, in order of arrival."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = asyncio.Condition()

    async def take(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= count)
            self._free -= count

    async def give(self, count: int) -> None:
        async with self._changed:
            self._free += count
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Call:
    """What every attempt of one `generate` shares."""

    http: httpx.AsyncClient
    sampling: SamplingParams
    accept: Callable[[_Sample, Generation], None]
    failed: Callable[[_Sample], None]
    room: _Room
    gate: Gate
    turns: Mapping[str, asyncio.Lock]  # of servers that get one call at a time; empty: they get as many as there is room for
    client: GenerationClient

    async def run(self, samples: Sequence[_Sample], turn: int) -> None:
        """Fill all of `samples`; whatever fails in an attempt goes into the next one, elsewhere."""
        attempt = 0
        while samples:
            await self.room.take(len(samples))
            try:
                endpoint = await self.gate.pick(turn + attempt)
                async with self.turns.get(endpoint, nullcontext()):
                    again = await self._attempt(samples, endpoint)
            finally:
                await self.room.give(len(samples))
            attempt += 1
            samples = again
            if samples:
                await self._prepare_retry(samples, endpoint, attempt)

    async def _prepare_retry(self, samples: Sequence[_Sample], endpoint: str, attempt: int) -> None:
        """Count, give up or pause, and look whether the server that failed may be asked again."""
        self.client._num_retries += len(samples)
        for sample in samples:
            self.failed(sample)
            if sample.num_retries > self.client._max_retries:
                raise RolloutFailed(
                    f"{endpoint}: request {sample.name}: {sample.last_failure} (gave up after {sample.num_retries} attempts)"
                )
        log.warning("%s: %s: %d sample(s) are sent again", endpoint, samples[0].last_failure, len(samples))
        self.gate.close(endpoint)
        await asyncio.sleep(min(30.0, self.client._backoff_s * 2 ** (attempt - 1)))
        await self.gate.look([endpoint])

    async def _attempt(self, samples: Sequence[_Sample], endpoint: str) -> list[_Sample]:
        """One HTTP call. Accepts what came back whole; returns the samples to send again."""
        sent = time.monotonic()
        samples = [replace(sample, first_sent=sent) if sample.first_sent is None else sample for sample in samples]
        try:
            answers = await self._post(samples, endpoint)
        except _Retryable as failure:
            return [_failed(sample, str(failure)) for sample in samples]
        again = []
        for sample, answer in zip(samples, answers, strict=True):
            try:
                generation = read_generation(
                    answer, sample.request, num_retries=sample.num_retries, latency_s=time.monotonic() - _sent(sample)
                )
            except ValueError as error:
                raise RolloutFailed(f"{endpoint}: request {sample.name}: {error}") from error
            if generation.finish_reason == "abort":
                again.append(_failed(sample, f"aborted by the server: {answer['meta_info']['finish_reason'].get('message')}"))
            elif self.gate.policy_version is not None and generation.policy_versions != (self.gate.policy_version,) * 2:
                reason = "sampled under policy versions {} to {}".format(*generation.policy_versions)
                again.append(_failed(sample, f"{reason}, wanted is {self.gate.policy_version}"))
            else:
                self.client._servers_used.add(endpoint)
                self.accept(sample, generation)
        return again

    async def _post(self, samples: Sequence[_Sample], endpoint: str) -> list[dict[str, Any]]:
        body = request_body([(sample.request, sample.index) for sample in samples], self.sampling)
        try:
            response = await self.http.post(f"{endpoint}/generate", json=body)
        except httpx.HTTPError as error:
            raise _Retryable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        name = samples[0].name if len(samples) == 1 else f"{samples[0].name} and {len(samples) - 1} more"
        if response.status_code in RETRIED_STATUS:
            raise _Retryable(f"HTTP {response.status_code}: {response.text[:300]}")
        if response.status_code != 200:
            raise RolloutFailed(f"{endpoint}: request {name}: HTTP {response.status_code}: {response.text[:300]}")
        try:
            answers = response.json()
        except ValueError as error:
            raise _Retryable(f"the answer is not JSON: {response.text[:100]!r}") from error
        if not isinstance(answers, list) or len(answers) != len(samples):
            got = len(answers) if isinstance(answers, list) else type(answers).__name__
            raise RolloutFailed(f"{endpoint}: request {name}: {got} answers for {len(samples)} prompts")
        return answers


async def run_all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__


def _failed(sample: _Sample, reason: str) -> _Sample:
    return replace(sample, num_retries=sample.num_retries + 1, last_failure=reason)


def _sent(sample: _Sample) -> float:
    assert sample.first_sent is not None
    return sample.first_sent
