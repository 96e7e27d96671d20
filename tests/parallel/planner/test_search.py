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
from parallel.planner.rl import GlobalStep, schedules
from parallel.planner.rollout_server import rollout_server
from parallel.planner.sampling import Rollouts, Sampling, simulate_sampling
from parallel.planner.search import legal_layouts, pareto_front, search
from parallel.planner.split import splits
from parallel.stages import COUNTED

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


def test_the_search_finds_published_layouts_that_layers_do_not_divide() -> None:
    found = list(legal_layouts(shape_of("qwen3_235b_a22b"), 256, H100))
    for axes in ({"tp": 4, "pp": 8, "vpp": 4}, {"pp": 32, "vpp": 3}):
        layout = ParallelLayout(world_size=256, ep=8, sequence_parallel="tp" in axes, **COUNTED[0], **axes)
        assert layout in found
    assert all(layout.chunks(94)[-1].last == 94 for layout in found)
    assert not any(layout.count_loss_as_layer for layout in found if 94 % layout.num_chunks == 0)


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
    # Two servers need 80 and 100 seconds or the other way round.
    sampling = Sampling(shares_s=(80.0, 100.0), servers=2)
    step = GlobalStep(sampling=sampling, logprobs_s=10.0, updates_s=60.0, sync_s=5.0, staleness=1, schedule="overlapped")
    assert (step.seconds("serial"), step.seconds("overlapped"), step.step_s) == (95 + 75, 95 + 5, 100)
    assert 95 <= step.seconds("rolling") < 100
    assert [step.trainer_idle(schedule) for schedule in ("serial", "overlapped")] == [pytest.approx(95 / 170), pytest.approx(25 / 100)]
    assert [step.servers_idle(schedule) for schedule in ("serial", "overlapped")] == [pytest.approx(80 / 170), pytest.approx(10 / 100)]
    assert schedules(step) == ("serial", "overlapped", "rolling")
    assert schedules(replace(step, sampling=replace(sampling, servers=1))) == ("serial", "overlapped")
    assert schedules(replace(step, staleness=0)) == ("serial",)


def test_long_responses_of_the_30b_take_as_long_as_another_simulation_says() -> None:
    """That one: 512 x 8 responses, exponential with mean 8,000 and cap 20,480, 8 servers of 2 H100, prompts of 2,048.

    It fills caches up to 1.8 times their size and gives no server time for taking weights. Here a cache is full when it is full, and a
    group shares its prompt.
    """
    rollouts = Rollouts(sequences=4096, group_size=8, prompt_tokens=2048, lengths=exponential(8000, 20480), servers=8, tp=2)
    sampling = simulate_sampling(rollout_server(SHAPE, H100, tp=2), rollouts)
    step = GlobalStep(sampling=sampling, logprobs_s=111, updates_s=445, sync_s=6.1, staleness=1, schedule="overlapped")
    assert step.seconds("serial") == pytest.approx(2290, rel=0.10)
    assert step.seconds("overlapped") == pytest.approx(1734, rel=0.10)
    assert step.seconds("rolling") == pytest.approx(1489, rel=0.10)
    idle = {"serial": (0.36, 0.76), "overlapped": (0.16, 0.68), "rolling": (0.02, 0.63)}
    for schedule in schedules(step):
        servers, trainer = idle[schedule]
        assert step.servers_idle(schedule) == pytest.approx(servers, abs=0.10)
        assert step.trainer_idle(schedule) == pytest.approx(trainer, abs=0.03)


def test_more_servers_are_found_where_sampling_is_the_longer_side() -> None:
    rollouts = Rollouts(sequences=512, group_size=8, prompt_tokens=512, lengths=exponential(6000, 16384), servers=8, tp=2)
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
