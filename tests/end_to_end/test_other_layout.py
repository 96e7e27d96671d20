"""A run that goes on over another parallel layout: the same numbers but for the order in which they are added."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Command, TwoServers, metrics_of

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]

# What one update computes from its batch. The batch itself is the same as long as it was sampled before the run moved; later ones come from
# weights that differ in their last bits, where one other token makes another response and another reward.
OF_A_BATCH = ("loss/total", "update/grad_norm", "policy/entropy", "reward/trained", "prefix_min/mean", "clip/hard", "clip/soft")
EXACT = (
    "batch/tokens",
    "batch/sampled_at_step",
    "batch/lag_min",
    "batch/lag_max",
    "policy/version",
    "update/learning_rate",
    "total/rollouts_trained",
)


def test_a_run_resumed_with_another_layout_continues_within_1e_5(
    minpro: Callable[..., Command],
    short_run_settings: list[str],
    finished_run: dict[str, Any],
    two_servers: TwoServers,
    tmp_path: Path,
) -> None:
    shutil.copytree(finished_run["dir"], tmp_path / "undisturbed")
    checkpoints = tmp_path / "undisturbed/checkpoints"
    assert (checkpoints / "step_000004").is_dir()
    (checkpoints / "latest").write_text("step_000004")
    settings = [
        *short_run_settings,
        f"output_dir={tmp_path}",
        "name=undisturbed",
        "parallel.ep=1",
        "parallel.pp=2",
        *two_servers.settings(1),
    ]
    code, _, err = minpro("train", *settings, "--resume", "must").wait()
    assert code == 0, err
    rows, undisturbed = metrics_of(tmp_path / "undisturbed"), finished_run["metrics"]
    assert rows[:4] == undisturbed[:4]
    for row, expected in zip(rows[4:6], undisturbed[4:6], strict=True):  # they train the batches of steps 2 and 3
        assert {name: row[name] for name in EXACT} == {name: expected[name] for name in EXACT}
        assert {name: row[name] for name in OF_A_BATCH if name in row} == pytest.approx(
            {name: expected[name] for name in OF_A_BATCH if name in expected}, rel=1e-5, abs=1e-7
        )
    assert len(rows) == len(undisturbed)
    assert rows[6]["batch/sampled_at_step"] == 4
