"""Training one batch: mini-batches, one optimizer step each, and the measured lag against the promised one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.batch.staleness import expected_lag
from megatron_minpro.config import ActorConfig
from megatron_minpro.loop.learning_rate import sample_size_factor, training_rate
from megatron_minpro.loop.routing import experts_of, trained_metrics
from megatron_minpro.loop.seen_tokens import MARK, SeenTokens, recorded_groups
from megatron_minpro.loop.step_under_way import StepUnderWay
from megatron_minpro.loop.stop_time import LONGEST_UPDATE
from megatron_minpro.loop.top_tokens import forget_files, top_tokens_of
from megatron_minpro.loop.training_run import TrainingRun, obey
from megatron_minpro.objectives import Objective, TokenBatch, add_metrics, finalize_metrics
from megatron_minpro.objectives.histograms import BIN_EDGES
from megatron_minpro.objectives.metrics import histogram_counts
from megatron_minpro.tracking.step_details import Histogram
from parallel.actor import LearningRate, LossFunction, MegatronActor, UpdateReport
from parallel.token_sequence import TokenSequence


def update(run: TrainingRun, under_way: StepUnderWay) -> None:
    """Train what is left of the batch that is due, in mini-batches, one optimizer step each. Nothing where none is due.

    Raises:
        StopRequested: before one of the mini-batches.
        RuntimeError: the measured lag is not the promised one.
        ValueError: the earlier updates of this step have other metrics (see StepUnderWay.add_update).
    """
    updates = run.config.actor.updates_per_step
    batch = None if under_way.updates == updates else run.buffer.due(under_way.step)
    if batch is None:
        return
    experts, top = experts_of(run, batch), top_tokens_of(run, batch)
    recorded = recorded_groups(batch, run.config.tracking.token_groups)
    for samples in batch.mini_batches(num_mini_batches=updates, seed=run.config.seed)[under_way.updates :]:
        obey(run)
        before_s = under_way.timer.seconds.get("update", 0.0)
        with under_way.timer("update"):
            lag = run.actor.policy_version - batch.policy_version
            sequences = [sample.training_sequence(experts[sample.sample_id], top[sample.sample_id]) for sample in samples]
            rate = _rate(run.config.actor, run.actor.policy_version)
            seen = SeenTokens(samples=samples, groups=recorded) if any(sample.sample_id in recorded for sample in samples) else None
            report = train_mini_batch(run.actor, sequences, run.objective, lag=lag // updates, learning_rate=rate, seen=seen)
            if seen is not None:
                _keep(run, batch, seen, under_way)
        took_s = under_way.timer.seconds["update"] - before_s
        under_way.metrics[LONGEST_UPDATE] = max(took_s, under_way.metrics.get(LONGEST_UPDATE, 0.0))
        under_way.add_update(report, lag=lag)
    run.buffer.pop(under_way.step)
    _complete(run, batch, under_way)


def _keep(run: TrainingRun, batch: RolloutBatch, seen: SeenTokens, under_way: StepUnderWay) -> None:
    """Collective. Rank 0 writes down what the objective saw of the recorded responses in the mini-batch that was just trained."""
    parts = seen.gather(speaks=run.actor.speaks, group=run.control_group)
    if run.driver is not None and parts is not None:
        records = seen.records(
            parts,
            batch=batch,
            global_step=under_way.step,
            update=under_way.updates,
            policy_version=run.actor.policy_version - 1,
            objective=run.objective.name,
        )
        run.driver.keep_tokens(records)


def _complete(run: TrainingRun, batch: RolloutBatch, under_way: StepUnderWay) -> None:
    """Hold the measured lag against the promised one, count the batch, and turn the reports of its updates into metrics."""
    config, counters, lags, reports = run.config, run.counters, under_way.lags, under_way.reports
    promised = expected_lag(counters.trained_batches, staleness=config.staleness, updates_per_step=config.actor.updates_per_step)
    if (min(lags), max(lags)) != (promised.smallest, promised.largest):
        raise RuntimeError(
            f"batch of step {batch.sampled_at_step}: policy lag {min(lags)} to {max(lags)} updates, "
            f"staleness {config.staleness} promises {promised.smallest} to {promised.largest}"
        )
    tokens = sum(report.num_tokens for report in reports)
    counters.trained_batches += 1
    counters.rollouts_trained += len(batch.samples)
    counters.tokens_trained += tokens
    forget_files(run, batch)
    totals = add_metrics(report.metrics for report in reports)
    under_way.metrics |= finalize_metrics(totals)
    edges = BIN_EDGES.tolist()
    under_way.histograms = {name: Histogram(edges=edges, counts=counts) for name, counts in histogram_counts(totals).items()}
    under_way.metrics |= trained_metrics([report.routing for report in reports])
    under_way.metrics |= {
        "loss/total": sum(report.loss for report in reports) / len(reports),
        "update/grad_norm": sum(report.grad_norm for report in reports) / len(reports),
        "update/learning_rate": reports[-1].learning_rate,
        "batch/lag_min": min(lags),
        "batch/lag_max": max(lags),
        "batch/sampled_at_step": batch.sampled_at_step,
        "reward/trained": sum(sample.reward for sample in batch.samples) / len(batch.samples),
        "batch/tokens": tokens,
    }
    lags.clear()
    reports.clear()


def _rate(actor: ActorConfig, policy_version: int) -> LearningRate:
    rate, sample_size = training_rate(actor, policy_version), actor.optimizer.sample_size
    return rate if sample_size is None else lambda sums: rate * sample_size_factor(sample_size, sums)


def train_mini_batch(
    actor: MegatronActor,
    sequences: Sequence[TokenSequence],
    objective: Objective,
    *,
    lag: int,
    learning_rate: LearningRate,
    seen: SeenTokens | None = None,
) -> UpdateReport:
    """One optimizer step; before it, a forward pass for the few objectives that must know the whole mini-batch.

    Args:
        actor: trains.
        sequences: the mini-batch.
        objective: gives the loss.
        lag: whole global steps of training between the weights that sampled and the current ones.
        learning_rate: of the step.
        seen: takes what the objective sees of the recorded responses; None: none is recorded.
    """
    statistics = minibatch_statistics(actor, sequences, objective, lag=lag)
    loss_fn = make_loss_function(objective, statistics, lag=lag, seen=seen)
    return actor.update(sequences if seen is None else seen.mark(sequences), loss_fn, learning_rate=learning_rate)


def minibatch_statistics(
    actor: MegatronActor, sequences: Sequence[TokenSequence], objective: Objective, *, lag: int
) -> torch.Tensor | None:
    """What the objective must know of the whole mini-batch; None, and no forward pass, for all but a few."""
    if not objective.needs_minibatch_statistics:
        return None

    def statistics_fn(*, entropy_T: torch.Tensor, streams: Mapping[str, torch.Tensor], **tokens: Any) -> torch.Tensor:
        return objective.minibatch_statistics(TokenBatch(**tokens, **by_token(streams), lag=lag))

    return actor.sum_statistics(sequences, statistics_fn)


def make_loss_function(
    objective: Objective, statistics: torch.Tensor | None = None, *, lag: int | None = None, seen: SeenTokens | None = None
) -> LossFunction:
    """The actor's view of an objective, plus the entropy of the trained tokens. seen: looks at the recorded responses."""

    def loss_fn(
        *, entropy_T: torch.Tensor, streams: Mapping[str, torch.Tensor], **tokens: Any
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        batch = TokenBatch(**tokens, **by_token(streams), lag=lag)
        out = objective(batch, statistics)
        if seen is not None:
            seen.look(streams[MARK], batch, out, entropy_T)
        entropy = entropy_T[batch.loss_mask_T]
        return out.loss, {**out.metrics, "policy/entropy": torch.stack([entropy.sum(), entropy.new_tensor(len(entropy))])}

    return loss_fn


def by_token(streams: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The sequences' streams (batch/sample.py) as fields of a TokenBatch. The mark of recorded responses is none."""
    return {f"{name}_T": stream for name, stream in streams.items() if name != MARK}
