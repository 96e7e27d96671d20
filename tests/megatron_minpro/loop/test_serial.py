"""The serial schedule with an actor and a driver that only keep a diary: order, staleness, drain, stop, resume; and its pure functions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_minpro.config import RunConfig
from megatron_minpro.loop.sampled_batch import SampledBatch, sampling_metrics
from megatron_minpro.loop.schedule import train
from megatron_minpro.loop.servers import ServersFailed, publish
from megatron_minpro.loop.update import make_loss_function, minibatch_statistics
from megatron_minpro.objectives import make_objective
from megatron_minpro.objectives.effective_sample_size import weight_sums
from parallel.actor import UpdateReport
from parallel.sequence_shard import SequenceShard
from parallel.token_sequence import TokenSequence
from rollout.client import RolloutFailed, WeightsMissing
from tests.megatron_minpro.loop import diary as diaries
from tests.megatron_minpro.loop.diary import Diary, MakeBatch, MakeSample


def small_config(*overrides: str) -> RunConfig:
    return diaries.small_config("schedule=serial", *overrides)


def test_four_batches_at_staleness_two_by_hand(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    assert train(diary.run) is True
    assert diary.lines == [
        *[("sample", 0, 0), ("score", 0), ("record", 0, None)],
        *[("sample", 1, 0), ("score", 0), ("record", 1, None)],
        *[("sample", 2, 0), ("score", 0), ("update", 0), ("update", 1), ("publish", 2, [2.0]), ("record", 2, 0), ("save", 3)],
        *[("sample", 3, 2), ("score", 2), ("update", 2), ("update", 3), ("record", 3, 1)],
        ("save", 4),  # sampling ends here
        *[("update", 4), ("update", 5), ("record", 4, 2)],  # nobody samples with these weights
        *[("update", 6), ("update", 7), ("publish", 8, [8.0]), ("record", 5, 3), ("save", 6), ("wait",)],
    ]
    counters = diary.run.counters
    assert (counters.next_step, counters.trained_batches, counters.rollouts_sampled, counters.rollouts_trained) == (6, 4, 32, 32)
    assert counters.tokens_trained == 4 * 8 * 2
    assert len(diary.run.buffer) == 0


def test_behaviour_logprobs_are_those_of_the_weights_that_sampled(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    train(diary.run)
    # Versions at sampling: 0, 0, 0, 2; each batch gives two updates.
    assert [seen for _, seen in diary.actor.trained] == [{-1 / 8}] * 6 + [{-3 / 8}] * 2


def test_the_engines_own_logprobs_are_trained_when_configured(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("behaviour_logprobs=engine"), one_rank_group, make_batch)
    train(diary.run)
    batch = make_batch(0, groups=4)
    expected = {float(x) for sample in batch.samples for x in sample.engine_logprobs}
    assert set().union(*(seen for _, seen in diary.actor.trained)) == expected


def test_corrections_compare_server_and_trainer_and_leave_pi_old_alone(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    def run(*overrides: str) -> Diary:
        diary = Diary(small_config(*overrides), one_rank_group, make_batch)
        # The server says half the probability that the trainer says, and 16 times of it.
        diary.driver.fields = lambda version: {"engine_logprobs": (-(version + 1) / 8 - math.log(2), -(version + 1) / 8 + math.log(16))}
        train(diary.run)
        return diary

    plain, corrected = run(), run("corrections.truncated_is.max_weight=1.5")
    assert plain.actor.corrections == []
    assert corrected.actor.corrections == pytest.approx([1.5, 1 / 16] * 32), "also for batches that waited while the weights moved"
    assert corrected.actor.trained == plain.actor.trained
    line = dict(corrected.driver.lines)[1]
    assert (line["correction/weight"], line["correction/truncated"]) == (pytest.approx((1.5 + 1 / 16) / 2), 0.5)
    assert not [name for _, line in plain.driver.lines for name in line if name.startswith("correction")]


def test_dropped_responses_are_counted_and_seen_in_the_sampling_metrics(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("rollout.dynamic_sampling={equal: reward, max_rounds: 2}"), one_rank_group, make_batch)
    diary.driver.num_dropped = 4  # of 8 samples, rewards 0, 1, 0, 1, ...
    diary.driver.fields = lambda version: {"reward": 1.0}
    train(diary.run)
    counters = diary.run.counters
    assert (counters.rollouts_sampled, counters.rollouts_trained, counters.rollouts_dropped) == (32, 16, 16)
    first, later, last = (dict(diary.driver.lines)[step] for step in (0, 2, 5))
    assert (first["rollout/dropped"], first["rollout/rounds"], first["rollout/equal_groups"]) == (4, 2, 1)
    assert (first["reward/zero_variance_groups"], first["rollout/tokens"]) == (1.0, 16)
    waiting = 2 * 4  # the batches of steps 1 and 2
    assert later["total/rollouts_sampled"] == later["total/rollouts_trained"] + waiting + later["total/rollouts_dropped"] == 24
    assert last["total/rollouts_sampled"] == last["total/rollouts_trained"] + last["total/rollouts_dropped"] == 32


def test_ratios_of_one_at_a_lag_are_warned_of_once(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    train(diary.run)
    assert "every ratio is 1" not in caplog.text
    diary = Diary(small_config(), one_rank_group, make_batch)
    diary.actor.unit_ratios = torch.tensor([3.0, 3.0])
    train(diary.run)
    [warning] = [record for record in caplog.records if "every ratio is 1" in record.message]
    assert (warning.levelname, warning.message[:20]) == ("WARNING", "global step 2: every")


def test_metrics_of_a_step_by_hand(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    train(diary.run)
    lines = dict(diary.driver.lines)
    assert "loss/total" not in lines[1] and "reward/sampled" not in lines[4]
    assert (lines[3]["batch/lag_min"], lines[3]["batch/lag_max"], lines[3]["batch/sampled_at_step"]) == (2, 3, 1)
    assert (lines[5]["batch/lag_min"], lines[5]["batch/lag_max"]) == (4, 5)
    assert (lines[3]["loss/total"], lines[3]["policy/entropy"], lines[3]["update/grad_norm"]) == (3.5, 3.5, 0.5)
    assert (lines[3]["batch/waiting"], lines[3]["policy/version"], lines[3]["batch/tokens"]) == (2, 4, 16)
    # Engine log-probs are -0.1 (t + 1) - n for sample n; the actor says -1/8 at version 0.
    gaps = [abs(-0.1 * (t + 1) - n + 1 / 8) for n in range(8) for t in range(2)]
    assert lines[0]["engine_logprob_gap/mean"] == pytest.approx(sum(gaps) / len(gaps))
    assert lines[0]["engine_logprob_gap/max"] == pytest.approx(max(gaps))
    assert lines[0]["time/step"] >= lines[0]["time/sample"] + lines[0]["time/score"]


def test_a_lag_other_than_promised_stops_the_run(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    update = diary.actor.update

    def count_twice(*arguments: Any, **options: Any) -> UpdateReport:
        diary.actor.policy_version += 1
        return update(*arguments, **options)

    diary.actor.update = count_twice  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^batch of step 0: policy lag 0 to 2 updates, staleness 2 promises 0 to 1$"):
        train(diary.run)


def test_scoring_under_other_weights_than_sampled_stops_the_run(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    collect = diary.driver.collect

    def move_the_weights(step: int, *, policy_version: int) -> SampledBatch:
        diary.actor.policy_version += 1
        return collect(step, policy_version=policy_version)

    diary.driver.collect = move_the_weights  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^policy version 0 is wanted; the actor is at 1 and keeps None$"):
        train(diary.run)


def test_a_stop_saves_and_the_next_attempt_ends_as_if_never_stopped(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    whole = Diary(small_config(), one_rank_group, make_batch)
    train(whole.run)

    stopped = Diary(small_config(), one_rank_group, make_batch, stop_after=3)
    assert train(stopped.run) is False
    assert stopped.lines[-3:] == [("record", 3, 1), ("save", 4), ("wait",)]

    resumed = Diary(small_config(), one_rank_group, make_batch, policy_version=stopped.actor.policy_version)
    resumed.run.counters = stopped.run.counters
    resumed.run.buffer.restore(stopped.run.buffer.waiting())
    assert train(resumed.run) is True

    def steps(diary: Diary) -> list[tuple]:
        return [line for line in diary.lines if line[0] not in ("save", "wait")]

    assert steps(stopped) + steps(resumed) == steps(whole)
    assert stopped.actor.trained + resumed.actor.trained == whole.actor.trained
    counted = ("next_step", "trained_batches", "rollouts_sampled", "rollouts_trained", "tokens_trained")
    assert all(getattr(resumed.run.counters, name) == getattr(whole.run.counters, name) for name in counted)


def test_a_prolonged_run_ends_as_if_it_had_been_that_long_from_the_start(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    whole = Diary(small_config("num_global_steps=7"), one_rank_group, make_batch)
    train(whole.run)

    short = Diary(small_config(), one_rank_group, make_batch)
    kept: dict[str, Any] = {}

    def save(unfinished: object) -> None:
        if short.run.counters.next_step == short.run.config.num_global_steps:
            kept.update(counters=replace(short.run.counters), waiting=short.run.buffer.waiting(), version=short.actor.policy_version)

    short.run.checkpoints.save = save  # type: ignore[method-assign]
    train(short.run)
    prolonged = Diary(small_config("num_global_steps=7"), one_rank_group, make_batch, policy_version=kept["version"])
    prolonged.run.counters = kept["counters"]
    prolonged.run.buffer.restore(kept["waiting"])
    assert train(prolonged.run) is True

    start = whole.lines.index(("sample", 4, 4))
    assert [line for line in prolonged.lines if line[0] != "save"] == [line for line in whole.lines[start:] if line[0] != "save"]
    assert prolonged.actor.trained == whole.actor.trained[4:]


def test_weights_that_no_server_holds_are_published_again(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    undisturbed = Diary(small_config("evaluation.every=4"), one_rank_group, make_batch)
    train(undisturbed.run)
    diary = Diary(small_config("evaluation.every=4"), one_rank_group, make_batch)
    diary.driver.trouble = {call: WeightsMissing("no server holds it") for call in (2, 5, 6)}
    diary.driver.void = {3: "one was killed meanwhile"}
    assert train(diary.run) is True
    publish_4, sample_3 = ("publish", 4, [4.0]), ("sample", 3, 2)
    assert diary.lines[4:6] == [("publish", 0, [0.0]), ("sample", 1, 0)]
    at = diary.lines.index(sample_3)
    assert diary.lines[at : at + 5] == [sample_3, ("publish", 2, [2.0]), sample_3, ("publish", 2, [2.0]), sample_3]
    assert diary.lines.count(publish_4) == 1
    assert [line for number, line in enumerate(diary.lines) if number not in (3, 4, at, at + 1, at + 2, at + 3)] == undisturbed.lines
    assert diary.actor.trained == undisturbed.actor.trained


def test_a_publish_that_no_server_took_is_made_up_for(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("debug.check_weights=true"), one_rank_group, make_batch)
    diary.driver.fields = lambda version: {"engine_logprobs": (-(version + 1) / 8,) * 2}
    diary.driver.trouble = {4: WeightsMissing("no server holds it")}
    diary.driver.void = {1: "the only server is dead"}
    assert train(diary.run) is True
    at = diary.lines.index(("publish", 2, [2.0]))
    sample, check = ("sample", 3, 2), ("check", [2.0])
    assert [line for line in diary.lines[at + 1 :] if line[0] in ("sample", "publish", "check")][:4] == [
        sample,
        ("publish", 2, [2.0]),
        check,
        sample,
    ]


@pytest.mark.parametrize("trouble", ["no answer", "weights cannot be published"])
def test_servers_that_fail_for_good_end_the_run_with_a_checkpoint(
    trouble: str, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    if trouble == "no answer":
        diary.driver.trouble = {2: RolloutFailed("no answer")}
    else:
        diary.driver.trouble = {call: WeightsMissing("no server holds it") for call in range(2, 10)}
        diary.driver.void = dict.fromkeys(range(1, 10), trouble)
    with pytest.raises(ServersFailed, match=f"^{trouble}$"):
        train(diary.run)
    assert diary.lines[-2:] == [("save", 1), ("wait",)]
    assert (diary.run.counters.next_step, diary.run.counters.rollouts_sampled, len(diary.run.buffer)) == (1, 8, 1)
    assert diary.driver.published == (0 if trouble == "no answer" else 3)


def test_servers_that_fail_during_an_evaluation_cost_no_step(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("evaluation.every=2"), one_rank_group, make_batch)
    diary.driver.trouble = {3: RolloutFailed("no answer")}
    with pytest.raises(ServersFailed, match=r"^no answer$"):
        train(diary.run)
    assert diary.lines[-3:] == [("evaluate", "step_000002", 0), ("save", 2), ("wait",)]


@pytest.mark.parametrize("schedule", ["serial", "overlapped"])
def test_a_measurement_that_failed_is_made_by_the_next_attempt(
    schedule: str, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    failed = Diary(small_config("evaluation.every=2"), one_rank_group, make_batch)
    failed.driver.trouble = {3: RolloutFailed("no answer")}
    with pytest.raises(ServersFailed):
        train(failed.run)
    resumed = Diary(small_config("evaluation.every=2", f"schedule={schedule}"), one_rank_group, make_batch)
    resumed.run.counters = failed.run.counters
    resumed.run.buffer.restore(failed.run.buffer.waiting())
    assert train(resumed.run) is True
    assert [line for line in resumed.lines if line[0] == "evaluate"] == [("evaluate", "step_000002", 0), ("evaluate", "step_000004", 4)]


def test_a_stop_in_the_last_step_is_the_end(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch, stop_after=5)
    assert train(diary.run) is True
    assert diary.lines[-2:] == [("save", 6), ("wait",)]


@pytest.mark.parametrize(("stop_after", "last"), [(None, 5), (2, 2)])
def test_checkpoints_that_fail_are_an_error_where_the_run_ends(
    stop_after: int | None, last: int, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch
) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch, stop_after=stop_after)
    diary.run.checkpoints.missing = "no space"  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"^no space$"):
        train(diary.run)
    assert [line[1] for line in diary.lines if line[0] == "record"][-1] == last
    assert diary.lines[-1] == ("wait",)


def test_servers_that_fail_with_a_full_disk_are_both_told(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    diary.run.checkpoints.missing = "no space"  # type: ignore[attr-defined]
    diary.driver.trouble = {2: RolloutFailed("all servers are gone")}
    with pytest.raises(ServersFailed, match=r"^all servers are gone; no space$"):
        train(diary.run)


def test_held_out_prompts_are_measured_every_so_many_steps(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("evaluation.every=2"), one_rank_group, make_batch)
    train(diary.run)
    measured = [line for line in diary.lines if line[0] == "evaluate"]
    assert measured == [("evaluate", "step_000002", 0), ("evaluate", "step_000004", 4)]
    for off in ("evaluation.every=0", "evaluation=null"):
        never = Diary(small_config(off), one_rank_group, make_batch)
        train(never.run)
        assert [line for line in never.lines if line[0] == "evaluate"] == []


def test_weights_are_checked_after_every_publication_when_asked(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("debug.check_weights=true"), one_rank_group, make_batch)
    diary.driver.fields = lambda policy_version: {"engine_logprobs": (-(policy_version + 1) / 8,) * 2}  # as the actor scores them
    train(diary.run)
    published = [(line[0], line[-1]) for line in diary.lines if line[0] in ("publish", "check")]
    assert published == [(what, [version]) for version in (2.0, 8.0) for what in ("publish", "check")]


def test_a_gap_that_rounding_does_not_explain_ends_the_run(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config("rollout.logprob_gap_action=stop"), one_rank_group, make_batch)
    diary.driver.fields = lambda version: {"engine_logprobs": (-(version + 1) / 8 + (0.01 if version else 0.0),) * 2}
    with pytest.raises(RuntimeError, match=r"differ by 0\.01 on average, rollout\.max_logprob_gap allows 0\.0001"):
        train(diary.run)
    assert diary.lines[-1] == ("score", 2), "the first batch that was sampled with another version"


def test_a_gap_is_warned_of_once_where_the_configuration_says_warn(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(Diary(small_config("rollout.max_logprob_gap=null"), one_rank_group, make_batch).run)
    assert [record.message[:29] for record in caplog.records if "log-probs" in record.message] == ["global step 0: server and trai"[:29]]


def test_a_rank_without_a_driver_streams_its_weights_and_keeps_nothing(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    diary = Diary(small_config(), one_rank_group, make_batch)
    diary.run.driver = None
    diary.actor.export_weights = lambda: iter(())  # type: ignore[method-assign]
    publish(diary.run)
    diary.actor.export_weights = lambda: iter([("weight", torch.zeros(1))])  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="only rank 0"):
        publish(diary.run)


def test_updates_get_the_rate_of_their_own_policy_version(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch) -> None:
    config = small_config("actor.optimizer.learning_rate=0.6", "actor.optimizer.warm_up_steps=3")
    diary = Diary(config, one_rank_group, make_batch)
    train(diary.run)
    assert diary.actor.learning_rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    sample_size = "actor.optimizer.sample_size={level: sequence, exponent: 1.0}"
    config = small_config("actor.optimizer.learning_rate=0.6", "actor.optimizer.warm_up_steps=0", sample_size)
    diary = Diary(config, one_rank_group, make_batch)
    sums = weight_sums(torch.tensor([4, 1, 0.5, 0.5]).log(), torch.ones(4, dtype=torch.float64))
    diary.actor.weight_sums = {"effective_sample_size/sequence/weight_sums": sums}
    train(diary.run)
    assert diary.actor.learning_rates == pytest.approx([0.6 * 18 / 35] * 8)


@pytest.mark.parametrize("behaviour", ["trainer", "engine"])
def test_entropies_of_the_sampling_weights_go_with_the_batch(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, behaviour: str
) -> None:
    """The actor's entropy is (version + 1) / 4: at staleness 1 each batch keeps that of the version that sampled it, not of the newest."""
    estr = "objective={name: estr, tau: 1.0}"
    diary = Diary(small_config(estr, "staleness=1", f"behaviour_logprobs={behaviour}"), one_rank_group, make_batch)
    train(diary.run)
    versions = [0, 0, 2, 4]  # of four global steps of two updates each: the first two batches are sampled before any
    per_batch = len(diary.actor.entropies) // len(versions)
    assert per_batch > 0 and diary.actor.entropies == [(version + 1) / 4 for version in versions for _ in range(per_batch)]
    plain = Diary(small_config(f"behaviour_logprobs={behaviour}"), one_rank_group, make_batch)
    train(plain.run)
    assert plain.actor.entropies == []


