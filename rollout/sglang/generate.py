"""SGLang's /generate: the body of a request, and how an answer is read and checked."""

from __future__ import annotations

import base64
import math
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rollout.records import Generation, GenerationRequest, RouteSink, SamplingParams, VersionSpan


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


def request_body(requests: Sequence[GenerationRequest], sampling: SamplingParams, *, routes: bool = False) -> dict[str, Any]:
    """The body of one batched /generate call.

    It states every sampling setting, so that a model folder's generation_config.json changes nothing. routes: ask for the experts too.
    """
    nonce = uuid.uuid4().hex  # a server refuses an id that is still running there, for instance after a time-out
    return {
        "rid": [f"{request.name}-{nonce}" for request in requests],
        "input_ids": [list(request.prompt_token_ids) for request in requests],
        "sampling_params": [_sampling_params(request, sampling) for request in requests],
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
        **({"return_routed_experts": True} if routes else {}),
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


def keep_routes(answer: dict[str, Any], generation: Generation, sink: RouteSink) -> Generation:
    """The record of an answer with the place of its experts. Their text, which is most of the answer, is taken out of it.

    Where weights changed or the server computed tokens a second time, it returns the later computation's experts for the earlier tokens:
    these are not known then. Takes a while: call it in a thread.

    Raises:
        ValueError: experts or the number of retractions are missing, or the experts cannot be those of the tokens.
    """
    meta = answer["meta_info"]
    text, retractions = meta.pop("routed_experts", None), meta.get("num_retractions")
    if not isinstance(retractions, int):
        raise ValueError(f"num_retractions is {retractions!r}, expected a number; without it nobody knows what routed_experts belongs to")
    if not isinstance(text, str):
        raise ValueError(
            "routed_experts is missing; expected a server of a model with experts, started with --enable-return-routed-experts"
        )
    if retractions or len(generation.version_spans) > 1:
        return generation
    return replace(generation, routes=sink.keep(base64.b64decode(text, validate=True), num_inputs=generation.num_inputs))


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
