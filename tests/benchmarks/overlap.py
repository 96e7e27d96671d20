"""A global step of the tiny main job, sampling and training at the same time against one after the other: real ranks, real servers.

The schedules run in turn, twice, with the same numbers. A CPU has no cores to spare for the second side: the ratio says what overlap wins
where trainer and servers want the same two cores, not what it wins on machines of their own. replay.py measures that.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpu_time import tree_cpu_s
from rows import Row

from megatron_minpro.loop.idle import idle_metrics
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics

STEPS = 10
STALENESS = 2
ROUNDS = 2
_ROOT = Path(__file__).resolve().parents[2]
_OVERLAP = "throughput/overlap_efficiency"
_IDLE = {"trainer": "time/wait", "servers": "time/idle_servers"}
_WAYS = {
    "serial": ("schedule=serial",),
    "overlapped": ("schedule=overlapped",),
    "rolling": ("schedule=overlapped", "rollout.publish=rolling"),
}
Line = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run: all its lines of metrics, and CPU seconds of a whole step, over all its processes."""

    lines: list[Line]
    cpu_s: float

    @property
    def whole(self) -> list[Line]:
        """Lines of steps that sampled, trained and published, but for the first, which still warms up."""
        return [line for line in self.lines if _is_whole(line)]


def rows(folder: Path) -> list[Row]:
    """The rows of this file. folder: an existing folder; the runs stay there until the next call."""
    base = folder / "overlap"
    shutil.rmtree(base, ignore_errors=True)
    return [*_rows(base, 1, ("serial", "overlapped")), *_rows(base, 2, ("serial", "overlapped", "rolling"))]


def _rows(base: Path, servers: int, ways: Sequence[str]) -> list[Row]:
    """One for each way after the first, against the first."""
    runs: dict[str, list[Trained]] = {way: [] for way in ways}
    for number in range(ROUNDS):
        for way, found in runs.items():
            found.append(_train(base, way, servers, number))
    numbers = [[_without_times(line) for line in run.lines] for found in runs.values() for run in found]
    if any(other != numbers[0] for other in numbers):
        raise RuntimeError(f"the schedules disagree, or a run does not repeat: {base}/*/{METRICS_FILE}")
    peer = runs.pop(ways[0])
    return [
        Row(
            name=f"global step of the tiny job, {servers} server{'s' * (servers > 1)}, {way}: {_said(found)}",
            seconds=_median(found, "time/step"),
            peer=f"{ways[0]}: {_said(peer)}",
            peer_seconds=_median(peer, "time/step"),
            target=1.0,
        )
        for way, found in runs.items()
    ]


def _train(base: Path, way: str, servers: int, number: int) -> Trained:
    """One run. The base model is made by the first."""
    name = f"{way}_{servers}_{number}"
    settings = [
        f"output_dir={base}",
        f"name={name}",
        *_WAYS[way],
        f"rollout.servers={servers}",
        f"model.path={base / 'base_model'}",
        f"num_global_steps={STEPS}",
        f"staleness={STALENESS}",
        "evaluation=null",
        "checkpoint.every=1000",
        "tracking.trackers=[]",
    ]
    command = [sys.executable, "-m", "megatron_minpro.cli", "train", "configs/tiny_moe_cpu.yaml", *settings]
    path = base / name / METRICS_FILE
    cpu_s: dict[int, float] = {}  # number of lines that were written -> CPU seconds until then
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            written = path.read_bytes().count(b"\n") if path.exists() else 0
            if written not in cpu_s:
                cpu_s[written] = tree_cpu_s(process.pid)
            time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    first, last = STALENESS + 1, STEPS - 1  # lines before the first and the last whole step
    return Trained(lines=list(read_metrics(path)), cpu_s=(cpu_s[last] - cpu_s[first]) / (last - first))


def _is_whole(line: Line) -> bool:
    return STALENESS < (line["global_step"] or 0) < STEPS - 1


def _without_times(line: Line) -> dict[str, float | None]:
    return {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/", "servers/"))}


def _said(runs: Sequence[Trained]) -> str:
    """CPU seconds, idle shares, and how near the steps come to one in which the longer side alone takes time."""
    lines = [line for run in runs for line in run.whole]
    idle = {who: statistics.median(_number(line, name) / _number(line, "time/step") for line in lines) for who, name in _IDLE.items()}
    ideal = statistics.median(_share_of_the_ideal(line) for line in lines)
    cpu_s = statistics.median(run.cpu_s for run in runs)
    return f"{cpu_s:.2f} CPU s, idle: trainer {idle['trainer']:.0%}, servers {idle['servers']:.0%}; {ideal:.0%} of the ideal"


def _share_of_the_ideal(line: Line) -> float:
    if _OVERLAP in line:
        return _number(line, _OVERLAP)
    seconds = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/") and value is not None}
    return idle_metrics(seconds, wall_s=seconds["step"], overlapped=True)[_OVERLAP]


def _median(runs: Sequence[Trained], name: str) -> float:
    return statistics.median(_number(line, name) for run in runs for line in run.whole)


def _number(line: Line, name: str) -> float:
    value = line[name]
    assert value is not None
    return value