def test_sampling_metrics_by_hand(make_sample: MakeSample) -> None:
    described = [  # reward, correct, finish reason, response tokens
        (1.0, True, "stop", 2),
        (1.0, True, "stop", 4),
        (0.0, False, "length", 8),
        (1.0, True, "stop", 2),
        (0.0, False, "length", 8),
        (0.0, False, "stop", 6),
    ]
    samples = tuple(
        make_sample(n, reward=reward, correct=correct, finish_reason=reason, response=tokens)
        for n, (reward, correct, reason, tokens) in enumerate(described)
    )
    assert sampling_metrics(samples, group_size=2) == pytest.approx(
        {
            "reward/sampled": 0.5,
            "reward/correct": 0.5,
            "reward/zero_variance_groups": 2 / 3,
            "rollout/tokens": 30,
            "rollout/length": 5.0,
            "rollout/truncated": 1 / 3,
        }
    )


def test_the_loss_reads_the_objectives_streams_and_adds_the_entropy() -> None:
    shard = SequenceShard.whole((3,))
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    tokens: dict[str, Any] = dict(
        logprobs_T=logprobs,
        entropy_T=torch.tensor([9.0, 0.25, 0.5]),
        loss_mask_T=torch.tensor([False, True, True]),
        streams={"behaviour_logprobs": torch.tensor([0.0, -2.0, -3.0]), "advantages": torch.tensor([0.0, 2.0, 2.0])},
        shard=shard,
        global_tokens=4,
        global_sequences=2,
    )
    loss, metrics = make_loss_function(make_objective("reinforce"))(**tokens)
    assert metrics["policy/entropy"].tolist() == [0.75, 2.0]
    # On policy every weight is 1: loss = -sum(A log pi) / 4.
    assert float(loss.detach()) == pytest.approx(-(2 * -2.0 + 2 * -3.0) / 4)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.5, -0.5])
    tokens["streams"]["correction_weights"] = torch.tensor([0.0, 0.5, 0.0])
    corrected, _ = make_loss_function(make_objective("reinforce"))(**tokens)
    assert float(corrected.detach()) == pytest.approx(0.5 * -(2 * -2.0) / 4)


