"""Room that checkpoints take, beside what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro.cluster.nodes.needs import GIB, needs_of
from megatron_minpro.config import RunConfig, load_config

REPOSITORY = Path(__file__).resolve().parents[4]


def production(folder: Path, *settings: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/qwen3_30b_a3b.yaml", [f"output_dir={folder}", *settings])


def test_a_checkpoint_of_the_30b_takes_427_gigabytes(tmp_path: Path) -> None:
    needs = needs_of(production(tmp_path), trainers=2)
    assert needs.checkpoint == pytest.approx(427e9, rel=0.002)  # 61 GB of bf16 weights, 366 GB of fp32 weights and moments
    assert needs.num_checkpoints == 3
    assert needs.disk == pytest.approx(3 * 427e9 + 61e9 + GIB, rel=0.002)  # and the policy that is exported in the end
    assert needs.host == pytest.approx(213.7e9, rel=0.002)


def test_checkpoints_that_are_there_need_no_more_room(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / "qwen3_30b_a3b/checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    needs = needs_of(production(tmp_path), trainers=2)
    assert needs.num_checkpoints == 1
    assert needs_of(production(tmp_path, "checkpoint.keep=5"), trainers=2).num_checkpoints == 4


def test_weights_kept_on_the_host_count(tmp_path: Path) -> None:
    device, host = (needs_of(production(tmp_path, f"actor.kept_weights={where}"), trainers=2).host for where in ("device", "pinned_host"))
    assert host - device == pytest.approx(61.06e9 / 2, rel=0.001)


def test_weights_that_wait_for_servers_count(tmp_path: Path) -> None:
    """One version that the servers have and the next one: in folders, or in the host memory of the node of rank 0."""
    usual = needs_of(production(tmp_path, "rollout.publish=together", "rollout.weight_sync=collective"), trainers=2)
    disk = needs_of(production(tmp_path, "rollout.publish=together", "rollout.weight_sync=disk"), trainers=2)
    rolling = needs_of(production(tmp_path, "rollout.publish=rolling", "rollout.weight_sync=collective"), trainers=2)
    assert (disk.disk - usual.disk, rolling.disk - usual.disk) == (pytest.approx(2 * 61.06e9, rel=0.001), 0)
    assert (usual.host_of_first, disk.host_of_first) == (0, 0) and usual.host == disk.host == rolling.host
    assert rolling.host_of_first == pytest.approx(2 * 61.06e9, rel=0.001)
