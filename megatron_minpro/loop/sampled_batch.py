"""A batch on its way from the sampler to the trainer: tokens in a few joined streams, and what is known of its responses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_minpro.batch.sample import Sample
from megatron_minpro.batch.streams import PackedBatch, pack
from megatron_minpro.loop.collector import Collected

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBatch:
    """What the trainer needs of a batch. Conversations and texts stay where they were made."""

    batch: PackedBatch
    num_dropped: int  # responses that dynamic sampling dropped
    reward_s: float  # seconds of judging
    metrics: Mapping[str, float]  # of the sampled responses, and how the servers fared
    cursor: Mapping[str, Any]  # of the prompts, behind those of this batch


def sampled_batch(collected: Collected, *, dynamic_sampling: bool) -> SampledBatch:
    """What `collected` tells the trainer. dynamic_sampling: whether its metrics are wanted."""
    batch, num_dropped = collected.batch, len(collected.dropped)
    metrics = sampling_metrics((*batch.samples, *collected.dropped), group_size=batch.group_size)
    if dynamic_sampling:
        metrics |= {"rollout/rounds": collected.rounds, "rollout/equal_groups": collected.equal_groups, "rollout/dropped": num_dropped}
    errors = sum(result.error is not None for _, result in collected.judged)
    if errors:
        log.warning(
            "step %d: %d of %d responses could not be graded and count as wrong", batch.sampled_at_step, errors, len(collected.judged)
        )
    return SampledBatch(
        batch=pack(batch),
        num_dropped=num_dropped,
        reward_s=collected.reward_s,
        metrics={**metrics, **collected.servers, "reward/errors": errors},
        cursor=collected.cursor,
    )


def sampling_metrics(samples: Sequence[Sample], *, group_size: int) -> dict[str, float]:
    """Means over whole groups of responses, dropped ones included: how good the policy that sampled them is, whatever is trained."""
    tokens = sum(sample.num_response_tokens for sample in samples)
    rewards = torch.tensor([sample.reward for sample in samples]).view(-1, group_size)
    return {
        "reward/sampled": float(rewards.mean()),
        "reward/correct": sum(sample.correct for sample in samples) / len(samples),
        "reward/zero_variance_groups": float((rewards == rewards[:, :1]).all(1).float().mean()),
        "rollout/tokens": tokens,
        "rollout/length": tokens / len(samples),
        "rollout/truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
    }
