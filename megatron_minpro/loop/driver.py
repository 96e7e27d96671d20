"""What rank 0 does for all: asks the sampler, publishes weights, writes down."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.loop.sampler import Sampler
from megatron_minpro.loop.server_weights import ServerWeights
from megatron_minpro.tracking.late_files import LateFiles
from megatron_minpro.tracking.progress import PROGRESS_FILE, Progress, write_progress
from megatron_minpro.tracking.rollout_log import read_rollouts, rollout_file
from megatron_minpro.tracking.sampled_count import SAMPLED_FILE, write_sampled
from megatron_minpro.tracking.step_details import Histogram, StepDetails
from megatron_minpro.tracking.token_records import TokenRecords, token_file, write_token_records
from megatron_minpro.tracking.tracker import RunTracker
from rollout.weights.weight_sync import WeightSyncFailed

log = logging.getLogger(__name__)

_SHOWN_RESPONSES = 3  # in trackers, of a batch: each of another prompt


@dataclass(kw_only=True)
class RunDriver:
    """The `training_run.Driver` of a real run."""

    config: RunConfig
    run_dir: Path
    sampler: Sampler
    weights: ServerWeights
    tracker: RunTracker
    files: LateFiles
    cursor: Mapping[str, Any]  # of the prompts, behind the last batch that was taken in: what a checkpoint keeps
    trained_batches: int = 0
    restarts_reported: int = 0
    phase: str = "sample"  # what the trainer does
    activity: str = ""  # what the servers do beside it
    telling: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, step: int) -> None:
        """The prompts of a batch, while others are under way: batches are drawn in the order of their steps."""
        self.sampler.draw(step)

    def collect(self, step: int, *, policy_version: int) -> SampledBatch:
        """The batch of one global step. Raises what the sampler raises."""
        sampled = self.sampler.collect(step, policy_version=policy_version)
        with self.telling:  # two batches may end at the same time
            restarts = self.weights.num_restarts - self.restarts_reported
            self.restarts_reported += restarts
        return replace(sampled, metrics={**sampled.metrics, "servers/restarts": float(restarts)})

    def taken_in(self, *, cursor: Mapping[str, Any], rollouts_sampled: int) -> None:
        """A batch is the trainer's now.

        Args:
            cursor: of the prompts, behind this batch. Until now a checkpoint would have drawn them again.
            rollouts_sampled: so far, over all attempts. Kept before the step's metrics are: what an interruption loses is counted.
        """
        self.cursor = cursor
        self.files.write(SAMPLED_FILE, lambda: write_sampled(self.run_dir, rollouts_sampled))

    def publish(self, policy_version: int, tensors: Iterator[tuple[str, Tensor]]) -> str | None:
        """Weights for the servers. None, or why no server took them; the tensors are used up in any case."""
        try:
            self.weights.publish(policy_version, tensors)
        except WeightSyncFailed as failure:
            deque(tensors, maxlen=0)  # the other ranks take part in the export to its end
            return str(failure)
        return None

    def check_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Raises ChecksumMismatch where a server holds others than these, those of the latest publish."""
        self.weights.check(tensors)

    def record(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """One line of metrics; histograms and a few responses of the batch that was trained for the trackers that take them."""
        self.tracker.log(step, metrics)
        if "batch/sampled_at_step" in metrics and self.tracker.takes_details:
            sampled = rollout_file(self.run_dir, int(metrics["batch/sampled_at_step"]))  # by the sampling process, before it gave the batch
            first_of_groups = [number * self.config.rollout.group_size for number in range(_SHOWN_RESPONSES)]
            self.tracker.log_details(step, StepDetails(histograms=histograms, responses=read_rollouts(sampled, first_of_groups)))
        self.trained_batches = int(metrics["total/batches_trained"])
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def keep_tokens(self, records: TokenRecords) -> None:
        """One file for people to look into."""
        name = token_file(self.run_dir, global_step=records.global_step, update=records.update).name
        self.files.write(name, lambda: write_token_records(self.run_dir, records), may_be_lost=True)

    def evaluate(self, label: str, *, policy_version: int) -> dict[str, float]:
        """Measure held-out pass@k, keep it as evaluation_<label>.json."""
        result = self.sampler.measure(policy_version=policy_version)
        path = self.run_dir / f"evaluation_{label}.json"
        text = json.dumps({**result, "policy_version": policy_version}, indent=2) + "\n"
        self.files.write(path.name, lambda: write_atomically(path, text))
        log.info("held out, %s (policy version %d): %s", label, policy_version, result)
        return result

    def heartbeat(self, phase: str) -> None:
        """Tell the console what the trainer does."""
        with self.telling:  # one thread trains, another one waits for a batch
            self.phase = phase
            self._tell()

    def beside(self, activity: str) -> None:
        """Tell the console what the servers do meanwhile; "" when nothing."""
        with self.telling:
            self.activity = activity
            self._tell()

    def close(self) -> None:
        """End the sampler and the way of the weights. Raises OSError for files that cannot be written."""
        self.sampler.close()
        self.weights.close()
        self.files.flush()

    def _tell(self) -> None:
        progress = Progress(phase=self.phase, global_step=self.trained_batches, beside=self.activity)
        self.files.write(PROGRESS_FILE, lambda: write_progress(self.run_dir, progress), may_be_lost=True)
