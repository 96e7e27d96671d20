"""How long a stop takes: numbers by hand, and what a run measures and says."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_minpro.loop.schedule import train
from megatron_minpro.loop.stop_time import stop_warning
from tests.megatron_minpro.loop.diary import Diary, MakeBatch, small_config

MEASURED: dict[str, float | None] = {"time/longest_update": 28.25, "time/score": 111.0, "time/sync": 6.0, "time/checkpoint": 240.0}


@pytest.mark.parametrize(
    ("metrics", "allowed_s", "words"),
    [
        (MEASURED, 351.0, None),
        (MEASURED, None, None),
        (MEASURED, 350.5, r"^a stop takes up to 351 s \(the scoring of a batch 111\.0 s, a checkpoint 240\.0 s\), "),
        (MEASURED | {"time/score": 9.0}, 200.0, r"^a stop takes up to 269 s \(an update 28\.2 s, .* allows 200: raise it .*STOP_WITHIN"),
        ({"time/longest_update": 28.25}, 28.0, r"up to 29 s \(an update 28\.2 s, a checkpoint 0\.0 s\)"),
        ({"time/checkpoint": None, "time/score": None}, 1.0, None),
    ],
)
def test_the_longest_piece_of_work_and_a_checkpoint_must_fit(
    metrics: dict[str, float | None], allowed_s: float | None, words: str | None
) -> None:
    warning = stop_warning(metrics, allowed_s=allowed_s)
    if words is None:
        assert warning is None
    else:
        assert warning is not None and re.search(words, warning), warning


@pytest.mark.parametrize("schedule", ["serial", "overlapped"])
def test_a_run_measures_its_longest_update_and_warns_once(
    schedule: str, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    diary = Diary(small_config("checkpoint.stop_within_s=60", f"schedule={schedule}"), one_rank_group, make_batch)
    diary.run.checkpoints.seconds = lambda: 100.0  # type: ignore[method-assign]
    update = diary.actor.update

    def slow_at_first(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05 if diary.actor.policy_version % 2 == 0 else 0.0)
        return update(*arguments, **options)

    diary.actor.update = slow_at_first  # type: ignore[method-assign]
    assert train(diary.run) is True
    lines = dict(diary.driver.lines)
    assert "time/longest_update" not in lines[1], "nothing is trained in it"
    assert all(0.05 <= lines[step]["time/longest_update"] <= lines[step]["time/update"] for step in (2, 3, 4, 5))
    assert lines[1]["time/checkpoint"] == 100.0
    assert [record.message.partition("(")[0] for record in caplog.records if "a stop" in record.message] == [
        "global step 0: a stop takes up to 101 s "
    ]
