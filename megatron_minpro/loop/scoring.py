"""A batch that arrived: given to all ranks, counted, and scored under the weights that sampled it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from megatron_minpro.batch import streams as batch_streams
from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.loop.collector import Collected
from megatron_minpro.loop.logprob_gap import check_every_token, check_gap
from megatron_minpro.loop.training_run import PhaseTimer, TrainingRun, share
from megatron_minpro.objectives.corrections import correct

log = logging.getLogger(__name__)


def take_in(run: TrainingRun, collected: Collected | None, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """Collective. Give rank 0's batch to all ranks and count it.

    Args:
        run: the run.
        collected: what the servers gave on rank 0, None elsewhere.
        timer: gets the seconds of judging, out of those of sampling.
        metrics: gets what is known of the sampled responses.
    """
    batch = batch_streams.broadcast(None if collected is None else collected.batch, group=run.control_group)
    num_dropped = share(run, len(collected.dropped) if collected is not None else None)
    if collected is not None:
        metrics |= sampling_metrics((*batch.samples, *collected.dropped), group_size=batch.group_size)
        if run.config.rollout.dynamic_sampling is not None:
            metrics |= {"rollout/rounds": collected.rounds, "rollout/equal_groups": collected.equal_groups, "rollout/dropped": num_dropped}
        metrics |= collected.servers
        timer.split("sample", "reward", collected.reward_s)
        errors = sum(result.error is not None for _, result in collected.judged)
        metrics["reward/errors"] = errors
        if errors:
            log.warning(
                "step %d: %d of %d responses could not be graded and count as wrong", batch.sampled_at_step, errors, len(collected.judged)
            )
    run.counters.rollouts_sampled += len(batch.samples) + num_dropped
    run.counters.rollouts_dropped += num_dropped
    if run.driver is not None:
        run.driver.count_sampled(run.counters.rollouts_sampled)
    return batch


def score(run: TrainingRun, batch: RolloutBatch, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """The batch with its behaviour log-probs, under the weights that the actor has now: those that sampled the batch."""
    if run.actor.policy_version != batch.policy_version:
        raise RuntimeError(
            f"batch of step {batch.sampled_at_step}: sampled by policy version {batch.policy_version}, "
            f"scored by version {run.actor.policy_version}"
        )
    with timer("score"):
        scored = batch.scored_with(run.actor.logprobs([sample.sequence() for sample in batch.samples]))
    engine = torch.cat([sample.engine_logprobs for sample in batch.samples])
    trainer = torch.cat([sample.behaviour_logprobs for sample in scored.samples if sample.behaviour_logprobs is not None])
    gap = (engine - trainer).abs()
    metrics |= {"engine_logprob_gap/mean": float(gap.mean()), "engine_logprob_gap/max": float(gap.max())}
    check_gap(metrics, run.config)
    check_every_token(gap, run.config)
    if run.config.behaviour_logprobs == "engine":
        return batch.scored_by_engine()
    if run.config.corrections.active:
        scored, corrected = correct(scored, run.config.corrections)
        metrics |= corrected
    return scored


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
