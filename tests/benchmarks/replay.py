"""The project's own loop against servers and a trainer that take time and no CPU: what a schedule makes of a heavy tail.

The servers replay response times from a file (stand_in_server.py); scoring and updates sleep. Everything between them is real: schedule,
client, environment, grading, weight sync over the disk. The ideal of a schedule follows from the same times.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rows import Row
from stand_in_server import read_trace

from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.config import RunConfig, dump_config, load_config
from megatron_minpro.loop import schedule as schedules
from megatron_minpro.loop.counters import RunCounters, UnfinishedStep
from megatron_minpro.loop.servers import publish
from megatron_minpro.loop.training_run import TrainingRun
from megatron_minpro.objectives import make_objective
from megatron_minpro.run.base_model import write_initial_model
from megatron_minpro.run.run_folder import ENDPOINTS_FILE
from megatron_minpro.run.sampling.process import SamplingProcess
from megatron_minpro.run.worker import build_driver
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics
from megatron_minpro.tracking.run_files import CONFIG_FILE
from parallel.actor import UpdateReport
from parallel.packing import TokenSequence

STEPS = 10
SERVERS = 4
PROMPTS, GROUP = 16, 2
SCORE_S, UPDATE_S = 0.4, 1.8
GOOD = 0.95  # of the ideal
_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_TRACE = _HERE / "response_times.txt"


def rows(folder: Path) -> list[Row]:
    """The rows of this file. folder: an existing folder; the runs stay there until the next call."""
    base = folder / "replay"
    shutil.rmtree(base, ignore_errors=True)
    shares = server_shares()
    found = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, publish_how in (("overlapped", "together"), ("rolling", "rolling")):
            lines = [line for line in replay(base, name, publish_how) if 1 < line["global_step"] < STEPS - 1]
            steps = [int(line["global_step"]) for line in lines]
            seconds = sum(line["time/step"] for line in lines) / len(lines)
            sync_s = sum(line["time/sync"] for line in lines) / len(lines)
            ideal = sum(ideal_steps_s(name, shares)[step] for step in steps) / len(steps) + sync_s
            sampled = sum(sum(shares[step]) / SERVERS for step in steps) / len(steps)
            found.append(
                Row(
                    name=f"global step of a replayed trace, {name}: servers idle {1 - sampled / seconds:.0%}",
                    seconds=seconds,
                    peer="its ideal",
                    peer_seconds=ideal,
                    target=1 / GOOD,
                )
            )
    finally:
        dist.destroy_process_group()
    return found


def server_shares() -> list[list[float]]:
    """[step][server]: seconds of the slowest response of its share."""
    trace, batch = read_trace(_TRACE), PROMPTS * GROUP
    return [[max(trace[step * batch + server : (step + 1) * batch : SERVERS]) for server in range(SERVERS)] for step in range(STEPS)]


def ideal_steps_s(schedule: str, shares: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each step without its weight sync, at staleness 1.

    Args:
        schedule: serial, overlapped, or rolling: a server that is done with its share begins the next one.
        shares: [step][server] seconds.
    """
    training_s = SCORE_S + UPDATE_S
    if schedule == "serial":
        return [max(row) + training_s for row in shares]
    if schedule == "overlapped":
        return [max(max(row), training_s) for row in shares]
    done = [0.0] * len(shares[0])  # when each server is done
    begins, before = [0.0], 0.0  # when each step begins; when the batch before is complete
    for step, row in enumerate(shares):
        done = [max(free, begins[-1]) + seconds for free, seconds in zip(done, row, strict=True)]
        begins.append(max(begins[-1], before) + (training_s if step else 0.0))
        before = max(done)
    return [end - begin for begin, end in pairwise(begins)]


