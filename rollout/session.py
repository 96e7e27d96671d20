"""All calls of one batch: who is asked for what, what is asked for again, and what has come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec

from rollout.event_loop import Result
from rollout.gate import RolloutFailed, SessionGate
from rollout.records import NO_SINKS, Generation, GenerationRequest, SamplingParams, Sinks
from rollout.refusals import refusal
from rollout.reports import SessionReport
from rollout.sglang.generate import Answer, keep_routes, keep_top_tokens, read_answer, read_generation, request_body, split_answers

log = logging.getLogger(__name__)

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

Assignment = Literal["fixed", "least_outstanding"]
OnGeneration = Callable[[GenerationRequest, Generation], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What the sessions of one client have in common; the meanings are those of GenerationClient's arguments."""

    endpoints: tuple[str, ...]
    max_retries: int
    max_in_flight: int
    samples_per_call: int | None
    backoff_s: float
    assignment: Assignment
    is_rolling: bool  # sessions of several versions may be open at once


class _Retryable(Exception):
    """One attempt failed in a way that another attempt may not."""


@dataclass(slots=True)
class Arrived:
    """What a session got before it broke off. The same session, opened again, asks only for the rest."""

    policy_version: int | None
    sampling: SamplingParams
    generations: dict[GenerationRequest, Generation] = field(default_factory=dict)
    retries: Counter[GenerationRequest] = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class GenerationSession:
    """What `GenerationClient.session` opens. Several `generate` calls may run at once."""

    settings: SessionSettings
    report: SessionReport
    tokens_under_way: list[int]  # by number of the server, shared by all sessions
    http: httpx.AsyncClient
    arrived: Arrived
    gate: SessionGate
    places: asyncio.Semaphore  # one per request under way
    waiting_tokens: list[int]  # by number of the server: of calls that wait for it
    turns: Mapping[str, asyncio.Lock]  # of servers that get one call at a time; empty: they get as many as there are places for
    sinks: Sinks = NO_SINKS  # get what else every answer holds
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)  # one call takes its places before the next one begins to
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # one answer is read at a time
    homes: dict[str, int] = field(default_factory=dict)  # request_id -> the number of its server
    first_sent: dict[GenerationRequest, float] = field(default_factory=dict)
    failures: dict[GenerationRequest, tuple[str, str]] = field(default_factory=dict)  # of the last attempt: endpoint and reason
    conversations: Counter[str] = field(default_factory=Counter)  # request_id -> those that have begun and not ended

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
        if self.settings.assignment == "fixed":
            for request in requests:  # also of what has arrived already: the deal stays the same
                self._deal_home(request.request_id)
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
            if self.settings.assignment == "fixed":
                self._deal_home(request_id)
            self.conversations[request_id] += 1
            self.gate.expect(self.homes.get(request_id))

    def end(self, request_id: str) -> None:
        """One conversation asks nothing more."""
        self.conversations[request_id] -= 1
        self.gate.release(self.homes.get(request_id))

    def _deal_home(self, request_id: str) -> None:
        self.homes.setdefault(request_id, len(self.homes) % len(self.settings.endpoints))

    def metrics(self) -> dict[str, float]:
        """How the servers fared so far, see SessionReport.metrics."""
        return self.report.metrics(num_retries=self.arrived.retries.total(), num_silent=self.gate.num_silent())

    async def fill(self, requests: Sequence[GenerationRequest], turn: int | None, keep: OnGeneration) -> None:
        """Get all of `requests`. Whatever fails in an attempt goes into the next one, to the next server.

        Args:
            requests: one call. Where turn is None, all have one request_id.
            turn: the number of the server that is asked first; None: the one with the least to do, once there is a place for the call.
            keep: called with each response.
        """
        attempts = 0
        self.gate.expect(turn)
        try:
            while requests:
                async with self.taking:  # two calls that each hold some of their places would wait for each other
                    for _ in requests:
                        await self.places.acquire()
                try:
                    if turn is None:
                        turn = self._move(turn, self._assigned(requests[0].request_id))
                    again = await self._attempt_on(turn, requests, keep)
                finally:
                    for _ in requests:
                        self.places.release()
                requests = again
                if requests:
                    turn = self._move(turn, turn + 1)
                    attempts += 1
                    await self._prepare_retry(requests, attempts)
        finally:
            self.gate.release(turn)

    def _move(self, turn: int | None, to: int) -> int:
        """What is wanted of one server is wanted of another one from now on, and nobody gets in between."""
        self.gate.expect(to)
        self.gate.release(turn)
        return to

    def _assigned(self, request_id: str) -> int:
        """The home of a conversation. Where it has none it becomes the server with the least to do, for all conversations of that name."""
        if request_id not in self.homes:
            # What another session's calls wait for does not count: they wait until this session's are done, or are done before it begins.
            to_do = [sum(tokens) for tokens in zip(self.waiting_tokens, self.tokens_under_way, strict=True)]
            home = min(self.gate.askable(), key=lambda number: to_do[number])
            self.homes[request_id] = home
            for _ in range(self.conversations[request_id]):
                self._move(None, home)
        return self.homes[request_id]

    async def _attempt_on(self, turn: int, requests: Sequence[GenerationRequest], keep: OnGeneration) -> list[GenerationRequest]:
        """`_attempt` on the server whose turn it is, once it may be asked."""
        tokens = self._outstanding(requests)
        number = turn % len(self.settings.endpoints)
        async with AsyncExitStack() as entered:
            self.waiting_tokens[number] += tokens
            try:
                endpoint = await entered.enter_async_context(self.gate.server(turn))
                await entered.enter_async_context(self.turns.get(endpoint, nullcontext()))
            finally:
                self.waiting_tokens[number] -= tokens
            self.tokens_under_way[number] += tokens
            try:
                again = await self._attempt(requests, endpoint, keep)
            finally:
                self.tokens_under_way[number] -= tokens
            if again:
                self.gate.close(endpoint)
        return again

    def _outstanding(self, requests: Sequence[GenerationRequest]) -> int:
        """What a server has to do for them at most, in tokens."""
        limits = (request.max_new_tokens or self.arrived.sampling.max_new_tokens for request in requests)
        return sum(len(request.prompt_token_ids) + limit for request, limit in zip(requests, limits, strict=True))

    def _deal(self, requests: Sequence[GenerationRequest]) -> list[tuple[int | None, list[GenerationRequest]]]:
        """(number of the server, requests of one call).

        A fixed deal ignores which servers are alive: it is the same whatever happens. Otherwise requests whose server is not chosen yet
        make one call for each request_id.
        """
        settings = self.settings
        shares: dict[int | str, list[GenerationRequest]] = {}
        for request in requests:
            shares.setdefault(self.homes.get(request.request_id, request.request_id), []).append(request)
        most = min(settings.max_in_flight, settings.samples_per_call if settings.samples_per_call is not None else len(requests) or 1)
        return [
            (home if isinstance(home, int) else None, share[at : at + most])
            for home, share in shares.items()
            for at in range(0, len(share), most)
        ]

    async def _prepare_retry(self, requests: Sequence[GenerationRequest], attempts: int) -> None:
        """Give up or pause, and look whether the server that failed may be asked again."""
        settings, retries = self.settings, self.arrived.retries
        for request in requests:
            endpoint, reason = self.failures[request]
            if retries[request] > settings.max_retries:
                raise RolloutFailed(f"{endpoint}: request {request.name}: {reason} (gave up after {retries[request]} attempts)")
        endpoint, reason = self.failures[requests[0]]
        log.warning("%s: %s: %d request(s) are sent again", endpoint, reason, len(requests))
        await asyncio.sleep(min(30.0, settings.backoff_s * 2 ** (attempts - 1)))
        await self.gate.look([endpoint])

    async def _attempt(self, requests: Sequence[GenerationRequest], endpoint: str, keep: OnGeneration) -> list[GenerationRequest]:
        """One HTTP call. Keeps what came back whole; returns the requests to send again."""
        self.report.called(endpoint)
        for request in requests:
            self.first_sent.setdefault(request, time.monotonic())
        try:
            pieces = await self._post(requests, endpoint)
        except _Retryable as failure:
            for request in requests:
                self._note_failure(request, endpoint, str(failure))
            return list(requests)
        again = []
        for request, piece in zip(requests, pieces, strict=True):
            try:
                answer = await self._in_turn(read_answer, piece)
                generation = await self._in_turn(
                    read_generation,
                    answer,
                    request,
                    num_retries=self.arrived.retries[request],
                    latency_s=time.monotonic() - self.first_sent[request],
                )
            except ValueError as error:
                raise RolloutFailed(f"{endpoint}: request {request.name}: {error}") from error
            if generation.finish_reason == "abort":
                self._note_failure(request, endpoint, f"aborted by the server: {answer.meta_info.finish_reason.get('message')}")
                again.append(request)
            elif self.gate.policy_version is not None and generation.policy_versions != (self.gate.policy_version,) * 2:
                reason = "sampled under policy versions {} to {}".format(*generation.policy_versions)
                self._note_failure(request, endpoint, f"{reason}, wanted is {self.gate.policy_version}")
                again.append(request)
            else:
                if self.sinks != NO_SINKS:
                    try:
                        generation = await asyncio.to_thread(self._fill_sinks, answer, generation)
                    except ValueError as error:
                        raise RolloutFailed(f"{endpoint}: request {request.name}: {error}") from error
                self.report.answered(endpoint)
                del self.first_sent[request]
                self.failures.pop(request, None)
                keep(request, generation)
        return again

    async def _in_turn(self, read: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Call what takes milliseconds and holds the GIL. One such call at a time; before each, all other coroutines have their turn."""
        async with self.reading:
            await asyncio.sleep(0)
            return read(*arguments, **options)

    def _fill_sinks(self, answer: Answer, generation: Generation) -> Generation:
        if self.sinks.routes is not None:
            generation = keep_routes(answer, generation, self.sinks.routes)
        if self.sinks.top is not None:
            generation = keep_top_tokens(answer, generation, self.sinks.top)
        return generation

    def _note_failure(self, request: GenerationRequest, endpoint: str, reason: str) -> None:
        self.arrived.retries[request] += 1
        self.failures[request] = endpoint, reason

    async def _post(self, requests: Sequence[GenerationRequest], endpoint: str) -> list[Any]:
        """The answers, each for `read_answer`."""
        body = request_body(requests, self.arrived.sampling, sinks=self.sinks)
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
            pieces = await self._in_turn(split_answers, response.content)
        except msgspec.ValidationError as error:
            raise RolloutFailed(f"{endpoint}: request {name}: no list of answers for {len(requests)} prompts: {error}") from error
        except ValueError as error:
            raise _Retryable(f"the answer is not JSON: {response.text[:100]!r}") from error
        if len(pieces) != len(requests):
            raise RolloutFailed(f"{endpoint}: request {name}: {len(pieces)} answers for {len(requests)} prompts")
        return pieces


async def run_all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
