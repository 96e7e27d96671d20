"""SAT against the order statistic of sorted values, on the whole mini-batch however it is cut."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import make_objective
from megatron_minpro.objectives.sat import _quantile
from megatron_minpro.objectives.value_bins import bin_of, sum_per_bin

SPLIT = [[4], [0, 3], [5, 1, 2]]
LOG_RATIOS = [0.01, 0.02, -0.01, 0.015, -0.02, 0.005, 0.0, -0.03, 0.05, 0.15]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_golden_vector(advantage: float, cases, run_objective) -> None:
    """q is 0.05, the ninth of ten (interpolation would give 0.06); the last token's bound is 1 + 0.2 * 0.1."""
    case = cases.of_ratios([math.exp(d) for d in LOG_RATIOS], advantage)
    weights = [math.exp(d) for d in LOG_RATIOS]
    if advantage > 0:
        weights[-1] = 0.0
    ran = run_objective(make_objective("sat"), case)
    torch.testing.assert_close(ran.weights[0], torch.tensor(weights), rtol=1e-5, atol=0)
    loss = -sum(w * advantage for w in weights) - (1.02 if advantage > 0 else 0.0)
    assert ran.loss == pytest.approx(loss / 10, rel=1e-4)  # the fp32 log ratio of the ninth is 0.05 to 1e-6


@pytest.mark.parametrize("micro_batches", [None, SPLIT])
@pytest.mark.parametrize(("quantile", "low", "high"), [(0.9, 0.2, 0.2), (0.5, 1.0, 2.0), (0.75, 0.4, 0.6)])
def test_equals_the_formula_with_a_sorted_quantile(cases, run_objective, ppo_reference, micro_batches, quantile, low, high) -> None:
    case = cases.random(1, 0.4)
    places = [(s, int(t)) for s, mask in enumerate(case.masks) for t in mask.nonzero()[:, 0]]
    d = [float(case.logprobs[s][t]) - float(case.behaviour[s][t]) for s, t in places]
    q = sorted(map(abs, d))[math.ceil(quantile * len(d)) - 1]
    ran, loss = run_objective(make_objective("sat", quantile=quantile, clip_low=low, clip_high=high), case, micro_batches), 0.0
    for x, (s, t) in zip(d, places, strict=True):
        tight = 1 / (1 + (x / q) ** 2) if abs(x) > q else 1.0
        bounds = (1 - low * (tight if x < 0 else 1.0), 1 + high * (tight if x > 0 else 1.0))
        weight, part = ppo_reference(math.exp(x), float(case.advantages[s][t]), *bounds)
        assert float(ran.weights[s][t]) == pytest.approx(weight, rel=1e-5)
        loss += part / len(d)
    assert ran.loss == pytest.approx(loss, rel=1e-4)  # q is the mean of a bin, 0.1 % wide


@pytest.mark.parametrize("quantile", [0.001, 0.1, 0.5, 0.9, 0.95, 1.0])
def test_the_quantile_is_the_order_statistic_to_a_tenth_of_a_percent(quantile: float) -> None:
    size_T = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs()
    bins, ones = bin_of(size_T), torch.ones_like(size_T)
    index, q = _quantile(torch.cat([sum_per_bin(bins, ones), sum_per_bin(bins, size_T)]), quantile)
    exact = size_T.sort().values[math.ceil(quantile * 1000) - 1]
    assert q == pytest.approx(float(exact), rel=1e-3) and index == int(bin_of(exact.reshape(1)))


def test_with_nothing_beyond_the_quantile_it_is_ppo(cases, run_objective) -> None:
    case = cases.random(2, 0.7)
    ran = run_objective(make_objective("sat", quantile=1.0), case)
    ppo = run_objective(make_objective("grpo", clip_low=0.2, clip_high=0.2), case)
    for ours, theirs in zip([*ran.weights, *ran.gradients], [*ppo.weights, *ppo.gradients], strict=True):
        assert torch.equal(ours, theirs)


def test_a_quantile_that_is_rounding_tightens_nothing(cases, run_objective) -> None:
    ran = run_objective(make_objective("sat"), cases.of_ratios([*[1.0] * 19, 1.1]))
    assert ran.weights[0][-1] == pytest.approx(1.1) and ran.metrics["clip/hard"][0] == 0
