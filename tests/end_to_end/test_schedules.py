"""Overlapped, serial and rolling runs give the same numbers, bit for bit, on real ranks and real servers.

Those on two servers replay the servers' experts and centre scores with the servers' likeliest tokens: also then a hang, a death and a stop
inside a step change nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.command_pool import CommandPool
from tests.end_to_end.conftest import Command, TwoServers, interrupt, metrics_of, wait_for, without_times

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(900)]


def train(minpro: Callable[..., Command], settings: list[str], name: str, *changes: str) -> Path:
    code, _, err = minpro("train", *settings, f"name={name}", *changes).wait()
    assert code == 0, err
    return Path(settings[1].removeprefix("output_dir=")) / name


def assert_equal_runs(one: Path, other: Path) -> None:
    """Metrics without times, rollouts, token records, evaluations, the newest checkpoint's record and waiting batches, the policy."""
    assert without_times(metrics_of(one)) == without_times(metrics_of(other))
    for folder, pattern in (("rollouts", "*.jsonl"), ("tokens", "*.safetensors"), (".", "evaluation_*.json")):
        names = sorted(path.name for path in (one / folder).glob(pattern))
        assert names and names == sorted(path.name for path in (other / folder).glob(pattern))
        assert all((one / folder / name).read_bytes() == (other / folder / name).read_bytes() for name in names)
    ours, theirs = (load_file(run / "policy/model.safetensors") for run in (one, other))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert state_of(one) == state_of(other)


def state_of(run: Path) -> dict[str, Any]:
    checkpoint = run / "checkpoints" / (run / "checkpoints/latest").read_text()
    state = json.loads((checkpoint / "run.json").read_text())
    del state["counters"]["seconds"], state["config"], state["files"]
    return state


@pytest.fixture(scope="module")
def on_two_servers(short_run_settings: list[str], two_servers: TwoServers, command_pool: CommandPool) -> tuple[list[str], Path]:
    """Settings of a run on two servers, and what the serial schedule makes of it."""
    settings = [
        *short_run_settings,
        *two_servers.settings(2),
        *("staleness=1", "num_global_steps=6", "evaluation.every=2", "checkpoint.every=3", "debug.check_weights=true"),
        "actor.routing_replay=server",
        *("behaviour_logprobs=engine", "objective.score_centering.top_k=6", "objective.clip_high=0.1"),
    ]
    command = Command(["train", *settings, "name=serial_on_two", "schedule=serial"], pool=command_pool)
    try:
        code, _, err = command.wait()
        assert code == 0, err
    finally:
        command.kill_everything()
    return settings, Path(short_run_settings[1].removeprefix("output_dir=")) / "serial_on_two"


def test_overlapped_equals_serial_at_staleness_two(
    minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any], two_servers: TwoServers
) -> None:
    serial = train(minpro, short_run_settings, "serial_n2", "schedule=serial", "checkpoint.keep=4", *two_servers.settings(1))
    assert_equal_runs(serial, finished_run["dir"])
    assert any(waited_less(row) for row in finished_run["metrics"])  # the undisturbed run was overlapped
    assert not any(waited_less(row) for row in metrics_of(serial))


def waited_less(row: dict[str, Any]) -> bool:
    """Whether the trainer did something else during a part of the sampling."""
    return "time/sample" in row and row["time/wait"] < row["time/sample"]


def test_an_interrupted_run_with_dynamic_sampling_and_replay_equals_serial(
    minpro: Callable[..., Command], short_run_settings: list[str], two_servers: TwoServers
) -> None:
    changes = [
        *("staleness=3", "num_global_steps=4", "evaluation.every=2", "checkpoint.every=3", "debug.check_weights=true"),
        *("rollout.dynamic_sampling={equal: reward, max_rounds: 2}", "actor.routing_replay=trainer", *two_servers.settings(1)),
    ]
    serial = train(minpro, short_run_settings, "serial_n3", *changes, "schedule=serial")
    overlapped = serial.with_name("overlapped_n3")
    first = minpro("train", *short_run_settings, "name=overlapped_n3", *changes, "schedule=overlapped")
    wait_for(lambda: len(metrics_of(overlapped)) >= 3, first, every_s=0.01)
    interrupt(first)
    code, _, err = first.wait()
    assert code == 1 and err.strip().splitlines()[-1].startswith("minpro: stopped after"), err
    latest = overlapped / "checkpoints" / (overlapped / "checkpoints/latest").read_text()
    assert list((latest / "routing").iterdir()), "batches wait in it, with their experts"
    train(minpro, short_run_settings, "overlapped_n3", *changes, "schedule=overlapped")
    assert_equal_runs(serial, overlapped)
    rows = [row for row in metrics_of(overlapped) if "routing/missing" in row]
    assert len(rows) == 4 and {row["routing/missing"] for row in rows} == {0.0}
    assert rows[0]["routing/differing_lag_min"] == 0.0 < rows[-1]["routing/differing_lag_max"] < 0.5  # the routers have moved
    assert all(list((run / "routing").iterdir()) == [] for run in (serial, overlapped))


