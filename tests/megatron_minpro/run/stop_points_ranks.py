"""Run by rank_pool.py for test_stop_points.py: real actors and real checkpoints; what samples is a function of seed, step and version.

Argument: FOLDER, with FOLDER/config.yaml and the model that it names. For each schedule a run is left alone; another one saves its state
wherever it looks for a stop; then each of these checkpoints is continued by a new actor. FOLDER/found_RANK.json says what came out.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.batch.streams import pack
from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.loop.schedule import train
from megatron_minpro.loop.servers import publish, weights_of
from megatron_minpro.loop.training_run import TrainingRun
from megatron_minpro.objectives import make_objective
from megatron_minpro.run import run_state
from megatron_minpro.run.checkpoint_writer import CheckpointWriter
from megatron_minpro.run.worker import RunCheckpoints, build_actor
from megatron_minpro.tracking.step_details import Histogram
from megatron_minpro.tracking.token_records import TokenRecords
from parallel import process_groups
from parallel.actor import MegatronActor
from parallel.process_groups import ProcessGroups
from rollout.records import VersionSpan

CASES = {
    "serial": ("schedule=serial",),
    "overlapped": (),
    "rolling": ("rollout.servers=2", "rollout.publish=rolling"),
}


class Driver:
    """Rank 0's part. Its batches depend on the step, and on the weights that were published under the version that samples it."""

    def __init__(self, config: RunConfig, cursor: Mapping[str, Any]) -> None:
        self.config = config
        self.cursor = cursor
        self.published: dict[int, str] = {}  # digest by policy version
        self.lines: list[dict[str, Any]] = []
        self.tokens: dict[str, str] = {}  # global step and update -> digest of the token records

    def collect(self, step: int, *, policy_version: int) -> SampledBatch:
        digest = int(self.published[policy_version], 16)
        generator = torch.Generator().manual_seed((digest + step) % 2**63)
        rollout, samples = self.config.rollout, []
        for number in range(rollout.prompts_per_step * rollout.group_size):
            length = int(torch.randint(3, 9, (), generator=generator))
            samples.append(
                Sample(
                    sample_id=f"step{step}-{number}",
                    token_ids=torch.randint(0, 20, (2 + length,), generator=generator, dtype=torch.int32),
                    loss_mask=torch.tensor([False] * 2 + [True] * length),
                    engine_logprobs=-torch.rand(length, generator=generator),
                    behaviour_logprobs=None,
                    version_spans=(VersionSpan(policy_version=policy_version, start=0, end=length),),
                    finish_reason="stop",
                    reward=float(number % 2),
                    correct=number % 2 == 1,
                    advantage=float(torch.randn((), generator=generator)),
                )
            )
        batch = RolloutBatch(sampled_at_step=step, policy_version=policy_version, group_size=rollout.group_size, samples=tuple(samples))
        return SampledBatch(batch=pack(batch), num_dropped=0, reward_s=0.0, metrics={}, cursor={"behind": step})

    def publish(self, policy_version: int, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.published[policy_version] = digest_of(tensors)

    def record(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        same = {name: value for name, value in metrics.items() if not name.startswith(("time/", "throughput/"))}
        self.lines.append({"global_step": step, **same})

    def keep_tokens(self, records: TokenRecords) -> None:
        names = [response.sample_id for response in records.responses]
        digest = digest_of((f"{names} {name}", torch.from_numpy(values)) for name, values in sorted(records.streams.items()))
        self.tokens[f"{records.global_step} {records.update}"] = digest

    def taken_in(self, *, cursor: Mapping[str, Any], rollouts_sampled: int) -> None:
        self.cursor = cursor

    def draw(self, step: int) -> None: ...
    def check_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> None: ...
    def evaluate(self, label: str, *, policy_version: int) -> Mapping[str, float]: ...
    def heartbeat(self, phase: str) -> None: ...
    def beside(self, activity: str) -> None: ...


def digest_of(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """Of every bit of them."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def attempt(
    config: RunConfig, groups: ProcessGroups, actor: MegatronActor, directory: Path, checkpoint: Path
) -> tuple[dict[str, Any], int]:
    """One run to its end, from a checkpoint. What came out on rank 0, and the first line of metrics in it."""
    actor.kept_version = None  # of a new actor
    saved = run_state.load(checkpoint, actor=actor, config=config)
    counters, unfinished, buffer = saved.counters, saved.unfinished, StalenessBuffer(config.staleness)
    buffer.restore(saved.waiting)
    first_line = counters.next_step
    driver = Driver(config, saved.cursor) if groups.coordinates.rank == 0 else None
    writer = new_writer(directory, groups)
    run = TrainingRun(
        config=config,
        actor=actor,
        objective=make_objective(config.objective.name, **config.objective.options),
        buffer=buffer,
        counters=counters,
        driver=driver,
        control_group=groups.control,
        stop_requested=lambda: False,
        checkpoints=RunCheckpoints(writer=writer, config=config, actor=actor, counters=counters, buffer=buffer, driver=driver),
    )
    with weights_of(run, actor.policy_version if actor.kept_version is None else actor.kept_version):
        publish(run)
    assert train(run, unfinished=unfinished)
    return outcome(actor, driver, counters), first_line


def new_writer(directory: Path, groups: ProcessGroups) -> CheckpointWriter:
    """It keeps all checkpoints."""
    directory.mkdir(exist_ok=True)
    return CheckpointWriter(directory, run_dir=directory, keep=1000, control_group=groups.control, saving_group=groups.saving)


def outcome(actor: MegatronActor, driver: Driver | None, counters: RunCounters) -> dict[str, Any]:
    """Everything that another run must repeat."""
    weights = digest_of(actor.export_weights())
    counted = {name: getattr(counters, name) for name in ("next_step", "trained_batches", "rollouts_sampled", "tokens_trained")}
    lines = [] if driver is None else driver.lines
    tokens = {} if driver is None else driver.tokens
    return {"weights": weights, "lines": lines, "tokens": tokens, "counted": counted, "cursor": {} if driver is None else driver.cursor}


def main(folder: Path) -> None:
    config = load_config(folder / "config.yaml", CASES["serial"])
    groups = process_groups.initialize(config.layout, backend="gloo", seed=config.seed, timeout_s=300)
    actor = build_actor(config, Path(config.model.path), groups, optimizer=config.actor.optimizer, temperature=1.0)
    writer = new_writer(folder / "beginning", groups)
    writer.save(actor=actor, config=config, counters=RunCounters(), cursor={}, waiting=())
    writer.wait()
    beginning = folder / "beginning" / "step_000000"
    found: dict[str, Any] = {}
    for name, settings in CASES.items():
        config = load_config(folder / "config.yaml", settings)
        timed = load_config(folder / "config.yaml", [*settings, "checkpoint.every_minutes=1e-9"])
        whole, _ = attempt(config, groups, actor, folder / f"whole_{name}", beginning)
        saved, _ = attempt(timed, groups, actor, folder / name, beginning)
        found[name] = {"whole": whole, "saved": saved, "continued": {}}
        for checkpoint in sorted((folder / name).glob("step_*_update_*")):
            again, first_line = attempt(config, groups, actor, folder / f"again_{name}_{checkpoint.name}", checkpoint)
            found[name]["continued"][checkpoint.name] = {**again, "first_line": first_line}
    (folder / f"found_{groups.coordinates.rank}.json").write_text(json.dumps(found))
    process_groups.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
