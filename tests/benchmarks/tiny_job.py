"""Runs of a small job for real, ranks and servers, with what their steps took."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpu_time import tree_cpu_s

from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/tiny_moe_cpu.yaml"
Line = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run: all its lines of metrics, and CPU seconds of a whole step, over all its processes."""

    lines: list[Line]
    cpu_s: float
    steps: int
    staleness: int

    @property
    def whole(self) -> list[Line]:
        """Lines of steps that sampled, trained and published, but for the first, which still warms up."""
        return [line for line in self.lines if self.staleness < (line["global_step"] or 0) < self.steps - 1]


def train(folder: Path, name: str, *, steps: int, staleness: int, settings: Sequence[str]) -> Trained:
    """One run, in folder/name. The base model is made by the first, in folder/base_model. settings: what else differs from CONFIG."""
    command = [
        *(sys.executable, "-m", "megatron_minpro.cli", "train", CONFIG),
        f"output_dir={folder}",
        f"name={name}",
        f"model.path={folder / 'base_model'}",
        f"num_global_steps={steps}",
        f"staleness={staleness}",
        "evaluation=null",
        "checkpoint.every=1000",
        "tracking.trackers=[]",
        "tracking.report=false",
        *settings,
    ]
    path = folder / name / METRICS_FILE
    cpu_s: dict[int, float] = {}  # number of lines that were written -> CPU seconds until then
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            written = path.read_bytes().count(b"\n") if path.exists() else 0
            if written not in cpu_s:
                cpu_s[written] = tree_cpu_s(process.pid)
            time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    first, last = staleness + 1, steps - 1  # lines before the first and the last whole step
    whole_step_cpu_s = (cpu_s[last] - cpu_s[first]) / (last - first)
    return Trained(lines=list(read_metrics(path)), cpu_s=whole_step_cpu_s, steps=steps, staleness=staleness)


def median(runs: Sequence[Trained], name: str) -> float:
    """The median of a metric over the whole steps of all runs."""
    return statistics.median(number(line, name) for run in runs for line in run.whole)


def number(line: Line, name: str) -> float:
    """The value of a metric that every whole step has."""
    value = line[name]
    assert value is not None
    return value
