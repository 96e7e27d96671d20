"""GRPO against vectors by hand and a float64 loop; every gate of its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import finalize_metrics, make_objective


def test_gates_by_hand(cases, run_objective) -> None:
    ratios, advantages = [1.1, 1.3, 0.7, 1.3, 0.7, 1.0], [1.0, 1.0, 1.0, -2.0, -2.0, -2.0]
    ran = run_objective(make_objective("grpo"), cases.of_ratios(ratios, advantages))
    torch.testing.assert_close(ran.weights[0], torch.tensor([1.1, 0.0, 0.7, 1.3, 0.0, 1.0]), rtol=1e-6, atol=0)
    assert ran.loss == pytest.approx(-(1.1 + 1.28 + 0.7 - 2 * 1.3 - 2 * 0.8 - 2.0) / 6, rel=1e-6)
    assert finalize_metrics(ran.metrics)["clip/hard"] == pytest.approx(2 / 6)
    assert finalize_metrics(ran.metrics)["clip/soft"] == 0.0


def test_dual_clip_bounds_bad_tokens_only_and_is_off_by_default(cases, run_objective) -> None:
    case = cases.of_ratios([4.0, 4.0], [1.0, -1.0])
    assert run_objective(make_objective("grpo"), case).weights[0].tolist() == pytest.approx([0.0, 4.0])
    ran = run_objective(make_objective("grpo", dual_clip=3.0), case)
    assert ran.weights[0].tolist() == [0.0, 0.0]
    assert ran.loss == pytest.approx((-1.28 + 3.0) / 2, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dual_clip", [None, 2.0])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_equals_the_formula_token_by_token(
    cases, check_objective, ppo_reference, seed: int, dual_clip: float | None, aggregation: str
) -> None:
    def reference(d: list[float], a: list[float], _logprobs: list[float]) -> list[tuple[float, float]]:
        return [ppo_reference(math.exp(x), y, 0.8, 1.28, dual_clip or math.inf) for x, y in zip(d, a, strict=True)]

    objective = make_objective("grpo", dual_clip=dual_clip, aggregation=aggregation)
    check_objective(objective, reference, cases.random(seed, 0.7), divisor=aggregation)


def test_a_log_ratio_beyond_twenty_is_held_there_without_gradient(cases, run_objective) -> None:
    ran = run_objective(make_objective("grpo"), cases.of_ratios([math.exp(25.0), math.exp(19.0)], -1.0))
    torch.testing.assert_close(ran.weights[0], torch.tensor([0.0, math.exp(19.0)]), rtol=1e-5, atol=0)
    assert ran.loss == pytest.approx((math.exp(20.0) + math.exp(19.0)) / 2, rel=1e-5)
    assert finalize_metrics(ran.metrics)["clip/hard"] == 0.5
