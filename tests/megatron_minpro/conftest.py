"""Batches that several tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_minpro.samples import RolloutBatch, Sample


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A sample of 3 prompt and `response` response tokens whose numbers tell `number` and `version`; any field can be given."""

    def make(number: int = 0, *, response: int = 2, version: int = 0, **fields: object) -> Sample:
        values = {
            "sample_id": f"sample-{number}",
            "token_ids": (*range(3), *range(10 * number, 10 * number + response)),
            "prompt_tokens": 3,
            "engine_logprobs": tuple(-0.1 * (t + 1) - number for t in range(response)),
            "behaviour_logprobs": tuple(-0.3 * (t + 1) - number for t in range(response)),
            "policy_versions": (version, version),
            "finish_reason": "stop",
            "reward": float(number % 2),
            "correct": number % 2 == 1,
            "advantage": 0.1 * number,
        }
        return Sample(**{**values, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_batch(make_sample: Callable[..., Sample]) -> Callable[..., RolloutBatch]:
    """The batch of one step: `groups` groups of 2 samples, numbered from 0, sampled under `version`."""

    def make(step: int, *, groups: int = 2, version: int = 0, **fields: object) -> RolloutBatch:
        samples = tuple(make_sample(number, version=version, **fields) for number in range(2 * groups))
        return RolloutBatch(sampled_at_step=step, policy_version=version, group_size=2, samples=samples)

    return make
