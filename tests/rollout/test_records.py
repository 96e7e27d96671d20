"""Records refuse contents that contradict themselves."""

from __future__ import annotations

import pytest

from rollout.records import Generation, GenerationRequest, SamplingParams, VersionSpan


def generation(**changes: object) -> Generation:
    values = {
        "request_id": "r",
        "prompt_token_ids": (1, 2),
        "response_token_ids": (3, 4, 5),
        "engine_logprobs": (-0.1, -0.2, -0.3),
        "version_spans": (VersionSpan(policy_version=7, start=0, end=2), VersionSpan(policy_version=8, start=2, end=3)),
        "finish_reason": "stop",
        "latency_s": 0.5,
        "num_retries": 0,
        **changes,
    }
    return Generation(**values)  # type: ignore[arg-type]


def test_policy_versions_are_the_oldest_and_the_newest() -> None:
    assert generation().policy_versions == (7, 8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine_logprobs": (-0.1, -0.2)}, "2 log-probs for 3 response tokens"),
        ({"version_spans": (VersionSpan(policy_version=7, start=0, end=2),)}, "cover 2 of 3"),
        ({"version_spans": (VersionSpan(policy_version=7, start=1, end=3),)}, "gap or overlap at token 0"),
    ],
)
def test_generation_whose_parts_do_not_fit_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        generation(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_sampling_params_out_of_range_are_refused(changes: dict[str, object], reason: str) -> None:
    values = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "stop_token_ids": (), "seed": None, **changes}
    with pytest.raises(ValueError, match=reason):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="'r': prompt_token_ids is empty"):
        GenerationRequest(request_id="r", prompt_token_ids=())
