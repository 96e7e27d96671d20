"""A global step of the tiny main job, sampling and training at the same time against one after the other: real ranks, real servers.

The schedules run in turn, twice, with the same numbers. A CPU has no cores to spare for the second side: the ratio says what overlap wins
where trainer and servers want the same two cores, not what it wins on machines of their own. replay.py measures that.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from rows import Row
from tiny_job import Line, Trained, median, number, train

from megatron_minpro.loop.idle import idle_metrics
from megatron_minpro.tracking.metrics_file import METRICS_FILE

STEPS = 10
STALENESS = 2
ROUNDS = 2
_OVERLAP = "throughput/overlap_efficiency"
_IDLE = {"trainer": "time/wait", "servers": "time/idle_servers"}
_WAYS = {
    "serial": ("schedule=serial",),
    "overlapped": ("schedule=overlapped",),
    "rolling": ("schedule=overlapped", "rollout.publish=rolling"),
}


def rows(folder: Path) -> list[Row]:
    """The rows of this file. folder: an existing folder; the runs stay there until the next call."""
    base = folder / "overlap"
    shutil.rmtree(base, ignore_errors=True)
    return [*_rows(base, 1, ("serial", "overlapped")), *_rows(base, 2, ("serial", "overlapped", "rolling"))]


def _rows(base: Path, servers: int, ways: Sequence[str]) -> list[Row]:
    """One for each way after the first, against the first."""
    runs: dict[str, list[Trained]] = {way: [] for way in ways}
    for turn in range(ROUNDS):
        for way, found in runs.items():
            settings = (*_WAYS[way], f"rollout.servers={servers}")
            found.append(train(base, f"{way}_{servers}_{turn}", steps=STEPS, staleness=STALENESS, settings=settings))
    numbers = [[_without_times(line) for line in run.lines] for found in runs.values() for run in found]
    if any(other != numbers[0] for other in numbers):
        raise RuntimeError(f"the schedules disagree, or a run does not repeat: {base}/*/{METRICS_FILE}")
    peer = runs.pop(ways[0])
    return [
        Row(
            name=f"global step of the tiny job, {servers} server{'s' * (servers > 1)}, {way}: {_said(found)}",
            seconds=median(found, "time/step"),
            peer=f"{ways[0]}: {_said(peer)}",
            peer_seconds=median(peer, "time/step"),
            target=1.0,
        )
        for way, found in runs.items()
    ]


def _without_times(line: Line) -> dict[str, float | None]:
    return {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/", "servers/"))}


def _said(runs: Sequence[Trained]) -> str:
    """CPU seconds, idle shares, and how near the steps come to one in which the longer side alone takes time."""
    lines = [line for run in runs for line in run.whole]
    idle = {who: statistics.median(number(line, name) / number(line, "time/step") for line in lines) for who, name in _IDLE.items()}
    ideal = statistics.median(_share_of_the_ideal(line) for line in lines)
    cpu_s = statistics.median(run.cpu_s for run in runs)
    return f"{cpu_s:.2f} CPU s, idle: trainer {idle['trainer']:.0%}, servers {idle['servers']:.0%}; {ideal:.0%} of the ideal"


def _share_of_the_ideal(line: Line) -> float:
    if _OVERLAP in line:
        return number(line, _OVERLAP)
    seconds = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/") and value is not None}
    return idle_metrics(seconds, wall_s=seconds["step"], overlapped=True)[_OVERLAP]
