"""SGLang's /generate: the body of a request, and how an answer is read and checked."""

from __future__ import annotations

import base64
import json
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from rollout.records import (
    NO_SINKS,
    Generation,
    GenerationRequest,
    RouteSink,
    SamplingParams,
    Sinks,
    TopTokenSink,
    VersionSpan,
)


def response_seed(seed: int, request_id: str, sample_index: int, turn: int = 0) -> int:
    """A 31-bit seed for one response: the same for the same seed, request id, sample index and turn, and different from all others.

    FNV-1a, 64 bits, folded.
    """
    name = f"{seed}/{request_id}/{sample_index}" + (f"/{turn}" if turn else "")
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    state ^= state >> 33
    return (state * 0xFF51AFD7ED558CCD % 2**64) >> 33


def request_body(requests: Sequence[GenerationRequest], sampling: SamplingParams, *, sinks: Sinks = NO_SINKS) -> dict[str, Any]:
    """The body of one batched /generate call.

    It states every sampling setting, so that a model folder's generation_config.json changes nothing. sinks: what else is asked for.
    """
    further: dict[str, Any] = {}
    if sinks.routes is not None:
        further["return_routed_experts"] = True
    if sinks.top is not None:
        # As two blocks of bytes: lists of [log-prob, id, null] are three times as long and are read one by one.
        further |= {
            "top_logprobs_num": sinks.top.top_k,
            "return_flat_raw_output_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    nonce = uuid.uuid4().hex  # a server refuses an id that is still running there, for instance after a time-out
    return {
        "rid": [f"{request.name}-{nonce}" for request in requests],
        "input_ids": [list(request.prompt_token_ids) for request in requests],
        "sampling_params": [_sampling_params(request, sampling) for request in requests],
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
        **further,
    }


def _sampling_params(request: GenerationRequest, sampling: SamplingParams) -> dict[str, Any]:
    seed = {}
    if sampling.seed is not None:
        seed["sampling_seed"] = response_seed(sampling.seed, request.request_id, request.sample_index, request.turn)
    return {
        "max_new_tokens": sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [*sampling.stop_token_ids, *request.stop_token_ids],
        **seed,
    }


class TokenLogprob(msgspec.Struct, array_like=True, gc=False):  # type: ignore[call-arg,unused-ignore]  # mypy without msgspec
    """[log-prob, token id, text]; the text is not read. gc=False: 32 million of them must not make the garbage collector run."""

    logprob: float | None
    token_id: int


class MetaInfo(msgspec.Struct):
    """What is read of an answer's meta_info. Fields of type Any are checked by whoever reads them."""

    finish_reason: Any
    output_token_logprobs: list[TokenLogprob] | None = None
    weight_versions: Any = None
    routed_experts: Any = None
    num_retractions: Any = None
    output_top_logprobs_idx_flat_b64: Any = None
    output_top_logprobs_val_flat_b64: Any = None
    output_top_logprobs_shape: Any = None


class Answer(msgspec.Struct):
    """SGLang's answer for one sample."""

    output_ids: list[int]
    meta_info: MetaInfo


_SAME_LOGPROB = 1e-3  # servers take both from one table: what is left is the rounding of decimal numbers
_MOST_TOKEN_IDS = 1 << 24  # more than any vocabulary has; bounds the memory of the list


class _TokenIds:
    """Every token id once: a token that waits for its batch then costs a pointer (8 bytes) and not a number of 32 bytes."""

    def __init__(self) -> None:
        self._known: list[int] = []  # never changed: other threads may read it

    def shared(self, token_ids: list[int]) -> tuple[int, ...]:
        """The same ids. Raises ValueError for one that no vocabulary has."""
        largest = max(token_ids, default=0)
        if min(token_ids, default=0) < 0 or largest >= _MOST_TOKEN_IDS:
            raise ValueError(f"a token id is {min(token_ids)} or {largest}, expected 0 to {_MOST_TOKEN_IDS - 1}")
        known = self._known
        if largest >= len(known):
            known = self._known = list(range(1 << largest.bit_length()))
        return tuple(map(known.__getitem__, token_ids))


_PIECES = msgspec.json.Decoder(list[msgspec.Raw])
_ANSWER = msgspec.json.Decoder(Answer)
_TOKEN_IDS = _TokenIds()


def split_answers(body: bytes) -> list[Any]:
    """The body of a batched call as pieces for `read_answer`: the event loop must not stand still while all of them are read.

    Raises ValueError when the body is not JSON; msgspec.ValidationError, which is one, when it is JSON and no list.
    """
    try:
        return _PIECES.decode(body)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # perhaps for a NaN: not JSON, but Python writes it; `read_generation` then names the log-prob
        return msgspec.convert(json.loads(body), list[Any])


def read_answer(piece: Any) -> Answer:
    """A piece of `split_answers`. Raises ValueError, saying where, when a field is missing or of another type."""
    return _ANSWER.decode(piece) if isinstance(piece, msgspec.Raw) else msgspec.convert(piece, Answer)


def read_generation(answer: Answer, request: GenerationRequest, *, num_retries: int, latency_s: float) -> Generation:
    """SGLang's answer for one sample as our record.

    Raises ValueError, saying what is wrong with it, when a log-prob or a version is missing or does not fit the tokens, or when the server
    says that the request itself is bad (an abort with status 400).
    """
    meta = answer.meta_info
    finish = meta.finish_reason
    kind = finish["type"] if isinstance(finish, dict) else finish
    if kind not in ("stop", "length", "abort"):
        raise ValueError(f"finish_reason is {finish!r}, expected stop, length or abort")
    if kind == "abort" and isinstance(finish, dict) and finish.get("status_code") == 400:
        raise ValueError(f"refused by the server: {finish.get('message')}")
    token_ids = [] if kind == "abort" else answer.output_ids  # will be sampled again: its contents are not used, so they need not be whole
    if kind != "abort" and not token_ids:
        raise ValueError("the response is empty")
    return Generation(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        response_token_ids=_TOKEN_IDS.shared(token_ids),
        engine_logprobs=array("d") if kind == "abort" else _logprobs(meta, token_ids),
        version_spans=() if kind == "abort" else _version_spans(meta, len(token_ids)),
        finish_reason=kind,
        latency_s=latency_s,
        num_retries=num_retries,
    )


def keep_routes(answer: Answer, generation: Generation, sink: RouteSink) -> Generation:
    """The record of an answer with the place of its experts. Their text, which is most of the answer, is taken out of it.

    Where weights changed or the server computed tokens a second time, it returns the later computation's experts for the earlier tokens:
    these are not known then. Takes a while: call it in a thread.

    Raises:
        ValueError: experts or the number of retractions are missing, or the experts cannot be those of the tokens.
    """
    meta = answer.meta_info
    text, retractions = meta.routed_experts, meta.num_retractions
    meta.routed_experts = None
    if not isinstance(retractions, int):
        raise ValueError(f"num_retractions is {retractions!r}, expected a number; without it nobody knows what routed_experts belongs to")
    if not isinstance(text, str):
        raise ValueError(
            "routed_experts is missing; expected a server of a model with experts, started with --enable-return-routed-experts"
        )
    if retractions or len(generation.version_spans) > 1:
        return generation
    return replace(generation, routes=sink.keep(base64.b64decode(text, validate=True), num_inputs=generation.num_inputs))


def keep_top_tokens(answer: Answer, generation: Generation, sink: TopTokenSink) -> Generation:
    """The record of an answer with the place of its most likely tokens. Their text, which is most of the answer, is taken out of it.

    Takes a while: call it in a thread.

    Raises:
        ValueError: they are missing, are not `top_k` of each response token, or disagree with the log-probs of the sampled tokens.
    """
    meta, expected = answer.meta_info, [len(generation.response_token_ids), sink.top_k]
    texts = meta.output_top_logprobs_idx_flat_b64, meta.output_top_logprobs_val_flat_b64
    meta.output_top_logprobs_idx_flat_b64 = meta.output_top_logprobs_val_flat_b64 = None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("output_top_logprobs are missing; expected a server that knows return_flat_raw_output_top_logprobs")
    blocks = [base64.b64decode(text, validate=True) for text in texts]
    if meta.output_top_logprobs_shape != expected or any(len(block) != 4 * expected[0] * expected[1] for block in blocks):
        sizes = f"{len(blocks[0])} and {len(blocks[1])} bytes"
        raise ValueError(f"output_top_logprobs have the shape {meta.output_top_logprobs_shape} in {sizes}, expected {expected}")
    ids = np.frombuffer(blocks[0], dtype="<i4").reshape(expected)
    logprobs = np.frombuffer(blocks[1], dtype="<f4").reshape(expected)
    # Both are the sampled token's log-prob, where it is among the most likely ones. Another value is one of another distribution.
    sampled = ids == np.asarray(generation.response_token_ids, dtype=np.int32)[:, None]
    gap = np.abs(np.where(sampled, logprobs - np.asarray(generation.engine_logprobs, dtype=np.float32)[:, None], 0.0)).max(1)
    if not gap.max() <= _SAME_LOGPROB:
        at = int(gap.argmax())
        raise ValueError(f"top log-prob of the sampled token {at} is {gap[at]:.3g} away from its log-prob, expected the same number")
    return replace(generation, top=sink.keep(ids, logprobs))


def _logprobs(meta: MetaInfo, token_ids: list[int]) -> array[float]:
    entries = meta.output_token_logprobs
    if entries is None:
        raise ValueError("output_token_logprobs is missing")
    if len(entries) != len(token_ids):
        raise ValueError(f"{len(entries)} log-probs for {len(token_ids)} response tokens")
    scored = [entry.token_id for entry in entries]
    if scored != token_ids:
        position = next(position for position, token_id in enumerate(token_ids) if scored[position] != token_id)
        raise ValueError(f"log-prob {position} belongs to token {scored[position]}, but the response has {token_ids[position]} there")
    logprobs = np.array([entry.logprob for entry in entries], dtype=np.float64)  # None becomes NaN
    wrong = np.flatnonzero(~np.isfinite(logprobs))
    if len(wrong):
        raise ValueError(f"log-prob {wrong[0]} is {entries[wrong[0]].logprob}, expected a finite number")
    return array("d", logprobs.tobytes())


def _version_spans(meta: MetaInfo, num_tokens: int) -> tuple[VersionSpan, ...]:
    spans = meta.weight_versions
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
