"""Advantages against numbers by hand and the statistics module."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from megatron_minpro.objectives.advantages import ESTIMATORS, make_advantages

every_estimator = pytest.mark.parametrize("name", sorted(ESTIMATORS.known))


def test_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    centered = [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]
    torch.testing.assert_close(make_advantages("mean_only")(rewards), torch.tensor(centered))
    torch.testing.assert_close(make_advantages("leave_one_out")(rewards), torch.tensor(centered) * 4 / 3)
    deviations = torch.tensor([[0.5], [(1 / 3) ** 0.5]])  # unbiased
    torch.testing.assert_close(make_advantages("group_normalized")(rewards), torch.tensor(centered) / (deviations + 1e-6))


def test_against_the_statistics_module() -> None:
    rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    normalized = make_advantages("group_normalized", epsilon=0.1)(rewards)
    whitened = make_advantages("batch_whitened", epsilon=0.1)(rewards)
    flat = rewards.flatten().tolist()
    for g, row in enumerate(rewards.tolist()):
        for k, r in enumerate(row):
            others = row[:k] + row[k + 1 :]
            assert float(normalized[g, k]) == pytest.approx((r - statistics.fmean(row)) / (statistics.stdev(row) + 0.1), rel=1e-5, abs=1e-6)
            assert float(whitened[g, k]) == pytest.approx((r - statistics.fmean(flat)) / (statistics.stdev(flat) + 0.1), rel=1e-5, abs=1e-6)
            assert float(make_advantages("leave_one_out")(rewards)[g, k]) == pytest.approx(r - statistics.fmean(others), rel=1e-5, abs=1e-6)


@every_estimator
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(name: str, reward: float) -> None:
    assert make_advantages(name)(torch.full((3, 7), reward)).eq(0).all()


@pytest.mark.parametrize("name", ["group_normalized", "leave_one_out", "mean_only"])
def test_a_group_of_one_gives_zero(name: str) -> None:
    assert make_advantages(name)(torch.tensor([[1.0], [0.0]])).eq(0).all()


@pytest.mark.parametrize("name", ["group_normalized", "leave_one_out", "mean_only"])
def test_groups_of_different_sizes_equal_each_group_alone(name: str) -> None:
    estimator = make_advantages(name)
    rewards = torch.tensor([1.0, 5.0, 0.0, 2.0, 9.0, 4.0])
    group_ids = torch.tensor([7, 3, 7, 7, 3, 100])
    together = estimator(rewards, group_ids)
    for group in (7, 3, 100):
        chosen = group_ids == group
        torch.testing.assert_close(together[chosen], estimator(rewards[chosen][None])[0])


@every_estimator
def test_result_is_fp32_of_the_same_shape_and_ignores_the_order_of_groups(name: str) -> None:
    rewards = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimator, order = make_advantages(name), torch.tensor([2, 0, 3, 1])
    assert estimator(rewards).dtype == torch.float32 and estimator(rewards).shape == (4, 6)
    torch.testing.assert_close(estimator(rewards[order]), estimator(rewards)[order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_advantages("group_normalised"),
            "estimator = 'group_normalised': unknown; did you mean 'group_normalized'",
        ),
        (lambda: make_advantages("mean_only", epsilon=1.0), "advantages.epsilon = 1.0: mean_only has no such option; known: none"),
        (lambda: make_advantages("group_normalized", epsilon=0.0), "epsilon must be a finite number above 0, got 0.0"),
        (lambda: make_advantages("mean_only")(torch.zeros(3)), r"rewards must be \[groups, responses\].*got shape \[3\]"),
        (lambda: make_advantages("mean_only")(torch.zeros(0, 3)), "rewards is empty"),
        (lambda: make_advantages("mean_only")(torch.tensor([[0.0, float("nan")]])), r"rewards\[1\] \(flattened\) is not finite"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_outside_estimator_gets_rewards_groups_and_its_options(users_module: Callable[[str], str]) -> None:
    name = users_module("def scaled(rewards, group_ids, *, by):\n    return rewards.float() * by + group_ids\n")
    advantages = make_advantages(f"{name}:scaled", by=10.0)(torch.tensor([1.0, 0.5]), torch.tensor([0, 1]))
    assert advantages.tolist() == [10.0, 6.0]
    with pytest.raises(ValueError, match=r"^advantages.estimator = .*: needs the option by"):
        make_advantages(f"{name}:scaled")
