"""A stop at every point at which a run looks for one: the next attempt ends with the numbers of a run that was never stopped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch.distributed as dist

from megatron_minpro.loop.schedule import train
from tests.megatron_minpro.loop.diary import UPDATES, Diary, MakeBatch, small_config
from tests.megatron_minpro.loop.test_overlapped import numbers

SERIAL, OVERLAPPED, ROLLING = ("schedule=serial",), (), ("rollout.servers=2", "rollout.publish=rolling")
COUNTED = ("next_step", "trained_batches", "rollouts_sampled", "rollouts_dropped", "rollouts_trained", "tokens_trained")


def stopping_when_asked(times: int) -> Callable[[], bool]:
    """Says yes when it is asked for the `times`-th time, and ever after."""
    asked = count(1)
    return lambda: next(asked) >= times


def assert_equal_runs(parts: list[Diary], whole: Diary) -> None:
    assert [line for part in parts for line in numbers(part)] == numbers(whole)
    assert [update for part in parts for update in part.actor.trained] == whole.actor.trained
    assert [rate for part in parts for rate in part.actor.learning_rates] == whole.actor.learning_rates
    assert all(getattr(parts[-1].run.counters, name) == getattr(whole.run.counters, name) for name in COUNTED)


@pytest.mark.parametrize(
    ("staleness", "how", "next_how"),
    [
        *[(0, SERIAL, SERIAL), (1, SERIAL, SERIAL), (1, OVERLAPPED, OVERLAPPED), (2, OVERLAPPED, OVERLAPPED)],
        *[(1, ROLLING, ROLLING), (1, SERIAL, OVERLAPPED), (2, OVERLAPPED, SERIAL), (2, SERIAL, ROLLING), (1, ROLLING, SERIAL)],
    ],
)
def test_every_stop_point_continues_to_the_same_numbers(
    staleness: int, how: tuple[str, ...], next_how: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    common = (f"staleness={staleness}", "evaluation.every=2", "checkpoint.every=100")
    config, next_config = small_config(*common, *how), small_config(*common, *next_how)
    whole = Diary(config, one_rank_group, make_batch)
    assert train(whole.run) is True
    places = set()
    for times in count(1):
        stopped = Diary(config, one_rank_group, make_batch)
        stopped.run.stop_requested = stopping_when_asked(times)
        if train(stopped.run):
            break
        resumed = stopped.continued(next_config)
        assert train(resumed.run, unfinished=stopped.unfinished) is True
        assert_equal_runs([stopped, resumed], whole)
        places.add((stopped.run.counters.next_step, 0 if stopped.unfinished is None else stopped.unfinished.updates))
    assert {(step + staleness, updates) for step in range(4) for updates in range(UPDATES)} <= places, "between any two updates"


@pytest.mark.parametrize("dropped", [0, 4])
def test_a_run_that_is_stopped_again_and_again_by_turns_of_schedules(
    dropped: int, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    dynamic = ("rollout.dynamic_sampling={equal: reward, max_rounds: 2}",) if dropped else ()
    schedules = (OVERLAPPED, SERIAL) if dropped else (OVERLAPPED, SERIAL, ROLLING)
    whole = Diary(small_config("staleness=1", *dynamic), one_rank_group, make_batch)
    whole.driver.num_dropped = dropped
    assert train(whole.run) is True

    parts = [Diary(small_config("staleness=1", *dynamic), one_rank_group, make_batch)]
    parts[0].driver.num_dropped = dropped
    parts[0].run.stop_requested = stopping_when_asked(4)
    while not train(parts[-1].run, unfinished=parts[-2].unfinished if len(parts) > 1 else None):
        parts.append(parts[-1].continued(small_config("staleness=1", *schedules[len(parts) % len(schedules)], *dynamic)))
        parts[-1].run.stop_requested = stopping_when_asked(4)
    assert len(parts) >= 4
    assert_equal_runs(parts, whole)