def test_the_lag_of_the_batch_reaches_the_objective() -> None:
    """A ratio of 1.4 is beyond A-3PO's bound 1.2 at lag 1 and within 1.44 at lag 2."""
    for lag, weight in ((1, 0.0), (2, 1.4)):
        logprobs = torch.tensor([math.log(0.7)], requires_grad=True)
        loss, _ = make_loss_function(make_objective("a3po"), lag=lag)(
            logprobs_T=logprobs,
            entropy_T=torch.zeros(1),
            loss_mask_T=torch.ones(1, dtype=torch.bool),
            streams={"behaviour_logprobs": torch.tensor([math.log(0.5)]), "advantages": torch.ones(1)},
            shard=SequenceShard.whole((1,)),
            global_tokens=1,
            global_sequences=1,
        )
        loss.backward()
        assert float(logprobs.grad) == pytest.approx(-weight)


def test_the_lag_of_the_batch_reaches_the_statistics() -> None:
    def lag_of(batch: Any, **_options: object) -> torch.Tensor:
        return torch.tensor([batch.lag], dtype=torch.float64)

    class OneToken:
        def sum_statistics(self, _sequences: Any, statistics_fn: Any) -> torch.Tensor:
            one = {name: torch.zeros(1) for name in ("logprobs_T", "entropy_T")}
            streams = {name: torch.zeros(1) for name in ("behaviour_logprobs", "advantages")}
            counts = {"global_tokens": 1, "global_sequences": 1}
            mask = torch.ones(1, dtype=torch.bool)
            return statistics_fn(**one, loss_mask_T=mask, streams=streams, shard=SequenceShard.whole((1,)), **counts)

    objective = replace(make_objective("sat"), statistics_function=lag_of)
    found = minibatch_statistics(OneToken(), [], objective, lag=3)  # type: ignore[arg-type]
    assert found is not None and found.tolist() == [3.0]


def test_only_an_objective_that_asks_for_it_gets_a_pass_for_statistics() -> None:
    asked: list[Any] = []

    class Actor:
        def sum_statistics(self, sequences: Any, statistics_fn: Any) -> torch.Tensor:
            asked.append(sequences)
            return torch.ones(3)

    sequences = [TokenSequence(token_ids=torch.arange(2), loss_mask=torch.ones(1, dtype=torch.bool), streams={})]
    assert minibatch_statistics(Actor(), sequences, make_objective("minpro"), lag=2) is None  # type: ignore[arg-type]
    assert asked == []
    assert minibatch_statistics(Actor(), sequences, make_objective("m2po"), lag=2) is not None  # type: ignore[arg-type]
    assert asked == [sequences]
