"""Responses from SGLang servers: token ids in and out, log-probs and policy version on every token, every request accounted for.

How requests travel. The wanted samples are dealt to the servers in turn and sent as few batched HTTP calls: a server takes one batched
call in as one unit, so on a CPU its batches, and with them the last bits of its numbers, do not depend on timing.
A sample that fails (connection, time limit, server error, abort) is sent again, after a pause and to another server, as a new request;
what it had generated is dropped. A sample is counted once, from the one attempt that succeeded.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from rollout.records import Generation, GenerationRequest, SamplingParams, VersionSpan

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class RolloutFailed(RuntimeError):
    """A response could not be had. Names the endpoint, the request and the reason."""


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


class GenerationClient:
    """Asks a fixed set of servers for responses.

    endpoints: base URLs. api_key: bearer token or None. request_timeout_s: for one HTTP call (a whole batch of samples).
    max_retries: further attempts per sample. max_in_flight: samples under way at once, over all servers.
    samples_per_call: most samples in one HTTP call; None: a server's whole share in one call, the fastest and, on a CPU, the repeatable
    way. Small calls lose less when a server dies in the middle of long responses.
    backoff_s: pause before the first retry; doubles with each.
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

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        num_samples: int,
        on_generation: Callable[[Generation], None] | None = None,
    ) -> list[list[Generation]]:
        """Exactly `num_samples` responses for each request, in the order of `requests` and of the sample index.

        on_generation: called once per response, in order of arrival, in this thread.
        Raises RolloutFailed when one cannot be had, ValueError for requests with equal ids.
        """
        return asyncio.run(self.generate_async(requests, sampling, num_samples=num_samples, on_generation=on_generation))

    async def generate_async(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        num_samples: int,
        on_generation: Callable[[Generation], None] | None = None,
    ) -> list[list[Generation]]:
        """`generate` for callers with an event loop of their own."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        if len({request.request_id for request in requests}) != len(requests):
            raise ValueError("generate: two requests have the same request_id")
        results: list[list[Generation | None]] = [[None] * num_samples for _ in requests]

        def accept(sample: _Sample, generation: Generation) -> None:
            row = results[sample.request_index]
            assert row[sample.index] is None, f"{sample.name} was answered twice"
            row[sample.index] = generation
            if on_generation is not None:
                on_generation(generation)

        samples = [_Sample(request, i, j) for i, request in enumerate(requests) for j in range(num_samples)]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(self._request_timeout_s, connect=min(10.0, self._request_timeout_s))
        # trust_env=False: servers are reached directly, whatever http_proxy says.
        async with httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits, trust_env=False) as http:
            call = _Call(http=http, sampling=sampling, accept=accept, room=_Room(self._max_in_flight), client=self)
            await _run_all([call.run(share, endpoint_index) for endpoint_index, share in self._deal(samples)])
        missing = [f"{request.request_id}" for request, row in zip(requests, results, strict=True) if any(g is None for g in row)]
        if missing:  # cannot happen: each task either fills its samples or raises
            raise RolloutFailed(f"no response for {len(missing)} requests, the first being {missing[0]}")
        return [[generation for generation in row if generation is not None] for row in results]

    def _deal(self, samples: Sequence[_Sample]) -> list[tuple[int, list[_Sample]]]:
        """Samples of one request stay together (they share the prompt's cache); requests go to the servers in turn."""
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
    room: _Room
    client: GenerationClient

    async def run(self, samples: Sequence[_Sample], endpoint_index: int) -> None:
        """Fill all of `samples`; whatever fails in an attempt goes into the next one, elsewhere."""
        endpoints = self.client.endpoints
        attempt = 0
        while samples:
            endpoint = endpoints[(endpoint_index + attempt) % len(endpoints)]
            await self.room.take(len(samples))
            try:
                failed = await self._attempt(samples, endpoint)
            finally:
                await self.room.give(len(samples))
            for sample in failed:
                if sample.num_retries > self.client._max_retries:
                    raise RolloutFailed(f"{endpoint}: request {sample.name}: {sample.last_failure} (gave up after {attempt + 1} attempts)")
            samples = failed
            if samples:
                await asyncio.sleep(min(30.0, self.client._backoff_s * 2**attempt))
            attempt += 1

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
            else:
                self.accept(sample, generation)
        return again

    async def _post(self, samples: Sequence[_Sample], endpoint: str) -> list[dict[str, Any]]:
        body = request_body(samples, self.sampling)
        try:
            response = await self.http.post(f"{endpoint}/generate", json=body)
        except httpx.HTTPError as error:
            raise _Retryable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        name = samples[0].name if len(samples) == 1 else f"{samples[0].name} and {len(samples) - 1} more"
        if response.status_code in _RETRIED_STATUS:
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


async def _run_all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
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


def sample_seed(seed: int, request_id: str, sample_index: int) -> int:
    """A 31-bit seed for one response: the same for the same (seed, request, index), different from all others. FNV-1a, 64 bits, folded."""
    state = 0xCBF29CE484222325
    for byte in f"{seed}/{request_id}/{sample_index}".encode():
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    state ^= state >> 33
    return (state * 0xFF51AFD7ED558CCD % 2**64) >> 33


def request_body(samples: Sequence[_Sample], sampling: SamplingParams) -> dict[str, Any]:
    """The body of one batched /generate call. Every sampling setting is said: a model folder's generation_config.json has no say."""
    common = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    params = []
    for sample in samples:
        seed = None if sampling.seed is None else sample_seed(sampling.seed, sample.request.request_id, sample.index)
        params.append(common if seed is None else {**common, "sampling_seed": seed})
    nonce = uuid.uuid4().hex  # a server refuses an id that is still running there, for instance after a time-out
    return {
        "rid": [f"{sample.name}-{nonce}" for sample in samples],
        "input_ids": [list(sample.request.prompt_token_ids) for sample in samples],
        "sampling_params": params,
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
    }


def read_generation(answer: dict[str, Any], request: GenerationRequest, *, num_retries: int, latency_s: float) -> Generation:
    """SGLang's answer for one sample as our record.

    Raises ValueError, saying what is wrong with it, when a log-prob or a version is missing or does not fit the tokens, or when the server
    says that the request itself is bad (an abort with status 400).
    """
    meta = answer.get("meta_info")
    if not isinstance(meta, dict) or "output_ids" not in answer:
        raise ValueError(f"the answer has no meta_info or no output_ids; it has {sorted(answer)}")
    finish = meta["finish_reason"]
    kind = finish["type"] if isinstance(finish, dict) else finish
    if kind not in ("stop", "length", "abort"):
        raise ValueError(f"finish_reason is {finish!r}, expected stop, length or abort")
    if kind == "abort" and isinstance(finish, dict) and finish.get("status_code") == 400:
        raise ValueError(f"refused by the server: {finish.get('message')}")
    token_ids = tuple(answer["output_ids"])
    if kind == "abort":  # will be sampled again: its contents are not used, so they need not be whole
        token_ids = ()
    entries = () if kind == "abort" else _logprob_entries(meta, len(token_ids))
    for position, (logprob, token_id) in enumerate(entries):
        if token_id != token_ids[position]:
            raise ValueError(f"log-prob {position} belongs to token {token_id}, but the response has {token_ids[position]} there")
        if logprob is None or not math.isfinite(logprob):
            raise ValueError(f"log-prob {position} is {logprob}, expected a finite number")
    if kind != "abort" and not token_ids:
        raise ValueError("the response is empty")
    return Generation(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        response_token_ids=token_ids,
        engine_logprobs=tuple(logprob for logprob, _ in entries),
        version_spans=() if kind == "abort" else _version_spans(meta, len(token_ids)),
        finish_reason=kind,
        latency_s=latency_s,
        num_retries=num_retries,
    )


def _logprob_entries(meta: dict[str, Any], num_tokens: int) -> tuple[tuple[float, int], ...]:
    entries = meta.get("output_token_logprobs")
    if entries is None:
        raise ValueError("output_token_logprobs is missing")
    if len(entries) != num_tokens:
        raise ValueError(f"{len(entries)} log-probs for {num_tokens} response tokens")
    return tuple((entry[0], entry[1]) for entry in entries)


def _version_spans(meta: dict[str, Any], num_tokens: int) -> tuple[VersionSpan, ...]:
    spans = meta.get("weight_versions")
    if spans is None:
        raise ValueError("weight_versions is missing")
    read = []
    for span in spans:
        if span["start"] == span["end"]:
            continue
        try:
            version = int(span["version"])
        except ValueError:
            raise ValueError(
                f"weight version {span['version']!r} is not a policy version; was the server started by this project?"
            ) from None
        read.append(VersionSpan(policy_version=version, start=span["start"], end=span["end"]))
    if sum(span.end - span.start for span in read) != num_tokens:
        raise ValueError(f"version spans {spans} do not cover {num_tokens} response tokens")
    return tuple(read)
