"""A global step of the tiny main job, sampling and training at the same time against one after the other: real ranks, one real server.

Both schedules run in turn, twice, with the same numbers. A CPU has no cores to spare for the second side: the ratio says what overlap wins
where trainer and server want the same two cores, not what it wins on machines of their own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rows import Row

from megatron_minpro.loop.idle import idle_metrics
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics

STEPS = 10
STALENESS = 2
ROUNDS = 2
_ROOT = Path(__file__).resolve().parents[2]
_OVERLAP = "throughput/overlap_efficiency"
_IDLE = {"trainer": "time/wait", "server": "time/idle_servers"}
Line = Mapping[str, float | None]


def rows(folder: Path) -> list[Row]:
    """The row of this file. folder: an existing folder; the runs stay there."""
    base = folder / "overlap"
    runs: dict[str, list[list[Line]]] = {"serial": [], "overlapped": []}
    for number in range(ROUNDS):
        for schedule, found in runs.items():
            found.append(_train(base, schedule, number))
    numbers = [[_without_times(line) for line in lines] for found in runs.values() for lines in found]
    if any(other != numbers[0] for other in numbers):
        raise RuntimeError(f"the schedules disagree, or a run does not repeat: {base}/*/{METRICS_FILE}")
    serial, overlapped = ([line for lines in found for line in lines if _is_whole(line)] for found in runs.values())
    return [
        Row(
            name=f"global step of the tiny job, overlapped: {_said(overlapped)}",
            seconds=_median(overlapped, "time/step"),
            peer=f"serial: {_said(serial)}",
            peer_seconds=_median(serial, "time/step"),
            target=1.0,
        )
    ]


def _train(base: Path, schedule: str, number: int) -> list[Line]:
    """The metrics of one run. The base model is made by the first."""
    name = f"{schedule}_{number}"
    settings = [
        f"output_dir={base}",
        f"name={name}",
        f"schedule={schedule}",
        f"model.path={base / 'base_model'}",
        f"num_global_steps={STEPS}",
        f"staleness={STALENESS}",
        "evaluation=null",
        "checkpoint.every=1000",
        "tracking.trackers=[]",
    ]
    command = [sys.executable, "-m", "megatron_minpro.cli", "train", "configs/tiny_moe_cpu.yaml", *settings]
    subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
    return list(read_metrics(base / name / METRICS_FILE))


def _is_whole(line: Line) -> bool:
    """Whether the step sampled, trained and published; the first such step still warms up."""
    return STALENESS < (line["global_step"] or 0) < STEPS - 1


def _without_times(line: Line) -> dict[str, float | None]:
    return {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/", "servers/"))}


def _said(lines: Sequence[Line]) -> str:
    """Idle shares, and how near the steps come to one in which the longer side alone takes time."""
    share = {who: statistics.median(_number(line, name) / _number(line, "time/step") for line in lines) for who, name in _IDLE.items()}
    ideal = statistics.median(_share_of_the_ideal(line) for line in lines)
    return f"trainer idle {share['trainer']:.0%}, server {share['server']:.0%}, {ideal:.0%} of the ideal"


def _share_of_the_ideal(line: Line) -> float:
    if _OVERLAP in line:
        return _number(line, _OVERLAP)
    seconds = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/") and value is not None}
    return idle_metrics(seconds, wall_s=seconds["step"], overlapped=True)[_OVERLAP]


def _median(lines: Sequence[Line], name: str) -> float:
    return statistics.median(_number(line, name) for line in lines)


def _number(line: Line, name: str) -> float:
    value = line[name]
    assert value is not None
    return value
