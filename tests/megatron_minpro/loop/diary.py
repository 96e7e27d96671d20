"""A training run whose actor, servers and checkpoints only keep a diary. For the tests of the two schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.loop.collector import Collected
from megatron_minpro.loop.counters import RunCounters, UnfinishedStep
from megatron_minpro.loop.sampled_batch import SampledBatch, sampled_batch
from megatron_minpro.loop.training_run import TrainingRun
from megatron_minpro.objectives import make_objective
from megatron_minpro.tracking.metrics_table import check_declared
from megatron_minpro.tracking.step_details import Histogram
from parallel.actor import LearningRate, UpdateReport
from parallel.routing_replay import RowSink
from parallel.token_sequence import TokenSequence

REPOSITORY = Path(__file__).resolve().parents[3]
UPDATES = 2
SMALL = (
    "num_global_steps=4",
    "staleness=2",
    f"actor.updates_per_step={UPDATES}",
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "checkpoint.every=3",
    "rollout.logprob_gap_action=warn",  # the numbers below are not those of one model
    "tracking.token_groups=0",  # the actor below shows no tokens to the loss
)
MakeBatch = Callable[..., RolloutBatch]
MakeSample = Callable[..., Sample]


def small_config(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [*SMALL, *overrides])


class FakeActor:
    """Scores every position with -(policy version + 1) / 8, exact in fp32, and counts updates."""

    def __init__(self, diary: list[tuple], policy_version: int = 0) -> None:
        self.diary = diary
        self.policy_version = policy_version
        self.kept_version: int | None = None
        self.trained: list[tuple[int, set[float]]] = []  # policy version met, behaviour log-probs seen
        self.learning_rates: list[float] = []
        self.corrections: list[float] = []
        self.entropies: list[float] = []
        self.weight_sums: dict[str, torch.Tensor] = {}  # of every mini-batch, for a rate that follows them
        self.unit_ratios = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def logprobs(
        self, sequences: Sequence[TokenSequence], *, record: RowSink | None = None, entropies: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        self.diary.append(("score", self.policy_version))
        if entropies is not None:
            entropies += [torch.full((sequence.num_positions,), (self.policy_version + 1) / 4) for sequence in sequences]
        return [torch.full((sequence.num_positions,), -(self.policy_version + 1) / 8) for sequence in sequences]

    def update(self, minibatch: Sequence[TokenSequence], loss_fn: Any, *, learning_rate: LearningRate) -> UpdateReport:
        rate = learning_rate(self.weight_sums) if callable(learning_rate) else learning_rate
        seen = {x for sequence in minibatch for x in sequence.streams["behaviour_logprobs"][sequence.loss_mask].tolist()}
        self.trained.append((self.policy_version, seen))
        self.learning_rates.append(rate)
        for sequence in minibatch:
            if "behaviour_entropies" in sequence.streams:
                self.entropies += sequence.streams["behaviour_entropies"][sequence.loss_mask].tolist()
            if "correction_weights" in sequence.streams:
                self.corrections += sequence.streams["correction_weights"][sequence.loss_mask].tolist()
        self.diary.append(("update", self.policy_version))
        self.policy_version += 1
        tokens = sum(int(sequence.loss_mask.sum()) for sequence in minibatch)
        return UpdateReport(
            loss=float(self.policy_version),
            grad_norm=0.5,
            learning_rate=rate,
            policy_version=self.policy_version,
            num_tokens=tokens,
            metrics={
                "policy/entropy": torch.tensor([float(self.policy_version), 1.0], dtype=torch.float64),
                "ratio/unit": self.unit_ratios,
            },
        )

    def keep_weights(self, *, place: str) -> None:
        self.diary.append(("keep", self.policy_version))
        self.kept_version = self.policy_version

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        assert self.kept_version is not None
        latest, self.policy_version = self.policy_version, self.kept_version
        yield
        self.policy_version = latest

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", torch.tensor(float(self.policy_version))


class FakeDriver:
    """Samples numbered batches under the version it is told; writes down everything."""

    def __init__(self, diary: list[tuple], make_batch: MakeBatch, *, dynamic_sampling: bool) -> None:
        self.diary = diary
        self.make_batch = make_batch
        self.dynamic_sampling = dynamic_sampling
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.fields: Callable[[int], dict[str, Any]] = lambda policy_version: {}
        self.num_dropped = 0  # samples of every batch that go to the dropped ones
        self.asked = self.published = 0
        self.cursor: Mapping[str, Any] = {"behind": None}
        self.phases: list[str] = []
        self.activities: list[str] = []  # of the servers, beside the trainer
        self.sampled: dict[int, int] = {}  # responses counted, by the number of metrics lines written until then
        self.trouble: dict[int, Exception] = {}  # by the number of the call that asks the servers for something
        self.void: dict[int, str] = {}  # by the number of the publish: why no server took the weights

    def ask(self) -> None:
        self.asked += 1
        if self.asked in self.trouble:
            raise self.trouble[self.asked]

    def draw(self, step: int) -> None:
        self.diary.append(("draw", step))

    def collect(self, step: int, *, policy_version: int) -> SampledBatch:
        self.diary.append(("sample", step, policy_version))
        self.ask()
        batch = self.make_batch(step, groups=4, version=policy_version, behaviour_logprobs=None, **self.fields(policy_version))
        kept, dropped = batch.samples[self.num_dropped :], batch.samples[: self.num_dropped]
        collected = Collected(
            batch=replace(batch, samples=kept),
            judged=(),
            reward_s=0.0,
            cursor={"behind": step},
            dropped=dropped,
            rounds=2,
            equal_groups=1,
        )
        return sampled_batch(collected, dynamic_sampling=self.dynamic_sampling)

    def taken_in(self, *, cursor: Mapping[str, Any], rollouts_sampled: int) -> None:
        self.cursor = cursor
        self.sampled[len(self.lines)] = rollouts_sampled

    def beside(self, activity: str) -> None:
        if activity:
            self.activities.append(activity)

    def heartbeat(self, phase: str) -> None:
        self.phases.append(phase)

    def publish(self, policy_version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> str | None:
        self.diary.append(("publish", policy_version, [float(tensor) for _, tensor in tensors]))
        self.published += 1
        return self.void.get(self.published)

    def check_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.diary.append(("check", [float(tensor) for _, tensor in tensors]))

    def record(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        check_declared(metrics)
        self.diary.append(("record", step, metrics.get("batch/sampled_at_step")))
        self.lines.append((step, dict(metrics)))

    def evaluate(self, label: str, *, policy_version: int) -> dict[str, float]:
        self.diary.append(("evaluate", label, policy_version))
        self.ask()
        return {}


class FakeCheckpoints:
    """Notes when a checkpoint begins and when somebody waits for it. `missing`: what the disk says then."""

    def __init__(self, lines: list[tuple], next_step: Callable[[], int]) -> None:
        self.lines = lines
        self.next_step = next_step
        self.latest: UnfinishedStep | None = None  # of the newest checkpoint
        self.missing: str | None = None
        self.seconds: Callable[[], float | None] = lambda: None

    def save(self, unfinished: UnfinishedStep | None) -> None:
        self.latest = unfinished
        self.lines.append(("save", self.next_step()) if unfinished is None else ("save inside", self.next_step(), unfinished))

    def wait(self) -> None:
        self.lines.append(("wait",))
        if self.missing is not None:
            raise RuntimeError(self.missing)


class Diary:
    """A run whose every call across the process border is kept in `lines`."""

    def __init__(self, config: RunConfig, group: Any, make_batch: MakeBatch, *, policy_version: int = 0, stop_after: int | None = None):
        self.lines: list[tuple] = []
        self.actor = FakeActor(self.lines, policy_version)
        self.driver = FakeDriver(self.lines, make_batch, dynamic_sampling=config.rollout.dynamic_sampling is not None)
        self.run = TrainingRun(
            config=config,
            actor=self.actor,  # type: ignore[arg-type]
            objective=make_objective(config.objective.name, **config.objective.options),
            buffer=StalenessBuffer(config.staleness),
            counters=RunCounters(),
            driver=self.driver,  # type: ignore[arg-type]
            control_group=group,
            stop_requested=lambda: stop_after is not None and self.run.counters.next_step > stop_after,
            checkpoints=FakeCheckpoints(self.lines, lambda: self.run.counters.next_step),
        )

    def continued(self, config: RunConfig, **options: Any) -> Diary:
        """Another attempt, which begins with the state that this one saved last, as it is now."""
        later = Diary(config, self.run.control_group, self.driver.make_batch, policy_version=self.actor.policy_version, **options)
        later.actor.kept_version = self.actor.kept_version
        later.driver.num_dropped = self.driver.num_dropped
        later.run.counters = replace(self.run.counters)
        later.run.buffer.restore(self.run.buffer.waiting())
        return later

    @property
    def unfinished(self) -> UnfinishedStep | None:
        """What the newest checkpoint says of a step under way."""
        return self.run.checkpoints.latest  # type: ignore[attr-defined]
