"""Search, front, remedies and the reinforcement-learning step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from parallel.layout import ParallelLayout
from parallel.planner.hardware import read_hardware
from parallel.planner.lengths import exponential
from parallel.planner.plan import Work, batch_of, make_plan, remedies
from parallel.planner.published import read_rows, shape_of
from parallel.planner.rl import GlobalStep, Rollouts, sampling_seconds
from parallel.planner.search import legal_layouts, pareto_front, search
from parallel.planner.split import splits

SHAPE = shape_of("qwen3_30b_a3b")
H100 = read_hardware("h100")
TRAINING = read_rows()[0].training
PLAIN = Work(
    sequences=256,
    mean_tokens=4096,
    max_tokens=4096,
    micro_batch_tokens=4096,
    updates_per_step=1,
    staleness=0,
    rollouts=None,
    colocated=False,
)


def test_the_search_is_sorted_and_holds_every_legal_layout_once() -> None:
    found = search(SHAPE, 16, TRAINING, H100, PLAIN)
    rates = [plan.time.tokens_per_s_per_gpu for plan in found.fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(plan.fullest.total <= H100.usable_bytes for plan in found.fitting)
    assert all(plan.fullest.total > H100.usable_bytes for plan in found.failing)
    layouts = [plan.layout for plan in (*found.fitting, *found.failing)]
    assert len(set(layouts)) == len(layouts) == len(list(legal_layouts(SHAPE, 16, H100)))
    assert ParallelLayout(world_size=16, ep=16) in layouts


def test_the_front_holds_exactly_the_plans_that_no_other_beats_in_both() -> None:
    plans = search(SHAPE, 16, TRAINING, H100, PLAIN).fitting
    best = [
        plan
        for plan in plans
        if not any(
            other.fullest.total <= plan.fullest.total
            and other.time.step_s <= plan.time.step_s
            and (other.fullest.total, other.time.step_s) != (plan.fullest.total, plan.time.step_s)
            for other in plans
        )
    ]
    points = {(plan.fullest.total, plan.time.step_s) for plan in best}
    assert {(plan.fullest.total, plan.time.step_s) for plan in pareto_front(plans)} == points


def test_a_remedy_of_a_plan_that_does_not_fit_makes_it_fit() -> None:
    crowded = make_plan(SHAPE, ParallelLayout(world_size=16, ep=8), TRAINING, H100, replace(PLAIN, micro_batch_tokens=16384))
    assert not crowded.fits
    found = remedies(crowded)
    assert found and found[0][1].fits
    assert "actor.recompute=full" in [change for change, _ in found]


def test_micro_batches_hold_whole_sequences_rounded_by_interleaving() -> None:
    work = replace(PLAIN, sequences=100, mean_tokens=1000, max_tokens=1000, micro_batch_tokens=4096)
    assert batch_of(work, ParallelLayout(world_size=4)).num_micro_batches == math.ceil(25 / 4)
    assert batch_of(work, ParallelLayout(world_size=16, pp=4, vpp=2)).num_micro_batches == 8
    batch = batch_of(work, ParallelLayout(world_size=4))
    assert batch.num_micro_batches * batch.micro_batch_tokens == pytest.approx(25 * 1000, abs=batch.num_micro_batches)


def test_the_time_of_a_step_and_who_is_idle_follow_from_the_schedule() -> None:
    phases = {"sampling_s": 100.0, "steady_sampling_s": 80.0, "logprobs_s": 10.0, "updates_s": 60.0, "sync_s": 5.0}
    step = GlobalStep(**phases, staleness=1, schedule="overlapped")
    assert (step.seconds("serial"), step.seconds("overlapped"), step.seconds("rolling")) == (175, 105, 85)
    assert step.step_s == 105
    assert [step.trainer_idle(schedule) for schedule in ("serial", "overlapped")] == [pytest.approx(100 / 175), pytest.approx(30 / 105)]
    assert [step.servers_idle(schedule) for schedule in ("serial", "overlapped")] == [pytest.approx(75 / 175), pytest.approx(5 / 105)]


def test_sampling_grows_with_length_and_shrinks_with_servers() -> None:
    rollouts = Rollouts(sequences=2048, prompt_tokens=200, lengths=exponential(3000, 8192), servers=8, tp=2)
    base = sampling_seconds(SHAPE, H100, rollouts)
    assert sampling_seconds(SHAPE, H100, replace(rollouts, servers=16)) < base
    assert sampling_seconds(SHAPE, H100, replace(rollouts, lengths=exponential(6000, 8192))) > base
    assert sampling_seconds(SHAPE, H100, rollouts, batches_under_way=2) < base
    with pytest.raises(ValueError, match=r"rollout\.tp: 1 GPUs of h100"):
        sampling_seconds(shape_of("qwen3_235b_a22b"), H100, replace(rollouts, tp=1))


def test_the_long_responses_of_the_30b_take_as_long_as_in_the_simulation() -> None:
    """Simulated event by event: 512 x 8 responses, exponential with mean 8,000 and cap 20,480, 8 servers of 2 H100, prompts of 2,048."""
    rollouts = Rollouts(sequences=4096, prompt_tokens=2048, lengths=exponential(8000, 20480), servers=8, tp=2)
    sampling = sampling_seconds(SHAPE, H100, rollouts)
    step = GlobalStep(
        sampling_s=sampling, steady_sampling_s=sampling, logprobs_s=111, updates_s=445, sync_s=6.1, staleness=1, schedule="overlapped"
    )
    assert step.seconds("serial") == pytest.approx(2290, rel=0.10)
    assert step.seconds("overlapped") == pytest.approx(1734, rel=0.10)
    assert step.trainer_idle("serial") == pytest.approx(0.76, abs=0.02)
    assert step.trainer_idle("overlapped") == pytest.approx(0.68, abs=0.02)


def test_more_servers_are_found_where_sampling_is_the_longer_side() -> None:
    rollouts = Rollouts(sequences=512, prompt_tokens=512, lengths=exponential(6000, 16384), servers=8, tp=2)
    work = replace(PLAIN, updates_per_step=2, staleness=1, schedule="overlapped", keeps_weights=True, rollouts=rollouts)
    found = splits(make_plan(SHAPE, ParallelLayout(world_size=64, ep=8), TRAINING, H100, work))
    servers = [other.work.rollouts.servers for other in found if other.work.rollouts is not None]
    assert all(other.layout.world_size + 2 * count == 80 and other.fits for other, count in zip(found, servers, strict=True))
    seconds = [other.global_step.step_s for other in found if other.global_step is not None]
    assert len(found) > 1 and seconds == sorted(seconds)
    assert servers[0] > 8  # they were too few
    assert splits(make_plan(SHAPE, ParallelLayout(world_size=16, ep=8), TRAINING, H100, PLAIN)) == []


def test_kept_weights_are_one_more_copy_of_the_parameters() -> None:
    layout = ParallelLayout(world_size=16, ep=8)
    without, kept = (make_plan(SHAPE, layout, TRAINING, H100, replace(PLAIN, keeps_weights=keeps)) for keeps in (False, True))
    assert kept.fullest.kept == kept.fullest.parameters > 0 == without.fullest.kept
    assert kept.fullest.total - without.fullest.total == pytest.approx(kept.fullest.parameters)