def replay(base: Path, name: str, publish_how: str) -> list[dict[str, Any]]:
    """The metrics of one run."""
    run_dir = base / name
    run_dir.mkdir(parents=True)
    config = load_config(
        _ROOT / "configs/tiny_moe_cpu.yaml",
        [
            f"output_dir={base}",
            f"name={name}",
            f"rollout.publish={publish_how}",
            f"model.path={base / 'model'}",
            f"num_global_steps={STEPS}",
            "staleness=1",
            "evaluation=null",
            "checkpoint.every=1000",
            "tracking.trackers=[]",
            "tracking.token_groups=0",  # SleepingActor never calls the loss, which would record them
            "rollout.servers=0",
            # Placeholders: ENDPOINTS_FILE has the real ones.
            f"rollout.endpoints=[{', '.join(f'http://127.0.0.1:{1 + server}' for server in range(SERVERS))}]",
            "rollout.weight_sync=disk",
            f"rollout.prompts_per_step={PROMPTS}",
            f"rollout.group_size={GROUP}",
            "actor.updates_per_step=1",
        ],
    )
    model = Path(config.model.path)
    if not model.exists():
        write_initial_model(config.model, config.prompts, model)
    with stand_ins(model) as endpoints:
        (run_dir / CONFIG_FILE).write_text(dump_config(config))
        (run_dir / ENDPOINTS_FILE).write_text(json.dumps(endpoints))
        train(config, run_dir)
    return [dict(line) for line in read_metrics(run_dir / METRICS_FILE)]


def train(config: RunConfig, run_dir: Path) -> None:
    """The whole run in this process, its only rank."""
    assert dist.group.WORLD is not None
    counters = RunCounters()
    driver = build_driver(config, run_dir, counters, None, SamplingProcess(run_dir))
    run = TrainingRun(
        config=config,
        actor=SleepingActor(Path(config.model.path)),  # type: ignore[arg-type]
        objective=make_objective(config.objective.name, **config.objective.options),
        buffer=StalenessBuffer(config.staleness),
        counters=counters,
        driver=driver,
        control_group=dist.group.WORLD,
        stop_requested=lambda: False,
        checkpoints=NoCheckpoints(),
    )
    publish(run)
    schedules.train(run)
    driver.close()


@contextmanager
def stand_ins(model: Path) -> Iterator[list[str]]:
    """The servers, in a process of their own; their endpoints."""
    command = [sys.executable, str(_HERE / "stand_in_server.py"), str(model), str(_TRACE), str(SERVERS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


class SleepingActor:
    """A trainer that takes time and learns nothing. Its weights are those of a folder, under one version after the other."""

    def __init__(self, folder: Path) -> None:
        self.policy_version = 0
        self.kept_version: int | None = None
        with SafetensorsReader(folder) as reader:
            self._tensors = {name: reader.read(name) for name in reader.names}

    def logprobs(self, sequences: Sequence[TokenSequence], *, entropies: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """The stand-in servers' log-probs; `entropies` gets zeros."""
        time.sleep(SCORE_S)
        if entropies is not None:
            entropies += [torch.zeros(sequence.num_positions) for sequence in sequences]
        return [torch.full((sequence.num_positions,), -1.0) for sequence in sequences]

    def update(self, minibatch: Sequence[TokenSequence], loss_fn: Any, *, learning_rate: float) -> UpdateReport:
        time.sleep(UPDATE_S)
        self.policy_version += 1
        return UpdateReport(
            loss=0.0,
            grad_norm=0.0,
            learning_rate=learning_rate,
            policy_version=self.policy_version,
            num_tokens=sum(int(sequence.loss_mask.sum()) for sequence in minibatch),
            metrics={},
        )

    def keep_weights(self, *, place: str) -> None:
        """The weights never differ: only the version is kept."""
        self.kept_version = self.policy_version

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """The kept version, inside the block."""
        assert self.kept_version is not None
        latest, self.policy_version = self.policy_version, self.kept_version
        yield
        self.policy_version = latest

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them."""
        yield from self._tensors.items()


class NoCheckpoints:
    """A benchmark continues nothing."""

    def save(self, unfinished: UnfinishedStep | None) -> None:
        """Nothing is kept."""

    def wait(self) -> None:
        """Nothing is under way."""

    def seconds(self) -> float | None:
        """None: nothing is written."""
        return None
