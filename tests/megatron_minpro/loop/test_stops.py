"""A stop at every point at which a run looks for one: the next attempt ends with the numbers of a run that was never stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import pytest
import torch.distributed as dist

from megatron_minpro.loop.counters import UnfinishedStep
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


def test_updates_with_other_metrics_are_refused_at_the_next_update(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    config = small_config("actor.updates_per_step=4")
    stopped = Diary(config, one_rank_group, make_batch)
    stopped.run.stop_requested = lambda: stopped.actor.policy_version == 1
    assert train(stopped.run) is False
    unfinished = stopped.unfinished
    assert unfinished is not None and unfinished.updates == 1
    [report] = unfinished.reports
    report["metrics"]["of/older"] = report["metrics"].pop("ratio/unit")
    resumed = stopped.continued(config)
    with pytest.raises(ValueError, match=r"global step 2: its updates have different metrics \(of/older, ratio/unit\)"):
        train(resumed.run, unfinished=unfinished)
    assert resumed.actor.policy_version == 2, "not after all four updates"


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


def hold(diary: Diary, what: str, number: int) -> threading.Event:
    """From its `number`-th call on `driver.collect` or `driver.evaluate` never returns. The event: that call has begun."""
    begun, calls, original = threading.Event(), count(1), getattr(diary.driver, what)

    def held(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= number:
            begun.set()
            threading.Event().wait()
        return original(*arguments, **options)

    setattr(diary.driver, what, held)
    return begun


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(
    ("staleness", "how"),
    [(0, SERIAL), (1, SERIAL), (1, OVERLAPPED), (2, OVERLAPPED), (1, ROLLING), (2, ROLLING)],
    ids=["serial 0", "serial 1", "overlapped 1", "overlapped 2", "rolling 1", "rolling 2"],
)
def test_a_stop_does_not_wait_for_the_batch_that_is_sampled(
    number: int, staleness: int, how: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    config = small_config(f"staleness={staleness}", "checkpoint.every=100", *how)
    whole = Diary(config, one_rank_group, make_batch)
    assert train(whole.run) is True
    stopped = Diary(config, one_rank_group, make_batch)
    begun = hold(stopped, "collect", number)
    stopped.run.stop_requested = lambda: begun.is_set() and stopped.driver.phases[-1:] in (["sample"], ["wait"])
    assert train(stopped.run) is False
    updates = UPDATES if how != SERIAL and number > staleness else 0  # the serial schedule samples before it trains
    assert (0 if stopped.unfinished is None else stopped.unfinished.updates) == updates
    assert stopped.run.counters.rollouts_sampled == 8 * (number - 1) and stopped.driver.cursor["behind"] == (
        number - 2 if number > 1 else None
    )
    resumed = stopped.continued(config)
    assert train(resumed.run, unfinished=stopped.unfinished) is True
    assert_equal_runs([stopped, resumed], whole)


@pytest.mark.parametrize("how", [SERIAL, OVERLAPPED, ROLLING], ids=["serial", "overlapped", "rolling"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_stop_does_not_wait_for_a_measurement(
    number: int, how: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    config = small_config("staleness=1", "num_global_steps=5", "evaluation.every=2", "checkpoint.every=100", *how)
    whole = Diary(config, one_rank_group, make_batch)
    assert train(whole.run, measure=("before", "after")) is True
    stopped = Diary(config, one_rank_group, make_batch)
    begun = hold(stopped, "evaluate", number)
    stopped.run.stop_requested = begun.is_set
    assert train(stopped.run, measure=("before", "after")) is False
    resumed = stopped.continued(config)
    labels = ("before", "after") if number == 1 else ("after",)
    assert train(resumed.run, unfinished=stopped.unfinished, measure=labels) is True
    assert_equal_runs([stopped, resumed], whole)
    measured = [line for part in (stopped, resumed) for line in part.lines if line[0] == "evaluate"]
    assert measured == [line for line in whole.lines if line[0] == "evaluate"] and len(measured) == 4


@pytest.mark.parametrize("how", [SERIAL, OVERLAPPED, ROLLING], ids=["serial", "overlapped", "rolling"])
def test_checkpoints_by_the_clock_change_nothing_and_can_be_continued(
    how: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    settings = ("staleness=1", "checkpoint.every=100", "actor.updates_per_step=4", *how)
    whole = Diary(small_config(*settings), one_rank_group, make_batch)
    assert train(whole.run) is True
    timed = Diary(small_config(*settings, "checkpoint.every_minutes=2.5"), one_rank_group, make_batch)
    timed.run.now = lambda: 60.0 * timed.actor.policy_version  # an update takes a minute
    states: list[tuple[Diary, UnfinishedStep | None]] = []

    def keep(unfinished: UnfinishedStep | None) -> None:
        save(unfinished)
        states.append((timed.continued(small_config(*settings)), unfinished))

    save, timed.run.checkpoints.save = timed.run.checkpoints.save, keep  # type: ignore[method-assign]
    assert train(timed.run) is True
    assert_equal_runs([timed], whole)
    assert [line for line in timed.lines if line[0] == "sample"] == [line for line in whole.lines if line[0] == "sample"]
    saved_at = [0, *(state.actor.policy_version for state, _ in states)]
    assert max(later - earlier for earlier, later in pairwise(saved_at)) == 3 and saved_at[-1] == 16
    assert [unfinished.updates for _, unfinished in states if unfinished is not None][:3] == [3, 2, 1]
    for state, unfinished in states[:-1]:
        assert train(state.run, unfinished=unfinished) is True
        updates = len(state.actor.trained)
        assert state.actor.trained == whole.actor.trained[-updates:]
        assert numbers(state) == numbers(whole)[-len(numbers(state)) :]
