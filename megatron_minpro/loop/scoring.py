"""A batch that arrived: given to all ranks, counted, and scored under the weights that sampled it."""

from __future__ import annotations

import torch

from megatron_minpro.batch import streams as batch_streams
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.loop.logprob_gap import check_every_token, check_gap
from megatron_minpro.loop.phase_timer import PhaseTimer
from megatron_minpro.loop.routing import score_with_experts
from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.loop.training_run import TrainingRun, share
from megatron_minpro.objectives.corrections import correct


def take_in(run: TrainingRun, sampled: SampledBatch | None, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """Collective. Give rank 0's batch to all ranks and count it.

    Args:
        run: the run.
        sampled: what the sampler gave on rank 0, None elsewhere.
        timer: gets the seconds of judging, out of those of sampling.
        metrics: gets what is known of the sampled responses.
    """
    batch = batch_streams.broadcast(None if sampled is None else sampled.batch, group=run.control_group)
    num_dropped = share(run, None if sampled is None else sampled.num_dropped)
    run.counters.rollouts_sampled += len(batch.samples) + num_dropped
    run.counters.rollouts_dropped += num_dropped
    if sampled is not None:
        metrics |= sampled.metrics
        timer.split("sample", "reward", sampled.reward_s)
        assert run.driver is not None
        run.driver.taken_in(cursor=sampled.cursor, rollouts_sampled=run.counters.rollouts_sampled)
    return batch


def score(run: TrainingRun, batch: RolloutBatch, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """The batch with its behaviour log-probs, under the weights that the actor has now: those that sampled the batch.

    Entropies of the same distributions go with them where the objective needs them.
    """
    if run.actor.policy_version != batch.policy_version:
        raise RuntimeError(
            f"batch of step {batch.sampled_at_step}: sampled by policy version {batch.policy_version}, "
            f"scored by version {run.actor.policy_version}"
        )
    entropies: list[torch.Tensor] | None = [] if run.objective.needs_behaviour_entropies else None
    with timer("score"):
        logprobs, batch = score_with_experts(run, batch, metrics, entropies)
        scored = batch.scored_with(logprobs, entropies)
    engine = torch.cat([sample.engine_logprobs for sample in batch.samples])
    trainer = torch.cat([sample.behaviour_logprobs for sample in scored.samples if sample.behaviour_logprobs is not None])
    gap = (engine - trainer).abs()
    metrics |= {"engine_logprob_gap/mean": float(gap.mean()), "engine_logprob_gap/max": float(gap.max())}
    check_gap(metrics, run.config)
    check_every_token(gap, run.config)
    if run.config.behaviour_logprobs == "engine":
        return scored.scored_by_engine()
    if run.config.corrections.active:
        scored, corrected = correct(scored, run.config.corrections)
        metrics |= corrected
    return scored
