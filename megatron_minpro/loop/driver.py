"""What rank 0 does for all: samples, publishes weights, measures, writes down."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_convert.atomic_files import write_atomically
from checkpoints_convert.dtypes import DTYPES
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.config import RunConfig
from megatron_minpro.loop import held_out
from megatron_minpro.loop.collector import Collected, Collector
from megatron_minpro.loop.responder import Responder
from megatron_minpro.tracking.progress import Progress, write_progress
from megatron_minpro.tracking.rollout_log import RolloutLog, RolloutRecord
from megatron_minpro.tracking.sampled_count import write_sampled
from megatron_minpro.tracking.tracker import RunTracker
from rollout.sglang.control import ServerRefused
from rollout.weights.weight_sync import WeightSync, WeightSyncFailed, check_equal, expected_checksums

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunDriver:
    """The `training_run.Driver` of a real run."""

    config: RunConfig
    run_dir: Path
    collector: Collector
    responder: Responder
    weight_sync: WeightSync
    api_key: str | None
    admin_key: str | None
    held_out_prompts: list[Prompt]
    tracker: RunTracker
    rollouts: RolloutLog | None
    trained_batches: int = 0
    published_to: tuple[str, ...] = ()
    restarts_reported: int = 0
    held_cursor: dict[str, Any] | None = None  # set while a batch is sampled beside the trainer
    phase: str = "sample"  # what the trainer does, and the servers with it unless they have an activity of their own
    beside: str = ""  # what the servers do meanwhile
    telling: threading.Lock = field(default_factory=threading.Lock)

    def hold_cursor(self) -> None:
        """A batch is about to be sampled in another thread: a checkpoint that is made meanwhile draws its prompts again."""
        self.held_cursor = self.collector.cursor.state()

    def release_cursor(self) -> None:
        """The batch is there."""
        self.held_cursor = None

    def cursor_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the prompt cursor."""
        return self.collector.cursor.state() if self.held_cursor is None else self.held_cursor

    def collect(self, step: int, *, policy_version: int) -> Collected:
        """The batch of one global step; kept for people to read. Raises what the client raises."""
        with self._activity("sample"):
            collected = self.collector.collect(step, policy_version=policy_version)
        restarts = self.weight_sync.num_restarts - self.restarts_reported
        self.restarts_reported += restarts
        collected = replace(collected, servers={**collected.servers, "servers/restarts": float(restarts)})
        if self.rollouts is not None:
            self.rollouts.write(step, _records(collected))
        return collected

    def count_sampled(self, rollouts_sampled: int) -> None:
        """Kept before the step's metrics are: what an interruption loses in between is counted."""
        write_sampled(self.run_dir, rollouts_sampled)

    def publish(self, policy_version: int, tensors: Iterator[tuple[str, Tensor]]) -> str | None:
        """Weights into every server that answers. None, or why no server took them; the tensors are used up in any case."""
        try:
            self.published_to = self.weight_sync.publish(policy_version, tensors)
        except WeightSyncFailed as failure:
            deque(tensors, maxlen=0)  # the other ranks take part in the export to its end
            return str(failure)
        return None

    def check_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Raises ChecksumMismatch unless every server that took the weights and still answers holds exactly these."""
        expected = expected_checksums(tensors, dtype=DTYPES[self.config.rollout.dtype])
        num_checked = 0
        for endpoint in self.published_to:
            try:
                check_equal(expected, endpoint, api_key=self.api_key, admin_key=self.admin_key)
            except ServerRefused as refused:
                if refused.status is not None:
                    raise
                log.warning("weights are not checked: %s", refused)
            else:
                num_checked += 1
        log.info("weights of %d server(s) equal the actor's: %d parameters", num_checked, len(expected))

    def record(self, step: int, metrics: Mapping[str, float], trained: RolloutBatch | None) -> None:
        """One line of metrics."""
        self.tracker.log(step, metrics)
        self.trained_batches = int(metrics["total/batches_trained"])
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def evaluate(self, label: str, *, policy_version: int) -> dict[str, float]:
        """Measure held-out pass@k, keep it as evaluation_<label>.json."""
        assert self.config.evaluation is not None
        with self._activity(f"evaluation {label}"):
            result = held_out.measure(
                self.held_out_prompts,
                self.config.evaluation,
                responder=self.responder,
                max_new_tokens=self.config.rollout.max_new_tokens,
                seed=self.config.seed,
                policy_version=policy_version,
            )
        write_atomically(
            self.run_dir / f"evaluation_{label}.json", json.dumps({**result, "policy_version": policy_version}, indent=2) + "\n"
        )
        log.info("held out, %s (policy version %d): %s", label, policy_version, result)
        return result

    def heartbeat(self, phase: str) -> None:
        """Tell the console what the trainer does."""
        with self.telling:  # one thread trains, another samples
            self.phase = phase
            self._tell()

    @contextmanager
    def _activity(self, name: str) -> Iterator[None]:
        """The servers do something: beside the trainer, or while it waits."""
        if self.held_cursor is None:
            self.heartbeat(name)
            yield
            return
        self._tell_beside(name)
        try:
            yield
        finally:
            self._tell_beside("")

    def _tell_beside(self, name: str) -> None:
        with self.telling:
            self.beside = name
            self._tell()

    def _tell(self) -> None:
        write_progress(self.run_dir, Progress(phase=self.phase, global_step=self.trained_batches, beside=self.beside))


def _records(collected: Collected) -> list[RolloutRecord]:
    num_trained = len(collected.batch.samples)
    samples = (*collected.batch.samples, *collected.dropped)
    return [
        RolloutRecord(
            prompt_id=conversation.prompt.prompt_id,
            prompt=conversation.prompt.text,
            response=conversation.text,
            answer=conversation.prompt.answer,
            extracted=result.extracted,
            error=result.error,
            reward=result.reward,
            advantage=sample.advantage,
            policy_version=sample.policy_versions[1],
            finish_reason=sample.finish_reason,
            num_response_tokens=sample.num_response_tokens,
            dropped=None if number < num_trained else "dynamic sampling: its group's responses are all equal",
        )
        for number, ((conversation, result), sample) in enumerate(zip(collected.judged, samples, strict=True))
    ]
