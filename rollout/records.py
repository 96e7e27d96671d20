"""What goes into the rollout engine and what comes out: frozen records and protocols, no torch, no HTTP.

A policy version is the number of optimizer steps behind the weights; SGLang calls it `weight_version` and speaks of it as a string.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Response tokens [start, end) were sampled under the weights of `policy_version`."""

    policy_version: int
    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"VersionSpan: start {self.start} and end {self.end} must satisfy 0 <= start <= end")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One wanted response to a prompt that is already tokenized (chat template applied).

    Requests with one request_id belong together: they are samples of one prompt, or turns of one conversation. They go to one server
    while it answers, because they share the beginning of their prompts. Every request of a call differs from all others.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sample_index: int = 0  # which of several responses to one prompt
    turn: int = 0  # which response of one conversation
    max_new_tokens: int | None = None  # None: what SamplingParams says
    stop_token_ids: tuple[int, ...] = ()  # beside those of SamplingParams

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"GenerationRequest {self.request_id!r}: prompt_token_ids is empty, expected at least one token")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"GenerationRequest {self.request_id!r}: max_new_tokens is {self.max_new_tokens}, expected at least 1")

    @property
    def name(self) -> str:
        """What error messages call it, such as step3-7#0, or step3-7#0.2 for the third turn."""
        return f"{self.request_id}#{self.sample_index}" + (f".{self.turn}" if self.turn else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample. Nothing is left to the engine's or the model folder's defaults.

    top_k: -1 keeps the whole vocabulary. stop_token_ids: generation ends with (and includes) one of them, in addition to the
    end-of-sequence token of the model folder. seed: every request is drawn with its own seed, derived from this one and from the
    request's id, sample index and turn; None leaves the draw to the engine.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: tuple[int, ...]
    seed: int | None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number >= 0 (0: greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected 0 < top_p <= 1")
        if self.top_k != -1 and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected -1 (whole vocabulary) or at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sampled response, exactly as the engine returned it.

    engine_logprobs: natural log, one per response token, of the engine's own forward pass; the client gives an array of float64, for many
    responses wait for their batch.
    version_spans: cover [0, len(response_token_ids)) without gap or overlap.
    finish_reason: "abort" never leaves the client (such responses are sampled again) but can be read back from a file.
    latency_s: from the first time the request was sent until its answer. num_retries: earlier attempts that failed.
    routes: where the RouteSink of its session keeps the experts that its tokens visited; None: they are not known, or nobody asked.
    top: where the TopTokenSink of its session keeps the most likely tokens; None: nobody asked.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...] = field(repr=False)
    engine_logprobs: Sequence[float] = field(repr=False)  # asyncio.run writes its result out for an error message of its own
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    latency_s: float
    num_retries: int
    routes: int | None = None
    top: int | None = None

    def __post_init__(self) -> None:
        if len(self.engine_logprobs) != len(self.response_token_ids):
            raise ValueError(
                f"Generation {self.request_id!r}: {len(self.engine_logprobs)} log-probs for {len(self.response_token_ids)} response tokens"
            )
        covered = 0
        for span in self.version_spans:
            if span.start != covered:
                raise ValueError(
                    f"Generation {self.request_id!r}: version spans {self.version_spans} leave a gap or overlap at token {covered}"
                )
            covered = span.end
        if covered != len(self.response_token_ids):
            raise ValueError(
                f"Generation {self.request_id!r}: version spans cover {covered} of {len(self.response_token_ids)} response tokens"
            )

    @property
    def num_inputs(self) -> int:
        """Tokens that the model was fed: prompt and response without the last one."""
        return len(self.prompt_token_ids) + len(self.response_token_ids) - 1

    @property
    def policy_versions(self) -> tuple[int, int]:
        """Oldest and newest policy version among the response tokens."""
        versions = [span.policy_version for span in self.version_spans]
        return min(versions), max(versions)


class RouteSink(Protocol):
    """Keeps the experts that the tokens of answers visited. Called in several threads at once."""

    def keep(self, ids: bytes, *, num_inputs: int) -> int:
        """Keep those of one answer.

        Args:
            ids: int32 in C order, [num_inputs, layers, experts per token].
            num_inputs: see Generation.

        Returns:
            A number by which they are found again.

        Raises:
            ValueError: ids of another shape, or that are no sets of experts.
        """
        ...


class TopTokenSink(Protocol):
    """Keeps the engine's most likely tokens wherever it sampled one. Called in several threads at once."""

    @property
    def top_k(self) -> int:
        """How many of them are wanted of each place."""
        ...

    def keep(self, ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]) -> int:
        """Keep those of one answer.

        Args:
            ids: [response tokens, top_k].
            logprobs: of these ids, natural log, at the temperature that was sampled at, over the whole vocabulary.

        Returns:
            A number by which they are found again.

        Raises:
            ValueError: ids of no token, or log-probs of no distribution.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks:
    """What is wanted of a session's answers beside tokens and log-probs, and where it goes. None: it is not asked for."""

    routes: RouteSink | None = None
    top: TopTokenSink | None = None


NO_SINKS = Sinks()
