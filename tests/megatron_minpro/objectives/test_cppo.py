"""CPPO against algorithm 1 in float64, its golden vectors, and DPPO in its limit."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import make_objective

PAPER = {"delta": 0.2, "delta_b": 0.02, "w_min": 0.8}


def reference(d: list[float], a: list[float], logprobs: list[float], *, delta: float, delta_b: float, w_min: float):
    """Token by token, with running sums as algorithm 1 has them."""
    out, spent, weights = [], 0.0, 0.0
    for t, (x, y, lp) in enumerate(zip(d, a, logprobs, strict=True)):
        w = 1 - (1 - w_min) * t / max(len(d) - 1, 1)
        mu, r = math.exp(lp - x), math.exp(x)
        divergence = w * min(abs(math.exp(lp) - mu), 1.0)
        left = min(delta, delta + delta_b * weights - spent)
        outside = y * (r - 1) > 0 and divergence > left
        bound = max(1 + math.copysign(max(left, 0.0) / (w * mu), x), 0.0)
        out.append((0.0, -bound * y) if outside else (r, -r * y))
        spent, weights = spent + divergence, weights + w
    return out


@pytest.mark.parametrize(
    ("current", "advantages", "weights"),
    [
        ([0.60, 0.62, 0.55, 0.64, 0.51, 0.66], 1.0, [1.2, 1.24, 0, 0, 0, 0]),
        ([0.60, 0.62, 0.55, 0.64, 0.51, 0.66], -1.0, [1.2, 1.24, 1.1, 1.28, 1.02, 1.32]),
        ([0.60, 0.62, 0.55, 0.36, 0.49, 0.52], [1, 1, 1, -1, 1, 1], [1.2, 1.24, 0, 0, 0.98, 0]),
    ],
)
def test_golden_vectors(current: list[float], advantages, weights: list[float], cases, run_objective) -> None:
    ran = run_objective(make_objective("cppo", **PAPER), cases.of_probabilities([0.5] * 6, current, advantages))
    torch.testing.assert_close(ran.weights[0], torch.tensor(weights, dtype=torch.float32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [PAPER, {"delta": 0.05, "delta_b": 0.1, "w_min": 0.3}], ids=["paper", "generous"])
def test_equals_algorithm_1_token_by_token(seed: int, options: dict, cases, check_objective) -> None:
    check_objective(make_objective("cppo", **options), lambda *given: reference(*given, **options), cases.random(seed, 0.3))


def test_with_an_endless_budget_and_even_weights_it_is_dppo(cases, run_objective) -> None:
    case = cases.random(5, 0.7)
    ran = run_objective(make_objective("cppo", delta=0.15, delta_b=1e9, w_min=1.0), case)
    for ours, theirs in zip(ran.weights, run_objective(make_objective("dppo_tv"), case).weights, strict=True):
        assert torch.equal(ours, theirs)
    assert 0 < ran.metrics["clip/hard"][0] < case.num_tokens


def test_masked_tokens_take_no_place_and_no_budget(cases, run_objective) -> None:
    plain = cases.of_probabilities([0.5] * 3, [0.6, 0.62, 0.55])
    spaced = cases.of_probabilities([0.5] * 6, [0.9, 0.6, 0.9, 0.62, 0.55, 0.9])
    spaced.masks[0][:] = torch.tensor([False, True, False, True, True, False])
    objective = make_objective("cppo", **PAPER)
    trained = run_objective(objective, spaced).weights[0][spaced.masks[0]]
    assert torch.equal(trained, run_objective(objective, plain).weights[0])
