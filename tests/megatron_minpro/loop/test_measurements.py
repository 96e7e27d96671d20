"""Held-out measurements during training: each one is made under the weights of its step, whatever fails and however the run continues."""

from __future__ import annotations

from itertools import count

import pytest
import torch.distributed as dist

from megatron_minpro.config import RunConfig
from megatron_minpro.loop.schedule import train
from megatron_minpro.loop.servers import ServersFailed
from rollout.client import RolloutFailed
from tests.megatron_minpro.loop.diary import Diary, MakeBatch, small_config
from tests.megatron_minpro.loop.test_stops import OVERLAPPED, ROLLING, SERIAL, stopping_when_asked

SCHEDULES = [
    *[(0, SERIAL, SERIAL), (1, SERIAL, SERIAL), (2, OVERLAPPED, OVERLAPPED), (1, ROLLING, ROLLING)],
    *[(1, OVERLAPPED, SERIAL), (1, SERIAL, OVERLAPPED), (1, ROLLING, SERIAL)],
]


def configs(staleness: int, *hows: tuple[str, ...]) -> list[RunConfig]:
    common = (f"staleness={staleness}", "evaluation.every=1", "checkpoint.every=100")
    return [small_config(*common, *how) for how in hows]


def watch(diary: Diary) -> dict[str, int]:
    """Labels of the measurements that succeed, with their policy versions."""
    evaluate, measured = diary.driver.evaluate, dict[str, int]()

    def note(label: str, *, policy_version: int) -> dict[str, float]:
        result = evaluate(label, policy_version=policy_version)
        assert measured.setdefault(label, policy_version) == policy_version
        return result

    diary.driver.evaluate = note  # type: ignore[method-assign]
    return measured


def assert_made_up(stopped: Diary, measured: dict[str, int], next_config: RunConfig, expected: dict[str, int]) -> None:
    """What `stopped` did not measure, the next attempt does; what both did, they did under the same weights."""
    resumed = stopped.continued(next_config)
    made_up = watch(resumed)
    assert train(resumed.run, unfinished=stopped.unfinished) is True
    assert measured | made_up == made_up | measured == expected


@pytest.mark.parametrize(("staleness", "how", "next_how"), SCHEDULES)
def test_a_measurement_that_lost_its_servers_is_made_up_after_the_resume(
    staleness: int, how: tuple[str, ...], next_how: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    """Whichever call to the servers fails, that of a measurement or of a batch."""
    config, next_config = configs(staleness, how, next_how)
    whole = Diary(config, one_rank_group, make_batch)
    expected = watch(whole)
    train(whole.run)
    assert len(expected) == whole.run.last_step - 1
    for failing_call in range(1, whole.driver.asked + 1):
        failed = Diary(config, one_rank_group, make_batch)
        measured = watch(failed)
        failed.driver.trouble = {failing_call: RolloutFailed("no server answered within 3 s")}
        with pytest.raises(ServersFailed):
            train(failed.run)
        assert_made_up(failed, measured, next_config, expected)


@pytest.mark.parametrize(("staleness", "how", "next_how"), SCHEDULES)
def test_a_stop_costs_no_measurement(
    staleness: int, how: tuple[str, ...], next_how: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    config, next_config = configs(staleness, how, next_how)
    whole = Diary(config, one_rank_group, make_batch)
    expected = watch(whole)
    train(whole.run)
    for times in count(1):
        stopped = Diary(config, one_rank_group, make_batch)
        measured = watch(stopped)
        stopped.run.stop_requested = stopping_when_asked(times)
        if train(stopped.run):
            break
        assert_made_up(stopped, measured, next_config, expected)
