"""MinPRO against vectors by hand and a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import finalize_metrics, make_objective


def reference(d: list[float], a: list[float], logprobs: list[float], high: float = 5.0, low: float = 0.0) -> list[tuple[float, float]]:
    out, smallest = [], None
    for t in range(len(d)):
        prefix = 1.0 if smallest is None else smallest
        weight = min(max(prefix * math.exp(d[t]), low), high)
        out.append((weight, -weight * a[t] * logprobs[t]))
        smallest = math.exp(d[t]) if smallest is None else min(smallest, math.exp(d[t]))
    return out


def test_golden_vector(cases, run_objective) -> None:
    ran = run_objective(make_objective("minpro"), cases.of_ratios([2, 3, 1.5, 0.5, 4]))
    torch.testing.assert_close(ran.weights[0], torch.tensor([2, 5, 3, 0.75, 2]), rtol=1e-6, atol=0)
    torch.testing.assert_close(ran.gradients[0], -torch.tensor([2, 5, 3, 0.75, 2]) / 5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.05, 1.5])
def test_equals_the_formula_token_by_token(cases, check_objective, seed: int, spread: float) -> None:
    check_objective(make_objective("minpro"), reference, cases.random(seed, spread))


def test_a_lower_bound_acts_on_the_product(cases, check_objective) -> None:
    check_objective(
        make_objective("minpro", clip_low=0.5, clip_high=1.0), lambda d, a, lp: reference(d, a, lp, 2.0, 0.5), cases.random(0, 1.0)
    )


def test_the_first_trained_token_has_its_own_ratio_behind_a_prompt(cases, run_objective) -> None:
    case = cases.of_ratios([0.1, 0.2, 2.0, 3.0])
    case.masks[0][:2] = False
    ran = run_objective(make_objective("minpro"), case)
    torch.testing.assert_close(ran.weights[0], torch.tensor([0.0, 0.0, 2.0, 5.0]), rtol=1e-6, atol=0)


def test_a_tool_span_is_transparent(cases, run_objective) -> None:
    case = cases.of_ratios([2.0, 0.01, 50.0, 1.5])
    case.masks[0][1:3] = False
    ran = run_objective(make_objective("minpro"), case)
    torch.testing.assert_close(ran.weights[0], torch.tensor([2.0, 0.0, 0.0, 3.0]), rtol=1e-6, atol=0)


def test_metrics_by_hand(cases, run_objective) -> None:
    ran = run_objective(make_objective("minpro"), cases.of_ratios([2, 3, 1.5, 0.5, 4]))
    final = finalize_metrics(ran.metrics)
    assert final["ratio/mean"] == pytest.approx(11 / 5, rel=1e-6)
    assert final["prefix_min/mean"] == pytest.approx((1 + 2 + 2 + 1.5 + 0.5) / 5, rel=1e-6)
    assert final["weight/mean"] == pytest.approx(12.75 / 5, rel=1e-6)
    assert final["clip/soft"] == pytest.approx(1 / 5) and final["clip/hard"] == 0.0
    assert final["weight/effective_sample_size"] == pytest.approx(12.75**2 / (5 * (4 + 25 + 9 + 0.5625 + 4)), rel=1e-6)
    assert final["policy/kl_to_behaviour"] == pytest.approx(sum(r - 1 - math.log(r) for r in (2, 3, 1.5, 0.5, 4)) / 5, rel=1e-6)
    assert final["loss/policy"] == pytest.approx(ran.loss, rel=1e-6)
    assert ran.metrics["log_ratio/histogram_by_place"].sum() == ran.metrics["log_prefix_min/histogram_by_share"].sum() == 5
