"""The overlapped schedule gives the serial schedule's numbers, bit for bit, on real ranks and real servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.end_to_end.conftest import Command, metrics_of, without_times

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(900)]


def train(minpro: Callable[..., Command], settings: list[str], name: str, *changes: str) -> Path:
    code, _, err = minpro("train", *settings, f"name={name}", *changes).wait()
    assert code == 0, err
    return Path(settings[1].removeprefix("output_dir=")) / name


def assert_equal_runs(one: Path, other: Path) -> None:
    """Metrics without times, rollouts, evaluations, the newest checkpoint's record and waiting batches, the policy."""
    assert without_times(metrics_of(one)) == without_times(metrics_of(other))
    for folder, pattern in (("rollouts", "*.jsonl"), (".", "evaluation_*.json")):
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


def test_overlapped_equals_serial_at_staleness_two(
    minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]
) -> None:
    serial = train(minpro, short_run_settings, "serial_n2", "schedule=serial", "checkpoint.keep=4")
    assert_equal_runs(serial, finished_run["dir"])
    assert any(waited_less(row) for row in finished_run["metrics"])  # the undisturbed run was overlapped
    assert not any(waited_less(row) for row in metrics_of(serial))


def waited_less(row: dict[str, Any]) -> bool:
    """Whether the trainer did something else during a part of the sampling."""
    return "time/sample" in row and row["time/wait"] < row["time/sample"]


@pytest.mark.parametrize(("staleness", "servers"), [(1, 2), (3, 1)])
def test_overlapped_equals_serial_with_evaluation_and_dynamic_sampling(
    staleness: int, servers: int, minpro: Callable[..., Command], short_run_settings: list[str], finished_run: dict[str, Any]
) -> None:
    changes = [
        *(f"staleness={staleness}", "num_global_steps=4", f"rollout.servers={servers}", "evaluation.every=2", "checkpoint.every=3"),
        *("rollout.dynamic_sampling={equal: reward, max_rounds: 2}", "debug.check_weights=true"),
    ]
    runs = [
        train(minpro, short_run_settings, f"{schedule}_n{staleness}", *changes, f"schedule={schedule}")
        for schedule in ("overlapped", "serial")
    ]
    assert_equal_runs(*runs)
