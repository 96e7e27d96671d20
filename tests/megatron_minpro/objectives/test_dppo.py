"""DPPO by total variation and by KL, against the paper's mask in float64 and vectors by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import make_objective
from megatron_minpro.objectives.ratios import log_ratio
from megatron_minpro.objectives.token_bounds import total_variation

OLD, NEW = [0.5, 0.2, 0.02, 0.6, 0.1, 0.9], [0.8, 0.1, 0.06, 0.35, 0.35, 0.45]


def kl(mu: float, pi: float) -> float:
    other, others = max(1 - mu, 0.0), max(1 - pi, 0.0)
    return mu * math.log(mu / pi) + other * math.log((other + 1e-8) / (others + 1e-8))


def masked(d: list[float], a: list[float], logprobs: list[float], divergence, low: float, high: float) -> list[tuple[float, float]]:
    """The mask in the paper's words: drop a token that moves outward and whose divergence exceeds delta. Loss: PPO's at the bound."""
    out = []
    for x, y, lp in zip(d, a, logprobs, strict=True):
        mu, pi, r = math.exp(lp - x), math.exp(lp), math.exp(x)
        delta = high if r > 1 else low
        outside = y * (r - 1) > 0 and divergence(mu, pi) > delta
        at_bound = 1.0 if divergence is kl else 1 + math.copysign(delta, x) / mu
        out.append((0.0, -at_bound * y) if outside else (r, -r * y))
    return out


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_golden_vector(name: str, cases, run_objective) -> None:
    delta = 0.2 if name == "dppo_tv" else 0.05
    objective = make_objective(name, delta_low=delta, delta_high=delta)
    for advantage, weights in ((1.0, [0, 0.5, 3, 7 / 12, 0, 0.5]), (-1.0, [1.6, 0.5, 3, 0, 3.5, 0])):
        ran = run_objective(objective, cases.of_probabilities(OLD, NEW, advantage))
        torch.testing.assert_close(ran.weights[0], torch.tensor(weights, dtype=torch.float32), rtol=1e-6, atol=0)


def test_binary_kl_by_hand() -> None:
    assert [round(kl(*pair), 4) for pair in zip(OLD, NEW, strict=True)] == [0.2231, 0.0444, 0.0189, 0.1292, 0.1676, 0.4534]


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_mask_token_by_token(seed: int, cases, check_objective) -> None:
    case = cases.random(seed, 0.7)
    distance = lambda mu, pi: abs(pi - mu)  # noqa: E731
    for name, divergence in (("dppo_tv", distance), ("dppo_kl", kl)):
        objective = make_objective(name, delta_low=0.1, delta_high=0.2)
        check_objective(objective, lambda d, a, lp, of=divergence: masked(d, a, lp, of, 0.1, 0.2), case)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_without_a_bound_it_is_importance_sampling(name: str, cases, run_objective) -> None:
    case = cases.random(3, 1.0)
    ran = run_objective(make_objective(name, delta_low=1e9, delta_high=1e9), case)
    for weights, logprobs, behaviour, mask in zip(ran.weights, case.logprobs, case.behaviour, case.masks, strict=True):
        torch.testing.assert_close(weights[mask], (logprobs - behaviour)[mask].exp(), rtol=1e-6, atol=0)


def test_a_move_between_two_probabilities_near_one_is_seen(cases, run_objective) -> None:
    """1 - 3e-6 and 1 - 1e-6 differ by 2e-6: their fp32 log-probs hold it, a difference of fp32 probabilities would be 6 % off."""
    case = cases.of_probabilities([0.5], [0.5])
    case.behaviour[0][0], case.logprobs[0][0] = math.log1p(-3e-6), math.log1p(-1e-6)
    for delta, kept in ((1.9e-6, False), (2.1e-6, True)):
        assert bool(run_objective(make_objective("dppo_tv", delta_high=delta), case).weights[0][0] > 0) == kept


def test_the_total_variation_of_a_probability_that_underflows(cases) -> None:
    """e^-800 is 0 in float64. From there to 1/2 and back the probability moves by 1/2."""
    case = cases.of_probabilities([0.5] * 4, [0.5] * 4)
    case.behaviour[0][0] = case.logprobs[0][1] = case.behaviour[0][2] = -800.0
    case.logprobs[0][2] = -790.0
    batch, _ = case.batch([0])
    assert total_variation(batch, log_ratio(batch)).tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])
