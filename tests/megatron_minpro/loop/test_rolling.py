"""The overlapped schedule with rolling publish: new weights are there before the batch under way is, and the numbers stay the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_minpro.config import ConfigError
from megatron_minpro.loop.counters import UnfinishedStep
from megatron_minpro.loop.idle import idle_metrics
from megatron_minpro.loop.schedule import train
from megatron_minpro.loop.servers import ServersFailed
from rollout.client import RolloutFailed
from tests.megatron_minpro.loop.diary import Diary, MakeBatch, small_config
from tests.megatron_minpro.loop.test_overlapped import main_thread, numbers, trained

ROLLING = ("rollout.servers=2", "rollout.publish=rolling")


def test_new_weights_do_not_wait_for_the_batch_under_way(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("staleness=1", *ROLLING), one_rank_group, make_batch)
    offered = threading.Event()
    collect, publish = diary.driver.collect, diary.driver.publish

    def long_tail(step: int, *, policy_version: int) -> Any:
        assert step != 1 or offered.wait(timeout=60), "batch 1 was waited for before the weights of step 2 were published"
        return collect(step, policy_version=policy_version)

    def tell(policy_version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> str | None:
        offered.set()
        return publish(policy_version, tensors)

    diary.driver.collect, diary.driver.publish = long_tail, tell  # type: ignore[method-assign]
    assert train(diary.run) is True
    assert main_thread(diary) == [
        *[("draw", 0), ("keep", 0)],
        *[("draw", 1), ("score", 0), ("record", 0, None), ("keep", 0), ("update", 0), ("update", 1), ("publish", 2, [2.0])],
        *[("draw", 2), ("score", 0), ("record", 1, 0), ("keep", 2), ("update", 2), ("update", 3), ("publish", 4, [4.0])],
        *[("draw", 3), ("score", 2), ("record", 2, 1), ("save", 3), ("keep", 4), ("update", 4), ("update", 5)],
        *[("score", 4), ("record", 3, 2), ("save", 4), ("update", 6), ("update", 7), ("publish", 8, [8.0])],
        *[("record", 4, 3), ("save", 5), ("wait",)],
    ]


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize("settings", [(), ("behaviour_logprobs=engine",), ("evaluation.every=2", "checkpoint.every=1")])
def test_numbers_are_those_of_the_serial_schedule(
    staleness: int, settings: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    def run(*how: str) -> Diary:
        diary = Diary(small_config(f"staleness={staleness}", "num_global_steps=6", *how, *settings), one_rank_group, make_batch)
        assert train(diary.run) is True
        return diary

    serial, rolling = run("schedule=serial"), run(*ROLLING)
    assert numbers(rolling) == numbers(serial)
    assert trained(rolling) == trained(serial)
    for what in ("save", "sample", "evaluate"):
        assert sorted(line for line in rolling.lines if line[0] == what) == sorted(line for line in serial.lines if line[0] == what)


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
@pytest.mark.parametrize("how", [ROLLING, ("schedule=serial",)], ids=["rolling", "serial"])
def test_a_batch_that_fails_beside_the_next_leaves_a_state_that_resumes(
    failing_call: int, how: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    whole = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    train(whole.run)
    failed = Diary(small_config("staleness=1", *ROLLING), one_rank_group, make_batch)
    failed.driver.trouble = {failing_call: RolloutFailed("no server answered within 3 s")}
    with pytest.raises(ServersFailed, match="no server answered"):
        train(failed.run)
    unfinished = None
    if failing_call > 1:  # step 0 trains nothing: its state is that of a whole step
        [(_, step, unfinished)] = [line for line in failed.lines if line[0] == "save inside"]
        assert (step, failed.actor.kept_version) == (failing_call - 1, 2 * (failing_call - 2))
        assert isinstance(unfinished, UnfinishedStep) and failed.driver.cursor == {"behind": failing_call - 2}

    resumed = Diary(small_config("staleness=1", *how), one_rank_group, make_batch, policy_version=failed.actor.policy_version)
    resumed.actor.kept_version = failed.actor.kept_version
    resumed.run.counters = failed.run.counters
    resumed.run.buffer.restore(failed.run.buffer.waiting())
    assert train(resumed.run, unfinished=unfinished) is True
    assert numbers(failed) + numbers(resumed) == numbers(whole)
    assert failed.actor.trained + resumed.actor.trained == whole.actor.trained


def test_a_stopped_run_continues_by_any_schedule(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    whole = Diary(small_config(), one_rank_group, make_batch)
    train(whole.run)
    found, state = [], whole  # the last one that ran
    for how, stop_after in ((("schedule=serial",), 0), (ROLLING, 1), ((), 2), (ROLLING, 3), (("schedule=serial",), None)):
        part = Diary(small_config(*how), one_rank_group, make_batch, policy_version=state.actor.policy_version, stop_after=stop_after)
        if found:
            part.run.counters = state.run.counters
            part.run.buffer.restore(state.run.buffer.waiting())
        else:
            part.actor.policy_version = 0
        assert train(part.run) is (stop_after is None)
        found += numbers(part)
        state = part
    assert found == numbers(whole)


def test_the_next_batch_waits_for_a_measurement_before_it(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("staleness=1", "evaluation.every=2", *ROLLING), one_rank_group, make_batch)
    evaluate = diary.driver.evaluate
    seen: list[list[tuple]] = []

    def slow(label: str, *, policy_version: int) -> dict[str, float]:
        threading.Event().wait(0.3)
        seen.append([line for line in diary.lines if line[0] in ("draw", "sample")])
        return evaluate(label, policy_version=policy_version)

    diary.driver.evaluate = slow  # type: ignore[method-assign]
    assert train(diary.run) is True
    assert seen[0][-1] == ("draw", 2), "batch 3 is neither drawn nor sampled while the servers are measured before batch 2"


def test_idle_seconds_of_servers_are_their_own() -> None:
    found = idle_metrics(
        {"sample": 30.0, "score": 2.0, "update": 5.0, "sync": 1.0, "wait": 2.0}, wall_s=10.0, overlapped=True, servers_wait_s=0.5
    )
    assert found == {"time/wait": 2.0, "time/idle_servers": 0.5, "throughput/overlap_efficiency": 0.95}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("staleness=0",), "rollout.publish = 'rolling': expected 'together' with staleness = 0 and schedule = None: the serial schedule"),
        (("schedule=serial",), "rollout.publish = 'rolling': expected 'together' with staleness = 2 and schedule = 'serial'"),
        (("rollout.dynamic_sampling={equal: reward, max_rounds: 2}",), "publish = 'rolling': expected 'together' with dynamic_sampling"),
    ],
)
def test_where_nothing_can_roll_it_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        small_config(*ROLLING, *settings)
    assert message in str(refused.value) and "\n" not in str(refused.value)
