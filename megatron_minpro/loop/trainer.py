"""The parts of a global step, and the serial schedule: sample, score, delay, update, publish. Every rank runs them.

`Driver` is what rank 0 does for all. overlapped.py arranges the same parts so that sampling and training run at the same time.
"""

from __future__ import annotations

import logging
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
from megatron_minpro.loop.counters import HalfStep, RunCounters
from megatron_minpro.loop.idle import idle_metrics
from megatron_minpro.loop.learning_rate import training_rate
from megatron_minpro.loop.logprob_gap import check_every_token, check_gap, gap_warning
from megatron_minpro.objectives import Objective, TokenBatch, add_metrics, finalize_metrics
from megatron_minpro.objectives.corrections import correct
from megatron_minpro.objectives.idle_clip import idle_clip
from parallel.actor import LossFunction, MegatronActor, UpdateReport
from parallel.packing import TokenSequence
from parallel.weights import take_part
from rollout.client import RolloutFailed, WeightsMissing

log = logging.getLogger(__name__)
T = TypeVar("T")

_MOST_FAILED_PUBLISHES = 3  # in a row, before a response is given up: whatever is wrong then will not pass


class ServersFailed(RuntimeError):
    """The servers gave no answer. Raised on all ranks together. The state is that of the last whole global step, or of half a step."""

    half_step: HalfStep | None = None  # set where the step's update is done and its batch is missing


