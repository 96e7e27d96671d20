"""kill -9 of a random process at a random moment, and the same command again until it ends: nothing in the result tells of it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.end_to_end.conftest import Command, TwoServers, metrics_of, without_times

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]

SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(3, 20))]
KINDS = ("rank", "sampling process", "launcher", "server")
MAX_ATTEMPTS = 4
NUM_LINES = 7  # of metrics that the run writes: 5 global steps and a staleness of 2


def victims(command: Command, kind: str) -> list[psutil.Process]:
    """The command itself, its ranks, the process that samples for them, or everything that a server consists of."""
    if kind == "launcher":
        return [psutil.Process(command.process.pid)]
    if kind == "rank":
        return command.ranks()
    found = []
    for process in command.offspring():
        try:
            if process.name() == "sampling" if kind == "sampling process" else "rollout.sglang.cpu" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill_at(command: Command, run_dir: Path, kind: str, *, lines: int, delay_s: float, choice: random.Random) -> bool:
    """kill -9 of one process `delay_s` after the metrics have `lines` lines. False when the command ended earlier."""
    due = None
    while command.process.poll() is None:
        if due is None and len(metrics_of(run_dir)) >= lines:
            due = time.monotonic() + delay_s
        if due is not None and time.monotonic() >= due:
            found = victims(command, kind)
            if found:
                choice.choice(found).kill()
                return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_run_continues_to_the_undisturbed_result_bit_for_bit(
    seed: int,
    minpro: Callable[..., Command],
    new_minpro: Callable[..., Command],
    short_run_settings: list[str],
    finished_run: dict[str, Any],
    two_servers: TwoServers,
) -> None:
    choice = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    lines = choice.randint(0, NUM_LINES - 1)
    # The last step and what follows it take the ranks 0.6 s on idle cores.
    delay_s = choice.uniform(0, 2 if lines < NUM_LINES - 1 else 0.4)
    name = f"fault_{seed}"
    run_dir = finished_run["dir"].parent / name

    killed = False
    for attempt in range(MAX_ATTEMPTS):
        # Its own server, where that may be left behind or be the one that is killed.
        own_server = attempt == 0 and kind in ("launcher", "server")
        start = new_minpro if kind == "launcher" else minpro  # as a shell starts it: the ranks' parent is a program of its own
        command = start("train", *short_run_settings, f"name={name}", *([] if own_server else two_servers.settings(1)))
        if attempt == 0:
            killed = kill_at(command, run_dir, kind, lines=lines, delay_s=delay_s, choice=choice)
        code, _, err = command.wait()
        assert command.survivors() == []
        if code == 0:
            break
        assert attempt == 0 and killed, f"nothing was killed in attempt {attempt}, and it failed: {err}"
        if kind != "launcher":
            assert code == 1 and len(err.strip().splitlines()) == 1 and str(run_dir / "logs") in err, err
        if lines > 2:
            assert (run_dir / "checkpoints/latest").exists(), "what was reached is kept"
    assert killed, "the run ended before anything was killed"
    assert code == 0

    rows, undisturbed = metrics_of(run_dir), finished_run["metrics"]
    assert without_times(rows, but=("total/rollouts_sampled",)) == without_times(undisturbed, but=("total/rollouts_sampled",))
    ours, theirs = (load_file(folder / "policy/model.safetensors") for folder in (run_dir, finished_run["dir"]))
    assert sorted(ours) == sorted(theirs)
    assert all((ours[tensor] == theirs[tensor]).all() for tensor in theirs)
    for measured in ("evaluation_before.json", "evaluation_after.json"):
        assert json.loads((run_dir / measured).read_text()) == json.loads((finished_run["dir"] / measured).read_text())
    trained_from = [row["batch/sampled_at_step"] for row in rows if row.get("batch/sampled_at_step") is not None]
    assert trained_from == list(range(5)), "every batch once, none twice"
    counted, expected = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, finished_run["dir"]))
    assert counted["rollouts_trained"] == expected["rollouts_trained"] == expected["rollouts_sampled"]
    assert counted["rollouts_sampled"] == counted["rollouts_trained"] + counted["rollouts_lost"]
    assert not list(run_dir.rglob("*.partial*"))
