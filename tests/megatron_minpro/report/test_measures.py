"""What curves come to, by numbers worked by hand."""

from __future__ import annotations

import pytest

from megatron_minpro.report.measures import CURVES, measures_by_place, measures_of, rounded, thin, trained_curves, window_of


def curves(rewards: list[float], **others: list[float | None]) -> dict[str, list[float | None]]:
    return {name: others.get(name, [None] * len(rewards)) for name in CURVES} | {"reward": list(rewards)}


@pytest.mark.parametrize(("batches", "expected"), [(1, 1), (2, 1), (3, 1), (9, 4), (10, 5), (50, 5), (60, 6), (200, 20)])
def test_a_window_is_a_tenth_at_least_five_at_most_half(batches: int, expected: int) -> None:
    assert window_of(batches) == expected


def test_rewards_by_hand() -> None:
    rewards = [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.6, 0.4, 0.2, 0.1]  # windows of 5; the best is 0.4 to 0.6, the last 0.8 to 0.1
    found = measures_of(curves(rewards), {})
    assert found == {
        "reward_first": pytest.approx((0.0 + 0.2 + 0.4 + 0.6 + 0.8) / 5),
        "reward_last": pytest.approx((0.8 + 0.6 + 0.4 + 0.2 + 0.1) / 5),
        "reward_best": pytest.approx((0.4 + 0.6 + 0.8 + 0.8 + 0.6) / 5),
        "reward_area": pytest.approx(0.41),
        "collapsed": 1.0,
    }


@pytest.mark.parametrize(("last", "expected"), [(0.45, 0.0), (0.35, 1.0)])
def test_a_run_collapses_when_it_ends_a_tenth_below_its_best(last: float, expected: float) -> None:
    assert measures_of(curves([0.5] * 10 + [last] * 10), {})["collapsed"] == expected


def test_other_curves_by_hand() -> None:
    found = measures_of(
        curves(
            [0.1] * 4,  # windows of 2
            entropy=[2.0, None, 1.0, 0.5],
            sample_size=[1.0, 0.5, None, 0.0],
            ratio_sample_size=[0.2, 0.4, 0.6, 0.8],
            clip_hard=[0.1, 0.2, None, None],
            clip_soft=[0.05, None, 0.4, None],
        ),
        {},
    )
    assert found["entropy_last"] == pytest.approx(0.75)
    assert found["sample_size"] == pytest.approx(0.5)
    assert found["ratio_sample_size"] == pytest.approx(0.5)
    assert found["clipped"] == pytest.approx((0.15 + 0.2 + 0.4) / 3)


def test_held_out_measures_are_the_ends_and_the_best_after_training() -> None:
    evaluations = {
        "before": {"pass_at_1": 0.9, "pass_at_8": 0.95},
        "step_000010": {"pass_at_1": 0.6, "pass_at_8": 0.7},
        "after": {"pass_at_1": 0.5, "pass_at_8": 0.8, "policy_version": 40.0},
    }
    found = measures_of(curves([0.1, 0.1]), evaluations)
    assert {name: value for name, value in found.items() if name.startswith("pass")} == {
        "pass_at_1_before": 0.9,
        "pass_at_8_before": 0.95,
        "pass_at_1_after": 0.5,
        "pass_at_8_after": 0.8,
        "pass_at_1_best": 0.6,
        "pass_at_8_best": 0.8,
    }


def test_a_run_without_a_batch_has_no_measures() -> None:
    with pytest.raises(ValueError, match="at least one trained batch"):
        measures_of(curves([]), {})


def test_steps_that_only_sample_are_no_points_of_a_curve() -> None:
    lines: list[dict[str, float | None]] = [
        {"global_step": 0, "reward/trained": None, "policy/entropy": None, "rollout/length": 3.0},
        {"global_step": 1, "reward/trained": 0.5, "policy/entropy": 2.0, "rollout/length": 4.0},
        {"global_step": 2, "reward/trained": 0.7, "policy/entropy": 1.5},
    ]
    found = trained_curves(lines)
    assert (found["reward"], found["entropy"], found["length"], found["kl"]) == ([0.5, 0.7], [2.0, 1.5], [4.0, None], [None, None])


def test_curves_are_rounded_and_thinned() -> None:
    assert thin([0.123456, None, 1234567.0]) == [0.1235, None, 1235000.0]
    assert thin([float(index) for index in range(51)]) == [float(index) for index in range(0, 51, 3)]
    assert rounded(2e-7 / 3) == 6.667e-08


def test_measures_by_place_are_means_over_batches_that_reach_the_place() -> None:
    lines = [
        {"weight/token_1": 0.5, "weight/mean": 9.0},
        {"weight/token_1": 1.5, "log_prefix_min/tokens_2_3": -2.0},
        {"weight/token_1": None},
    ]
    assert measures_by_place(lines) == {"weight/token_1": 1.0, "log_prefix_min/tokens_2_3": -2.0}