def test_servers_return_the_experts_that_the_trainer_would_choose(on_two_servers: tuple[list[str], Path]) -> None:
    """Before the first update, in fp32 on both sides: but for ties the same ones. Of no response they are missing."""
    rows = metrics_of(on_two_servers[1])
    scored = [(row["routing/scored_missing"], row["routing/scored_differing"]) for row in rows if "routing/scored_missing" in row]
    assert len(scored) == 6 and max(differing for _, differing in scored) < 1e-3 and {missing for missing, _ in scored} == {0.0}
    trained = [row for row in rows if "routing/missing" in row]
    assert len(trained) == 6 and {row["routing/missing"] for row in trained} == {0.0}
    assert trained[-1]["routing/differing_lag_max"] > 1e-3, "the router has moved since, the experts have not"
    assert max(row["engine_logprob_gap/mean"] for row in rows if "engine_logprob_gap/mean" in row) < 1e-5


def test_scores_are_centred_with_what_the_servers_held_likely(on_two_servers: tuple[list[str], Path]) -> None:
    rows = metrics_of(on_two_servers[1])
    masses = [(row["centering/top_mass"], row["centering/top_mass_min"]) for row in rows if "centering/top_mass" in row]
    assert len(masses) == 6 and all(0.25 < smallest < mean < 1 for mean, smallest in masses)  # 6 of 24 tokens
    # The first batch is trained by the weights that sampled it, or nearly: next to nothing is truncated. Later the ceiling cuts.
    trained = [(row["centering/active"], row["centering/drift"]) for row in rows if "centering/drift" in row]
    assert len(trained) == 6 and trained[0][1] < 1e-5 and max(drift for _, drift in trained) > 1e-4
    assert list((on_two_servers[1] / "top_tokens").iterdir()) == []


def test_overlapped_equals_serial_on_two_servers_of_which_one_hangs(
    minpro: Callable[..., Command], on_two_servers: tuple[list[str], Path], two_servers: TwoServers
) -> None:
    settings, serial = on_two_servers
    overlapped = serial.parent / "overlapped_on_two"
    two_servers.wait_for_both()
    command = minpro("train", *settings, "name=overlapped_on_two", "schedule=overlapped")
    wait_for(lambda: len(metrics_of(overlapped)) >= 1, command, every_s=0.01)
    stopped = two_servers.stop_one()
    code, _, err = command.wait()
    assert code == 0, err
    assert_equal_runs(serial, overlapped)
    assert not stopped.is_running()
    # What it had under way went to the other one, or it got nothing any more.
    assert sum(row.get("servers/retries", 0) + row.get("servers/silent", 0) for row in metrics_of(overlapped)) >= 1


def test_rolling_equals_serial_while_a_server_is_killed_and_restarted(
    minpro: Callable[..., Command], on_two_servers: tuple[list[str], Path], two_servers: TwoServers
) -> None:
    settings, serial = on_two_servers
    rolling = serial.parent / "rolling"
    two_servers.wait_for_both()
    command = minpro("train", *settings, "name=rolling", "rollout.publish=rolling")
    # A batch takes a quarter of a second: with the first line most of them are still to be sampled.
    wait_for(lambda: len(metrics_of(rolling)) >= 1, command, every_s=0.01)
    two_servers.kill_one()
    code, _, err = command.wait()
    assert code == 0, err
    assert_equal_runs(serial, rolling)
    used = [row["servers/used"] for row in metrics_of(rolling) if "servers/used" in row]
    assert used[0] == 2 and 1 in used, "one server has finished the shares of both"
    assert command.survivors() == []


def test_a_run_killed_inside_steps_continues_by_any_schedule(
    minpro: Callable[..., Command], on_two_servers: tuple[list[str], Path]
) -> None:
    """kill -9 behind a checkpoint that was written between two updates, then a stop: another schedule continues each time."""
    settings, serial = on_two_servers
    run_dir = serial.parent / "changing"
    latest = run_dir / "checkpoints/latest"
    every_update = "checkpoint.every_minutes=0.0001"
    names = []

    def stands_inside(command: Command, kind: str) -> bool:
        """Whether the newest checkpoint is one of this attempt, inside a global step. If so the ranks stand still."""
        ranks = command.ranks()
        for rank in ranks:
            rank.suspend()
        if latest.exists() and re.fullmatch(rf"step_\d{{6}}_update_000[1-3]{kind}", latest.read_text()) and latest.read_text() not in names:
            return True
        for rank in ranks:
            rank.resume()
        return False

    for how, kind in (("schedule=overlapped", ""), ("schedule=serial", "_sampled"), ("rollout.publish=rolling", "")):
        command = minpro("train", *settings, "name=changing", how, every_update)
        wait_for(lambda: stands_inside(command, kind), command)  # noqa: B023  used within the iteration
        names.append(latest.read_text())
        command.kill_everything()
        command.process.wait()
    assert names == sorted(names)
    lines = len(metrics_of(run_dir))
    command = minpro("train", *settings, "name=changing", "schedule=overlapped")
    wait_for(lambda: len(metrics_of(run_dir)) > lines, command)
    interrupt(command)
    code, _, err = command.wait()
    assert code in (0, 1), err  # it may have been in its last step
    if code:
        train(minpro, settings, "changing", "schedule=serial")
    lost = ("total/rollouts_sampled",)
    assert without_times(metrics_of(run_dir), but=lost) == without_times(metrics_of(serial), but=lost)
    ours, theirs = (load_file(run / "policy/model.safetensors") for run in (run_dir, serial))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
