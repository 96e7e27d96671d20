"""Ctrl-C, kill -9 and a server's death: what was done is kept, the same command continues, and nobody is left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_minpro.tracking.versions import read_versions
from tests.end_to_end.conftest import Command, TwoServers, interrupt, metrics_of, wait_for, without_times

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]


def test_a_run_stopped_by_ctrl_c_continues_to_the_same_numbers_bit_for_bit(
    minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any], two_servers: TwoServers
) -> None:
    run_dir = finished_run["dir"].parent / "stopped"
    command = minpro("train", *short_run_settings, "name=stopped")
    wait_for(lambda: len(metrics_of(run_dir)) >= 3, command, every_s=0.01)
    interrupt(command)
    code, _, err = command.wait()
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("minpro: stopped after") and len(err.strip().splitlines()) == 1
    assert command.survivors() == []
    stopped_at = len(metrics_of(run_dir))
    assert stopped_at < 7 and (run_dir / "checkpoints/latest").read_text().startswith(f"step_{stopped_at:06d}")

    resumed = minpro("train", *short_run_settings, "name=stopped", *two_servers.settings(1), "--resume", "must")
    code, _, err = resumed.wait()
    assert code == 0, err
    first, second = read_versions(run_dir)
    assert (first.global_step, second.global_step) == (0, stopped_at) and first.versions == second.versions
    assert without_times(metrics_of(run_dir)) == without_times(finished_run["metrics"])
    ours, theirs = (load_file(folder / "policy/model.safetensors") for folder in (run_dir, finished_run["dir"]))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(("weight_sync", "num_steps_before"), [("collective", 3), ("disk", 1)])  # after 3 steps the weights have moved
def test_a_run_whose_only_server_is_killed_ends_with_the_same_numbers(
    weight_sync: str, num_steps_before: int, minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]
) -> None:
    name = f"killed_server_{weight_sync}"
    run_dir = finished_run["dir"].parent / name
    command = minpro("train", *short_run_settings, f"name={name}", f"rollout.weight_sync={weight_sync}")
    wait_for(lambda: len(metrics_of(run_dir)) >= num_steps_before, command, every_s=0.01)
    servers = [process for process in command.offspring() if "rollout.sglang.cpu" in " ".join(process.cmdline())]
    min(servers, key=lambda process: process.create_time()).send_signal(signal.SIGKILL)
    code, out, err = command.wait()
    assert code == 0, err
    assert command.survivors() == []
    assert "SGLang server 0" in out and "was ended by SIGKILL; restarting it (1 of at most 5 times)" in out
    rows = metrics_of(run_dir)
    assert without_times(rows) == without_times(finished_run["metrics"])
    assert sum(row.get("servers/restarts", 0) for row in rows) == 1
    ours, theirs = (load_file(folder / "policy/model.safetensors") for folder in (run_dir, finished_run["dir"]))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_run_that_loses_all_servers_saves_and_continues_with_new_ones(
    minpro: Callable[..., Command],
    short_run_settings: list[str],
    finished_run: dict[str, Any],
    two_servers: TwoServers,
    tmp_path: Path,
) -> None:
    run_dir = finished_run["dir"].parent / "lost_servers"
    servers = minpro("serve", *short_run_settings, "--folder", str(tmp_path))
    written = tmp_path / "endpoints.json"
    endpoints = json.loads(wait_for(lambda: written.exists() and written.read_text(), servers))
    settings = [*short_run_settings, "name=lost_servers", "rollout.servers=0", "rollout.start_timeout_s=3", "checkpoint.every=100"]
    command = minpro("train", *settings, f"rollout.endpoints={json.dumps(endpoints)}")
    wait_for(lambda: len(metrics_of(run_dir)) >= 2, command, every_s=0.01)
    servers.process.kill()
    code, _, err = command.wait()
    assert code == 1
    assert f"no server answered within 3 s: {endpoints[0]}" in err and len(err.strip().splitlines()) == 1
    done = len(metrics_of(run_dir))
    assert done < 5 and (run_dir / "checkpoints/latest").read_text() == f"step_{done:06d}_update_0004"  # all of them; its batch is missing
    code, _, err = minpro("train", *settings, *two_servers.settings(1), "--resume", "must").wait()
    assert code == 0, err
    rows = metrics_of(run_dir)
    assert (
        without_times(rows) == without_times(finished_run["metrics"])
        and rows[-1]["total/rollouts_sampled"] == rows[-1]["total/rollouts_trained"]
    )


def test_a_server_that_may_not_be_restarted_ends_the_run(
    minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]
) -> None:
    """A killed rank, sampling process and launcher: test_faults.py."""
    run_dir = finished_run["dir"].parent / "killed_server"
    command = minpro("train", *short_run_settings, "name=killed_server", "num_global_steps=500", "rollout.max_server_restarts=0")
    wait_for(lambda: len(metrics_of(run_dir)) >= 3, command, every_s=0.01)
    servers = [process for process in command.offspring() if "rollout.sglang.cpu" in " ".join(process.cmdline())]
    min(servers, key=lambda process: process.create_time()).send_signal(signal.SIGKILL)  # later ones are what it started itself
    code, _, err = command.wait(timeout_s=300)
    assert code == 1
    assert len(err.strip().splitlines()) == 1 and str(run_dir / "logs") in err
    assert command.survivors() == []
    assert (run_dir / "checkpoints/latest").exists()  # what was reached is kept


def test_a_rank_that_dies_while_the_servers_start_ends_the_run_at_once(
    minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]
) -> None:
    command = minpro("train", *short_run_settings, "name=early_death")
    wait_for(command.ranks, command)[0].send_signal(signal.SIGKILL)
    code, _, err = command.wait(timeout_s=300)
    assert code == 1
    assert err.startswith("minpro: error: a trainer rank failed") and len(err.strip().splitlines()) == 1
    assert command.survivors() == []


def test_ctrl_c_while_the_servers_start_leaves_nobody(
    minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]
) -> None:
    command = minpro("train", *short_run_settings, "name=early")
    wait_for(lambda: len(command.offspring()) >= 3, command)
    interrupt(command)
    interrupt(command)
    code, _, err = command.wait(timeout_s=300)
    assert code == 1 and len(err.strip().splitlines()) == 1
    assert command.survivors() == []


def test_a_used_folder_is_refused_with_another_configuration(
    minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]
) -> None:
    code, _, err = minpro("train", *short_run_settings, "name=undisturbed", "objective.name=cispo").wait()
    assert code == 2
    assert "objective.name: 'minpro' there, 'cispo' here" in err and len(err.strip().splitlines()) == 1
    code, _, err = minpro("train", *short_run_settings, "name=undisturbed", "--resume", "never").wait()
    assert code == 2 and "holds a run already" in err


def test_resuming_a_finished_run_changes_nothing(
    minpro: Callable[..., Command],
    short_run_settings: list[str],
    finished_run: dict[str, Any],
    two_servers: TwoServers,
    tmp_path: Path,
) -> None:
    shutil.copytree(finished_run["dir"], tmp_path / "undisturbed")
    settings = [*short_run_settings, f"output_dir={tmp_path}", "name=undisturbed", *two_servers.settings(1)]
    code, out, err = minpro("train", *settings).wait()
    assert code == 0, err
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "undisturbed" / name).read_bytes() == (finished_run["dir"] / name).read_bytes()
    assert "5 global steps (20 updates)" in out


def test_a_full_disk_is_one_line_at_the_end_and_the_run_continues(
    minpro: Callable[..., Command],
    short_run_settings: list[str],
    finished_run: dict[str, Any],
    two_servers: TwoServers,
    small_disk: Callable[[int], Path],
) -> None:
    checkpoint = finished_run["dir"] / "checkpoints/step_000007"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    disk = small_disk(int(2.9 * size))  # room for a run and two of its checkpoints, not for a third
    run_dir = disk / "full"
    settings = [*short_run_settings, f"output_dir={disk}", "name=full", "checkpoint.every=1", *two_servers.settings(1)]
    command = minpro("train", *settings)
    code, _, err = command.wait()
    assert code == 1
    assert "checkpoint step_000007 was not written, step_000002 stays the newest: " in err and f"are free on {disk}" in err
    assert len(err.strip().splitlines()) == 1
    assert command.survivors() == []
    assert len(metrics_of(run_dir)) == len(finished_run["metrics"])  # training went on to its end
    assert not list(run_dir.rglob("*.partial*"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    code, _, err = minpro("train", *settings, "--resume", "must").wait()
    assert code == 0, err
    assert [row.get("loss") for row in metrics_of(run_dir)] == [row.get("loss") for row in finished_run["metrics"]]
    assert not list(run_dir.rglob("*.partial*"))


def test_port_in_use_is_one_line(minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = minpro("train", *short_run_settings, "name=port", f"rollout.base_port={port}")
        code, _, err = command.wait(timeout_s=300)
    assert code == 2
    assert f"port {port}" in err and len(err.strip().splitlines()) == 1
    assert command.survivors() == []
    assert Path(finished_run["dir"]).exists()
