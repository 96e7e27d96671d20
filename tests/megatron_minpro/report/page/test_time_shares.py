from __future__ import annotations

import pytest

from megatron_minpro.report.page.time_shares import time_shares


def test_each_role_fills_the_wall_time_and_says_how_idle_it_was() -> None:
    step = {"time/step": 10.0, "time/update": 4.0, "time/score": 1.0, "time/sync": 0.5, "time/wait": 2.0}
    trainer, servers = time_shares([step | {"time/sample": 6.0, "time/idle_servers": 4.0}] * 2)
    assert [(part.name, part.seconds, part.share) for part in trainer.parts] == [
        ("update", 8.0, 0.4),
        ("score", 2.0, 0.1),
        ("publish weights", 1.0, 0.05),
        ("other", 5.0, pytest.approx(0.25)),
        ("idle", 4.0, 0.2),
    ]
    assert [(part.name, part.seconds, part.idle) for part in servers.parts] == [("sample", 12.0, False), ("idle", 8.0, True)]


def test_phases_that_overlap_take_no_more_than_the_step() -> None:
    _, servers = time_shares([{"time/step": 10.0, "time/sample": 8.0, "time/evaluate": 8.0, "time/idle_servers": 2.0}])
    assert [part.share for part in servers.parts] == [pytest.approx(0.4), pytest.approx(0.4), pytest.approx(0.2)]


def test_without_times_there_are_no_roles() -> None:
    assert time_shares([{"global_step": 0}]) == []
