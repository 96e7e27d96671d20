"""The overlapped schedule against the serial one, with an actor and a driver that only keep a diary: order, numbers, failures, resume."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_minpro.config import ConfigError
from megatron_minpro.loop.counters import UnfinishedStep
from megatron_minpro.loop.schedule import train
from megatron_minpro.loop.servers import ServersFailed
from rollout.client import RolloutFailed, WeightsMissing
from tests.megatron_minpro.loop.diary import Diary, MakeBatch, small_config

BESIDE = ("sample", "evaluate")  # what happens in the sampling thread


def main_thread(diary: Diary) -> list[tuple]:
    return [line for line in diary.lines if line[0] not in BESIDE]


def sampling_thread(diary: Diary) -> list[tuple]:
    return [line for line in diary.lines if line[0] in BESIDE]


def numbers(diary: Diary) -> list[tuple[int, dict[str, float]]]:
    """Metrics without times."""
    return [
        (step, {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))})
        for step, line in diary.driver.lines
    ]


def trained(diary: Diary) -> list[tuple[str, Any]]:
    return [("versions and pi_old", diary.actor.trained), ("rates", diary.actor.learning_rates), ("weights", diary.actor.corrections)]


def test_four_batches_at_staleness_two_by_hand(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    assert train(diary.run) is True
    assert main_thread(diary) == [
        ("keep", 0),
        *[("score", 0), ("record", 0, None), ("keep", 0)],
        *[("score", 0), ("record", 1, None), ("keep", 0), ("update", 0), ("update", 1), ("publish", 2, [2.0])],
        *[("score", 0), ("record", 2, 0), ("save", 3), ("keep", 2), ("update", 2), ("update", 3)],
        *[("score", 2), ("record", 3, 1), ("save", 4), ("update", 4), ("update", 5)],
        *[("record", 4, 2), ("update", 6), ("update", 7), ("publish", 8, [8.0])],
        *[("record", 5, 3), ("save", 6), ("wait",)],
    ]
    assert sampling_thread(diary) == [("sample", 0, 0), ("sample", 1, 0), ("sample", 2, 0), ("sample", 3, 2)]
    assert len(diary.run.buffer) == 0


@pytest.mark.parametrize("schedule", ["overlapped", "serial"])
def test_a_checkpoint_draws_the_batch_under_way_again(schedule: str, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(f"schedule={schedule}", "checkpoint.every=1"), one_rank_group, make_batch)
    found: list[tuple[int, Any]] = []
    save = diary.run.checkpoints.save

    def note(*arguments: Any) -> None:
        found.append((diary.run.counters.next_step, diary.driver.cursor["behind"]))
        save(*arguments)

    diary.run.checkpoints.save = note  # type: ignore[method-assign]
    train(diary.run)
    assert found == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (6, 3)]


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("behaviour_logprobs=engine",),
        ("corrections.truncated_is.max_weight=1.5", "evaluation.every=2", "checkpoint.every=1"),
        ("rollout.dynamic_sampling={equal: reward, max_rounds: 2}",),
    ],
    ids=["plain", "engine", "corrected", "dynamic"],
)
def test_numbers_are_those_of_the_serial_schedule(
    staleness: int, settings: tuple[str, ...], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    def run(schedule: str) -> Diary:
        config = small_config(f"staleness={staleness}", "num_global_steps=6", f"schedule={schedule}", *settings)
        diary = Diary(config, one_rank_group, make_batch)
        diary.driver.num_dropped = 4 if "dynamic" in str(settings) else 0
        assert train(diary.run) is True
        return diary

    serial, overlapped = run("serial"), run("overlapped")
    assert numbers(overlapped) == numbers(serial)
    assert trained(overlapped) == trained(serial)
    assert sampling_thread(overlapped) == sampling_thread(serial)
    assert [line for line in overlapped.lines if line[0] == "save"] == [line for line in serial.lines if line[0] == "save"]


def test_sampling_and_training_happen_at_the_same_time(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    updating = threading.Event()
    collect, update = diary.driver.collect, diary.actor.update

    def wait_for_the_update(step: int, *, policy_version: int) -> Any:
        assert step == 0 or updating.wait(timeout=60), "batch 1 came before the update of batch 0 had begun"
        return collect(step, policy_version=policy_version)

    def tell(*arguments: Any, **options: Any) -> Any:
        updating.set()
        return update(*arguments, **options)

    diary.driver.collect, diary.actor.update = wait_for_the_update, tell  # type: ignore[method-assign]
    assert train(diary.run) is True


def test_a_stopped_run_continues_to_the_same_numbers(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    whole = Diary(small_config(), one_rank_group, make_batch)
    train(whole.run)
    stopped = Diary(small_config(), one_rank_group, make_batch, stop_after=2)
    assert train(stopped.run) is False
    assert main_thread(stopped)[-3:] == [("record", 2, 0), ("save", 3), ("wait",)]
    assert len(stopped.run.buffer) == 2

    resumed = Diary(small_config("schedule=serial"), one_rank_group, make_batch, policy_version=stopped.actor.policy_version)
    resumed.run.counters = stopped.run.counters
    resumed.run.buffer.restore(stopped.run.buffer.waiting())
    assert train(resumed.run) is True
    assert numbers(stopped) + numbers(resumed) == numbers(whole)
    assert stopped.actor.trained + resumed.actor.trained == whole.actor.trained


def test_lost_weights_of_the_sampling_version_are_published_again(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    undisturbed = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    train(undisturbed.run)
    diary = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    diary.driver.trouble = {3: WeightsMissing("http://b holds version -1, wanted 2")}  # while batch 1 is trained to version 4
    assert train(diary.run) is True
    published = [line for line in diary.lines if line[0] == "publish"]
    assert published[:3] == [("publish", 2, [2.0]), ("publish", 2, [2.0]), ("publish", 4, [4.0])]
    assert numbers(diary) == numbers(undisturbed) and diary.actor.trained == undisturbed.actor.trained


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", ["overlapped", "serial"])
def test_servers_that_fail_in_mid_step_leave_a_state_that_resumes_exactly(
    failing_call: int, schedule: str, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    whole = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    train(whole.run)
    failed = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    failed.driver.trouble = {failing_call: RolloutFailed("no server answered within 3 s")}
    with pytest.raises(ServersFailed, match="no server answered"):
        train(failed.run)
    unfinished = None
    if failing_call > 1:  # step 0 trains nothing: its state is that of a whole step
        [(_, step, unfinished)] = [line for line in failed.lines if line[0] == "save inside"]
        assert (step, failed.actor.kept_version) == (failing_call - 1, 2 * (failing_call - 2))
        assert isinstance(unfinished, UnfinishedStep) and failed.lines[-1] == ("wait",)

    resumed = Diary(
        small_config("staleness=1", f"schedule={schedule}"), one_rank_group, make_batch, policy_version=failed.actor.policy_version
    )
    resumed.actor.kept_version = failed.actor.kept_version
    resumed.run.counters = failed.run.counters
    resumed.run.buffer.restore(failed.run.buffer.waiting())
    assert train(resumed.run, unfinished=unfinished) is True
    assert numbers(failed) + numbers(resumed) == numbers(whole)
    assert failed.actor.trained + resumed.actor.trained == whole.actor.trained
    counted = ("next_step", "trained_batches", "rollouts_sampled", "rollouts_trained", "tokens_trained")
    assert all(getattr(resumed.run.counters, name) == getattr(whole.run.counters, name) for name in counted)


def test_half_a_step_that_is_completed_is_followed_by_its_checkpoint(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    failed = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    failed.driver.trouble = {4: RolloutFailed("no server answered")}  # batch 3, the last one
    with pytest.raises(ServersFailed):
        train(failed.run)
    [unfinished] = [line[2] for line in failed.lines if line[0] == "save inside"]
    resumed = Diary(small_config("staleness=1"), one_rank_group, make_batch, policy_version=failed.actor.policy_version)
    resumed.actor.kept_version = failed.actor.kept_version
    resumed.run.counters = failed.run.counters
    resumed.run.buffer.restore(failed.run.buffer.waiting())
    train(resumed.run, unfinished=unfinished)
    # Where sampling ends a checkpoint is kept for a run that is made longer.
    assert [line for line in resumed.lines if line[0] == "save"] == [("save", 4), ("save", 5)]


def test_any_other_error_of_the_sampling_thread_reaches_the_loop(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    diary.driver.trouble = {2: ValueError("reward mine:f returned 'x'")}
    with pytest.raises(ValueError, match="returned 'x'"):
        train(diary.run)


def test_a_step_is_never_shorter_than_its_ideal(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    logprobs = diary.actor.logprobs

    def slowly(sequences: Any, **given: Any) -> Any:
        time.sleep(0.02)  # a batch is scored in the step after the one that samples it
        return logprobs(sequences, **given)

    diary.actor.logprobs = slowly  # type: ignore[method-assign]
    train(diary.run)
    found = [line["throughput/overlap_efficiency"] for _, line in diary.driver.lines]
    assert len(found) == 6 and all(0 <= share <= 1 for share in found)
    assert all(line["time/step"] >= 0.02 for step, line in diary.driver.lines if 1 <= step <= 4)


def test_the_console_is_told_what_the_trainer_does(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("staleness=1", "num_global_steps=2"), one_rank_group, make_batch)
    train(diary.run)
    assert diary.driver.phases == [
        "wait",
        "score",
        "update",
        "update",
        "wait",
        "score",
        "update",
        "update",
        "sync",
    ]  # two mini-batches each
    assert diary.driver.activities == ["sample", "sample"]


def test_a_batch_is_counted_before_its_line_of_metrics_is_written(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    train(diary.run)
    assert diary.driver.sampled == {0: 8, 1: 16, 2: 24, 3: 32}  # 8 responses a batch
    assert [line["total/rollouts_sampled"] for _, line in diary.driver.lines] == [8, 16, 24, 32, 32, 32]


def test_on_policy_there_is_nothing_to_overlap() -> None:
    assert small_config("staleness=0").effective_schedule == "serial"
    assert small_config("staleness=1").effective_schedule == "overlapped"
    with pytest.raises(ConfigError, match="schedule = 'overlapped': expected staleness of at least 1"):
        small_config("staleness=0", "schedule=overlapped")


def test_the_measurement_before_a_batch_uses_the_weights_that_sample_it(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("evaluation.every=3"), one_rank_group, make_batch)
    train(diary.run)
    assert sampling_thread(diary)[3:] == [("evaluate", "step_000003", 2), ("sample", 3, 2)]


def test_a_batch_is_never_scored_under_weights_that_are_gone(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("staleness=1"), one_rank_group, make_batch)
    diary.actor.keep_weights = lambda *, place: None  # type: ignore[method-assign]  # somebody forgot to keep them
    with pytest.raises(RuntimeError, match=r"^policy version 0 is wanted; the actor is at 2 and keeps None$"):
        train(diary.run)