class Driver(Protocol):
    """What happens on rank 0 alone."""

    def collect(self, step: int, *, policy_version: int) -> Collected: ...
    def publish(self, policy_version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> str | None: ...
    def check_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None: ...
    def record(self, step: int, metrics: Mapping[str, float], trained: RolloutBatch | None) -> None: ...
    def evaluate(self, label: str, *, policy_version: int) -> Mapping[str, float]: ...
    def hold_cursor(self) -> None: ...  # a checkpoint that is made from now on draws the prompts of the batch under way again
    def release_cursor(self) -> None: ...
    def heartbeat(self, phase: str) -> None: ...  # what the trainer does now
    def count_sampled(self, rollouts_sampled: int) -> None: ...  # so far, over all attempts


class Checkpoints(Protocol):
    """On every rank. `save` returns once the state is copied; `wait` when it is on disk. Both raise on all ranks together."""

    def save(self, half_step: HalfStep | None = None) -> None: ...
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

    @property
    def last_step(self) -> int:
        """The global step at which nothing is left to train."""
        return self.config.num_global_steps + self.config.staleness

    def timer(self) -> PhaseTimer:
        """The clock of a global step that begins now. Rank 0 tells the console of each phase."""
        return PhaseTimer(_say_nothing if self.driver is None else self.driver.heartbeat)

    def evaluation_label(self, step: int) -> str | None:
        """The name of the held-out measurement that is due before global step `step`; None where none is."""
        every = 0 if self.config.evaluation is None else self.config.evaluation.every
        return f"step_{step:06d}" if every and step % every == 0 and 0 < step < self.last_step else None

    def checkpoint_is_due(self, step: int) -> bool:
        """Whether the state before global step `step` is saved. Where sampling ends a longer run would go on differently."""
        return step % self.config.checkpoint.every == 0 or step in (self.config.num_global_steps, self.last_step)

    def needs_publish(self, step: int) -> bool:
        """Whether somebody asks the servers for the weights that global step `step` ends with."""
        return step + 1 < self.config.num_global_steps or step + 1 == self.last_step or self.evaluation_label(step + 1) is not None


def train_serially(run: TrainingRun) -> bool:
    """Sample, score, update and publish, one after the other. True when all batches are trained, False after a stop.

    The last `staleness` global steps sample nothing: they train what is still waiting, so that nothing sampled is lost.
    Raises ServersFailed.
    """
    config, counters = run.config, run.counters
    while counters.next_step < run.last_step:
        step = counters.next_step
        run.at_step(step)
        timer = run.timer()
        metrics: dict[str, float] = {}
        if step < config.num_global_steps:
            batch = collect(run, step, timer, metrics)
            run.buffer.push(step, batch)
        due = run.buffer.pop(step)
        if due is not None:
            update(run, due, timer, metrics)
            if run.needs_publish(step):
                with timer("sync"):
                    publish(run)
        counters.next_step = step + 1
        finish_step(run, step, due, timer, metrics)
        done = counters.next_step == run.last_step
        if (label := run.evaluation_label(counters.next_step)) is not None:
            evaluate(run, label)
        stopping = stop_requested(run)
        if stopping or run.checkpoint_is_due(counters.next_step):
            save(run)
        if stopping and not done:
            run.checkpoints.wait()
            log.warning("stopped after global step %d, checkpoint written", step)
            return False
    run.checkpoints.wait()
    return True


def stop_requested(run: TrainingRun) -> bool:
    """Collective. Whether rank 0 was asked to stop. Raises RuntimeError on all ranks when a checkpoint could not be written."""
    stopping, failure = share(run, (run.stop_requested(), run.checkpoints.failure()) if run.driver else None)
    if failure is not None:
        raise RuntimeError(failure)
    return stopping


def save(run: TrainingRun) -> None:
    """Begin to write a checkpoint; the pause is counted."""
    start = time.perf_counter()
    run.checkpoints.save()
    run.counters.add_seconds("checkpoint", time.perf_counter() - start)


def collect(run: TrainingRun, step: int, timer: PhaseTimer, metrics: dict[str, float]) -> RolloutBatch:
    """Sample a batch under the current weights and attach its behaviour log-probs. Raises ServersFailed."""
    with timer("sample"):
        collected = ask_servers(run, lambda driver: driver.collect(step, policy_version=run.actor.policy_version))
        batch = take_in(run, collected, timer, metrics)
    return score(run, batch, timer, metrics)


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


def ask_servers(run: TrainingRun, ask: Callable[[Driver], T], *, policy_version: int | None = None) -> T | None:
    """Collective. `ask(driver)` on rank 0, None on the others.

    Where no server holds the wanted weights (all were restarted since), all ranks publish them and rank 0 asks again.

    Args:
        run: the run.
        ask: called on rank 0, again after each publish.
        policy_version: of the weights that are asked: the actor's, or the kept ones; None: the actor's.

    Raises:
        ServersFailed: on all ranks, when there is no answer, or when the weights cannot be published.
    """
    failed_publishes = 0
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
        with weights_of(run, run.actor.policy_version if policy_version is None else policy_version):
            failure = publish(run)
        failed_publishes = 0 if failure is None else failed_publishes + 1
        if failure is not None and failed_publishes == _MOST_FAILED_PUBLISHES:
            raise ServersFailed(failure)


@contextmanager
def weights_of(run: TrainingRun, policy_version: int) -> Iterator[None]:
    """Inside the block the actor has the weights of that version: its own, or the kept ones. Raises RuntimeError when it has neither."""
    if policy_version == run.actor.policy_version:
        yield
    elif policy_version == run.actor.kept_version:
        with run.actor.kept_weights():
            yield
    else:
        raise RuntimeError(
            f"policy version {policy_version} is wanted; the actor is at {run.actor.policy_version} and keeps {run.actor.kept_version}"
        )


def evaluate(run: TrainingRun, label: str) -> None:
    """Held-out measurement on rank 0 while the others wait. Raises ServersFailed."""
    start = time.perf_counter()
    ask_servers(run, lambda driver: driver.evaluate(label, policy_version=run.actor.policy_version))
    run.counters.add_seconds("evaluate", time.perf_counter() - start)


def finish_step(run: TrainingRun, step: int, trained: RolloutBatch | None, timer: PhaseTimer, metrics: dict[str, float]) -> None:
    """Write the step's metrics down. Throughput counts a response token once, in the step that trains it."""
    counters = run.counters
    seconds = timer.wall_s()
    for phase, duration in timer.seconds.items():
        counters.add_seconds(phase, duration)
        metrics[f"time/{phase}"] = duration
    metrics |= {
        "policy/version": run.actor.policy_version,
        "total/batches_trained": counters.trained_batches,
        "batch/waiting": len(run.buffer),
        "total/rollouts_sampled": counters.rollouts_sampled,
        "total/rollouts_trained": counters.rollouts_trained,
        "total/rollouts_dropped": counters.rollouts_dropped,
        "time/step": seconds,
        "throughput/tokens_per_second": metrics.get("batch/tokens", 0.0) / seconds,
        **idle_metrics(timer.seconds, wall_s=seconds, overlapped=run.config.effective_schedule == "overlapped"),
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

    def statistics_fn(*, entropy_T: torch.Tensor, streams: Mapping[str, torch.Tensor], **tokens: Any) -> torch.Tensor:
        return objective.minibatch_statistics(TokenBatch(**tokens, **by_token(streams)))

    return actor.sum_statistics(sequences, statistics_fn)


def make_loss_function(objective: Objective, statistics: torch.Tensor | None = None) -> LossFunction:
    """The actor's view of an objective, plus the entropy of the trained tokens."""

    def loss_fn(
        *, entropy_T: torch.Tensor, streams: Mapping[str, torch.Tensor], **tokens: Any
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        batch = TokenBatch(**tokens, **by_token(streams))
        out = objective(batch, statistics)
        entropy = entropy_T[batch.loss_mask_T]
        return out.loss, {**out.metrics, "policy/entropy": torch.stack([entropy.sum(), entropy.new_tensor(len(entropy))])}

    return loss_fn


def by_token(streams: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The sequences' streams (batch/sample.py) as fields of a TokenBatch."""
    return {f"{name}_T": stream for name, stream in streams.items()}


def share(run: TrainingRun, value: T | None) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=run.control_group)
    return box[0]


def _say_nothing(phase: str) -> None:
    """Where nobody is told."""


class PhaseTimer:
    """Wall seconds of one step, and of its phases. Phases may overlap: their sum is no time."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """tell: called with the name of each phase when it begins."""
        self.seconds: dict[str, float] = {}
        self._tell = tell
        self._started_at = time.perf_counter()
        self._wall_s: float | None = None

    def stop(self) -> None:
        """The step ends now; what is measured later still counts for its phases."""
        self._wall_s = time.perf_counter() - self._started_at

    def wall_s(self) -> float:
        """From the beginning of the step to `stop`, or to now."""
        return time.perf_counter() - self._started_at if self._wall_s is None else self._wall_s

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Count `seconds` of a phase under a name of their own."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) - seconds
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self._tell(phase)
        with torch.profiler.record_function(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
