"""The loop: collect, delay, update, publish. Every rank runs it; what only one rank can do hangs on `Driver`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_minpro.batch import streams as batch_streams
from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.batch.staleness import StalenessBuffer, expected_lag
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.collector import Collected
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.loop.learning_rate import training_rate
from megatron_minpro.loop.logprob_gap import check_every_token, check_gap, gap_warning
from megatron_minpro.objectives import Objective, TokenBatch, add_metrics, finalize_metrics
from megatron_minpro.objectives.corrections import correct
from megatron_minpro.objectives.idle_clip import idle_clip
from parallel.actor import LocalTokens, LossFunction, LossOutput, MegatronActor, UpdateReport
from parallel.packing import TokenSequence
from parallel.weights import take_part
from rollout.client import RolloutFailed, WeightsMissing

log = logging.getLogger(__name__)
T = TypeVar("T")

_MOST_VOID_PUBLISHES = 3  # in a row, before a response is given up: whatever is wrong then will not pass


class ServersFailed(RuntimeError):
    """The servers gave no answer. Raised on all ranks together; nothing of the run's state has changed since the last global step."""


class Driver(Protocol):
    """What happens on rank 0 alone."""

    def collect(self, step: int, *, policy_version: int) -> Collected: ...
    def publish(self, policy_version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> str | None: ...
    def check_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None: ...
    def record(self, step: int, metrics: Mapping[str, float], trained: RolloutBatch | None) -> None: ...
    def evaluate(self, label: str, *, policy_version: int) -> Mapping[str, float]: ...


class Checkpoints(Protocol):
    """On every rank. `save` returns once the state is copied; `wait` when it is on disk. Both raise on all ranks together."""

    def save(self) -> None: ...
    def wait(self) -> None: ...
    def failure(self) -> str | None: ...


@dataclass(kw_only=True)
class TrainingRun:
    """Everything the loop works with. `driver` is None on all ranks but the first."""

    config: RunConfig
    actor: MegatronActor
    objective: Objective
    buffer: StalenessBuffer
    counters: RunCounters
    driver: Driver | None
    control_group: dist.ProcessGroup
    stop_requested: Callable[[], bool]  # asked on rank 0
    checkpoints: Checkpoints
    at_step: Callable[[int], None] = lambda step: None  # told that a global step begins
    reported: set[str] = field(default_factory=set)  # kinds of warnings that were given; each is given once


def train(run: TrainingRun) -> bool:
    """Run to the end, or until a stop is asked for. True when all batches are trained. Checkpoints are on disk when it returns.

    The last `staleness` global steps sample nothing: they train what is still waiting, so that nothing sampled is lost.
    Raises ServersFailed, with a checkpoint of the last whole step on disk.
    """
    try:
        return _train(run)
    except ServersFailed:
        run.checkpoints.save()
        run.checkpoints.wait()
        raise


def _train(run: TrainingRun) -> bool:
    config, counters = run.config, run.counters
    last_step = config.num_global_steps + config.staleness
    while counters.next_step < last_step:
        step = counters.next_step
        run.at_step(step)
        timer = PhaseTimer()
        metrics: dict[str, float] = {}
        if step < config.num_global_steps:
            batch = collect(run, step, timer, metrics)
            run.buffer.push(step, batch)
        due = run.buffer.pop(step)
        if due is not None:
            update(run, due, timer, metrics)
            with timer("sync"):
                publish(run)
        counters.next_step = step + 1
        for phase, seconds in timer.seconds.items():
            counters.seconds[phase] = counters.seconds.get(phase, 0.0) + seconds
            metrics[f"time/{phase}"] = seconds
        finish_step(run, step, due, metrics)
        done = counters.next_step == last_step
        every = 0 if config.evaluation is None else config.evaluation.every
        if every and counters.next_step % every == 0 and not done:
            evaluate(run, f"step_{counters.next_step:06d}")
        stopping, failure = share(run, (run.stop_requested(), run.checkpoints.failure()) if run.driver else None)
        if failure is not None:
            raise RuntimeError(failure)
        sampling_ends = counters.next_step == config.num_global_steps  # a longer run would go on differently from here
        if done or stopping or sampling_ends or counters.next_step % config.checkpoint.every == 0:
            start = time.perf_counter()
            run.checkpoints.save()
            counters.seconds["checkpoint"] = counters.seconds.get("checkpoint", 0.0) + time.perf_counter() - start
        if stopping and not done:
            run.checkpoints.wait()
            log.warning("stopped after global step %d, checkpoint written", step)
            return False
    run.checkpoints.wait()
    return True


def collect(run: TrainingRun, step: int, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """Sample a batch under the current weights and attach its behaviour log-probs. Raises ServersFailed."""
    with timer("sample"):
        collected = ask_servers(run, lambda driver: driver.collect(step, policy_version=run.actor.policy_version))
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
            log.warning("step %d: %d of %d responses could not be graded and count as wrong", step, errors, len(collected.judged))
    run.counters.rollouts_sampled += len(batch.samples) + num_dropped
    run.counters.rollouts_dropped += num_dropped
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


def update(run: TrainingRun, batch: RolloutBatch, timer: PhaseTimer, metrics: dict[str, float]) -> None:
    """Train the batch in mini-batches, one optimizer step each, and hold the measured lag against the promised one."""
    config, actor, counters = run.config, run.actor, run.counters
    updates = config.actor.updates_per_step
    promised = expected_lag(counters.trained_batches, staleness=config.staleness, updates_per_step=updates)
    lags: list[int] = []
    reports: list[UpdateReport] = []
    with timer("update"):
        for samples in batch.mini_batches(num_mini_batches=updates, seed=config.seed):
            lags.append(actor.policy_version - batch.policy_version)
            sequences = [sample.training_sequence() for sample in samples]
            statistics = minibatch_statistics(actor, sequences, run.objective)
            loss_fn = make_loss_function(run.objective, statistics)
            reports.append(actor.update(sequences, loss_fn, learning_rate=training_rate(config.actor, actor.policy_version)))
    if (min(lags), max(lags)) != (promised.smallest, promised.largest):
        raise RuntimeError(
            f"batch of step {batch.sampled_at_step}: policy lag {min(lags)} to {max(lags)} updates, "
            f"staleness {config.staleness} promises {promised.smallest} to {promised.largest}"
        )
    tokens = sum(report.num_tokens for report in reports)
    counters.trained_batches += 1
    counters.rollouts_trained += len(batch.samples)
    counters.tokens_trained += tokens
    metrics |= finalize_metrics(add_metrics(report.metrics for report in reports))
    metrics |= {
        "loss/total": sum(report.loss for report in reports) / len(reports),
        "update/grad_norm": sum(report.grad_norm for report in reports) / len(reports),
        "update/learning_rate": reports[-1].learning_rate,
        "batch/lag_min": min(lags),
        "batch/lag_max": max(lags),
        "batch/sampled_at_step": batch.sampled_at_step,
        "reward/trained": sum(sample.reward for sample in batch.samples) / len(batch.samples),
        "batch/tokens": tokens,
    }


def publish(run: TrainingRun) -> str | None:
    """Give the servers the actor's weights, under the actor's policy version; prove it when debug.check_weights is on.

    None, or on every rank why no server took them. Then nobody samples before they are published again (`ask_servers` does that).
    """
    failure = None
    if run.driver is not None:
        failure = run.driver.publish(run.actor.policy_version, run.actor.export_weights())
    else:
        take_part(run.actor.export_weights())
    failure = share(run, failure)
    if failure is not None:
        log.warning("weights are not published: %s", failure)
    elif run.config.debug.check_weights and run.driver is not None:
        run.driver.check_weights(run.actor.export_weights())
    elif run.config.debug.check_weights:
        take_part(run.actor.export_weights())
    return failure


def ask_servers(run: TrainingRun, ask: Callable[[Driver], T]) -> T | None:
    """`ask(driver)` on rank 0, None on the others.

    Where no server holds the actor's weights (all were restarted since), all ranks publish them and rank 0 asks again.
    Raises ServersFailed on all ranks when there is no answer, or when the weights cannot be published.
    """
    void_publishes = 0
    while True:
        answer, trouble = None, None
        if run.driver is not None:
            try:
                answer = ask(run.driver)
            except WeightsMissing as missing:
                trouble = ("publish again", str(missing))
            except RolloutFailed as failed:
                trouble = ("give up", str(failed))
        trouble = share(run, trouble)
        if trouble is None:
            return answer
        remedy, reason = trouble
        log.warning("%s: %s", remedy, reason)
        if remedy == "give up":
            raise ServersFailed(reason)
        failure = publish(run)
        void_publishes = 0 if failure is None else void_publishes + 1
        if failure is not None and void_publishes == _MOST_VOID_PUBLISHES:
            raise ServersFailed(failure)


def evaluate(run: TrainingRun, label: str) -> None:
    """Held-out measurement on rank 0 while the others wait. Raises ServersFailed."""
    start = time.perf_counter()
    ask_servers(run, lambda driver: driver.evaluate(label, policy_version=run.actor.policy_version))
    run.counters.seconds["evaluate"] = run.counters.seconds.get("evaluate", 0.0) + time.perf_counter() - start


def finish_step(run: TrainingRun, step: int, trained: RolloutBatch | None, metrics: dict[str, float]) -> None:
    """Write the step's metrics down. Throughput counts a response token once, in the step that trains it."""
    counters = run.counters
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    tokens = metrics.get("batch/tokens", 0.0)
    metrics |= {
        "policy/version": run.actor.policy_version,
        "total/batches_trained": counters.trained_batches,
        "batch/waiting": len(run.buffer),
        "total/rollouts_sampled": counters.rollouts_sampled,
        "total/rollouts_trained": counters.rollouts_trained,
        "total/rollouts_dropped": counters.rollouts_dropped,
        "time/step": seconds,
        "throughput/tokens_per_second": tokens / seconds if seconds else math.nan,  # a step may do nothing while the buffer fills
    }
    for kind, warning in (("idle clip", idle_clip(metrics)), ("log-prob gap", gap_warning(metrics, run.config))):
        if warning is not None and kind not in run.reported:
            log.warning("global step %d: %s", step, warning)
            run.reported.add(kind)
    if run.driver is not None:
        run.driver.record(step, metrics, trained)


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


def minibatch_statistics(actor: MegatronActor, sequences: Sequence[TokenSequence], objective: Objective) -> torch.Tensor | None:
    """What the objective must know of the whole mini-batch; None, and no forward pass, for all but a few."""
    if not objective.needs_minibatch_statistics:
        return None
    return actor.sum_statistics(sequences, lambda local: objective.minibatch_statistics(token_batch(local)))


def make_loss_function(objective: Objective, statistics: torch.Tensor | None = None) -> LossFunction:
    """The actor's view of an objective, plus the entropy of the trained tokens."""

    def loss_fn(local: LocalTokens) -> LossOutput:
        out = objective(token_batch(local), statistics)
        entropy = local.entropy_T[local.loss_mask_T]
        entropy_and_count = torch.stack([entropy.sum(), entropy.new_tensor(len(entropy))])
        return LossOutput(loss=out.loss, metrics={**out.metrics, "policy/entropy": entropy_and_count})

    return loss_fn


def token_batch(local: LocalTokens) -> TokenBatch:
    """The objective's record from the actor's."""
    return TokenBatch(
        logprobs_T=local.logprobs_T,
        behaviour_logprobs_T=local.streams["behaviour_logprobs"],
        advantages_T=local.streams["advantages"],
        correction_weights_T=local.streams.get("correction_weights"),
        loss_mask_T=local.loss_mask_T,
        shard=local.shard,
        global_tokens=local.global_tokens,
        global_sequences=local.global_sequences,
    )


def share(run: TrainingRun, value: T | None) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=run.control_group)
    return box[0]


class PhaseTimer:
    """Wall seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Count `seconds` of a phase under a name of their own."""
        self.seconds[phase] -= seconds
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with torch.profiler.record_function(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
