"""Idle seconds and overlap efficiency by hand."""

from __future__ import annotations

from megatron_minpro.loop.idle import idle_metrics

SECONDS = {"sample": 5.0, "reward": 1.0, "score": 1.0, "update": 3.0, "sync": 1.0}


def test_serially_the_trainer_waits_for_all_of_sampling() -> None:
    found = idle_metrics(SECONDS, wall_s=11.0, overlapped=False)
    assert found == {"time/wait": 6.0, "time/idle_servers": 6.0}


def test_overlapped_the_longer_side_and_the_sync_are_the_ideal() -> None:
    found = idle_metrics({**SECONDS, "wait": 2.0}, wall_s=8.0, overlapped=True)
    assert found == {"time/wait": 2.0, "time/idle_servers": 3.0, "throughput/overlap_efficiency": 7 / 8}
    longer = idle_metrics({**SECONDS, "update": 9.0}, wall_s=11.0, overlapped=True)
    assert longer == {"time/wait": 0.0, "time/idle_servers": 6.0, "throughput/overlap_efficiency": 1.0}


def test_servers_that_measure_beside_the_trainer_are_not_idle() -> None:
    assert idle_metrics({"sample": 5.0, "evaluate": 2.0}, wall_s=8.0, overlapped=True)["time/idle_servers"] == 1.0
    assert idle_metrics({"update": 2.0}, wall_s=2.0, overlapped=True)["time/idle_servers"] == 2.0
