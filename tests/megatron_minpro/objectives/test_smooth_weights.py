"""VESPO, SAPO and DRPO, whose weights are closed forms, and PNPO and EMA-KPO, whose ratio is a mean of the prefix."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_minpro.objectives import finalize_metrics, make_objective

OLD, NEW = [0.5, 0.2, 0.02, 0.6, 0.1, 0.9], [0.8, 0.1, 0.06, 0.35, 0.35, 0.45]


def weights(run_objective, case, name: str, **options: float) -> list[float]:
    return run_objective(make_objective(name, **options), case).weights[0].tolist()


def importance_sampling(case) -> list[torch.Tensor]:
    return [torch.where(m, (x - b).exp(), 0.0) for x, b, m in zip(case.logprobs, case.behaviour, case.masks, strict=True)]


@pytest.mark.parametrize(("ratio", "good", "bad"), [(0.4, 0.9679, 0.2125), (1.0, 1.0, 1.0), (2.0, 0.1991, 1.0827)])
def test_vespo_golden_weights(ratio: float, good: float, bad: float, cases, run_objective) -> None:
    """The same ratio of the sequence in one token, or in two."""
    for ratios in ([ratio], [4 * ratio, 0.25]):
        assert weights(run_objective, cases.of_ratios(ratios, 1.0), "vespo") == pytest.approx([good] * len(ratios), abs=5e-5)
        assert weights(run_objective, cases.of_ratios(ratios, -1.0), "vespo") == pytest.approx([bad] * len(ratios), abs=5e-5)


@pytest.mark.parametrize("seed", range(3))
def test_vespo_equals_the_formula(seed: int, cases, check_objective) -> None:
    def reference(d: list[float], a: list[float], logprobs: list[float]) -> list[tuple[float, float]]:
        product = math.exp(min(max(math.fsum(d), -20), 20))
        forms = [(2.0, 3.0) if y >= 0 else (3.0, 2.0) for y in a]
        return [
            ((w := product**k * math.exp(lam * (1 - product))), -w * y * lp) for (k, lam), y, lp in zip(forms, a, logprobs, strict=True)
        ]

    check_objective(make_objective("vespo"), reference, cases.random(seed, 0.2))


def test_a_vespo_weight_that_vanishes_is_counted(cases, run_objective) -> None:
    ran = run_objective(make_objective("vespo"), cases.of_ratios([10.0, 1.0]))
    assert ran.weights[0].tolist() == pytest.approx([100 * math.exp(-27)] * 2, rel=1e-4)
    assert finalize_metrics(ran.metrics)["weight/vanished"] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_sapo_has_the_gradient_of_its_formula(seed: int, cases, run_objective) -> None:
    """autograd through 4 / tau sigmoid(tau (rho - 1)) A in float64."""
    case = cases.random(seed, 0.7)
    ran = run_objective(make_objective("sapo"), case)
    for s, mask in enumerate(case.masks):
        logprobs = case.logprobs[s].double().requires_grad_()
        advantage = case.advantages[s].double()
        tau = torch.where(advantage > 0, 1.0, 1.05)
        gate = 4 / tau * torch.sigmoid(tau * ((logprobs - case.behaviour[s].double()).exp() - 1))
        (gradient,) = torch.autograd.grad(-(gate * advantage)[mask].sum() / (5 * max(int(mask.sum()), 1)), logprobs)
        torch.testing.assert_close(ran.gradients[s].double(), gradient, rtol=1e-5, atol=1e-8)


def test_sapo_golden_vector(cases, run_objective) -> None:
    for advantage, expected in (
        (1.0, [1.4642, 0.4700, 1.2599, 0.5587, 0.9815, 0.4700]),
        (-1.0, [1.4512, 0.4671, 1.1663, 0.5563, 0.8818, 0.4671]),
    ):
        assert weights(run_objective, cases.of_probabilities(OLD, NEW, advantage), "sapo") == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("epsilon", "advantage", "expected"),
    [
        (12.5, 1.0, [1.5616, 0.504, 2.9904, 0.595, 3.43, 0.518]),
        (0.2, 1.0, [-0.8, 0.75, 2.4, 1.3125, -0.875, 1.625]),
        (0.2, -1.0, [4.0, 0.25, 3.6, -0.1458, 7.875, -0.625]),
    ],
)
def test_drpo_golden_vector(epsilon: float, advantage: float, expected: list[float], cases, run_objective) -> None:
    case = cases.of_probabilities(OLD, NEW, advantage)
    assert weights(run_objective, case, "drpo", epsilon=epsilon) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("epsilon", [12.5, 0.2])
def test_drpo_has_the_gradient_of_its_formula(epsilon: float, cases, run_objective) -> None:
    case = cases.random(0, 0.4)
    # Probabilities, so at most 1: the bound on their difference does not act.
    case = replace(case, logprobs=[x.clamp(max=-1e-3) for x in case.logprobs])
    ran = run_objective(make_objective("drpo", epsilon=epsilon), case)
    for s, mask in enumerate(case.masks):
        logprobs = case.logprobs[s].double().requires_grad_()
        old, advantage = case.behaviour[s].double(), case.advantages[s].double()
        ratio = (logprobs - old).exp()
        surrogate = ratio * advantage - advantage.abs() * old.exp() * (ratio - 1) ** 2 / (2 * epsilon)
        (gradient,) = torch.autograd.grad(-surrogate[mask].sum() / case.num_tokens, logprobs)
        torch.testing.assert_close(ran.gradients[s].double(), gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "options"), [("sapo", {"tau_positive": 1e-6, "tau_negative": 1e-6}), ("drpo", {"epsilon": 1e9})])
def test_in_the_limit_it_is_importance_sampling(name: str, options: dict, cases, run_objective) -> None:
    case = cases.random(2, 0.7)
    for ours, plain in zip(run_objective(make_objective(name, **options), case).weights, importance_sampling(case), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)


def test_pnpo_golden_vectors(cases, run_objective) -> None:
    drift = cases.of_ratios([math.exp(d) for d in (0.001, -0.0005, 0.0006, 0.0035, 0.0)])
    assert weights(run_objective, drift, "pnpo") == pytest.approx([1.001, 1.00025, 1.00037, 0.0, 1.00092], abs=5e-6)
    assert weights(run_objective, cases.of_ratios([2, 0.5, 1, 4, 0.25]), "pnpo") == pytest.approx([0, 1, 1, 0, 1], abs=1e-6)
    wide = {"clip_low": 0.5, "clip_high": 0.5}
    assert weights(run_objective, cases.of_ratios([2, 0.5, 1, 4, 0.25]), "pnpo", **wide) == pytest.approx([2, 1, 1, 2**0.5, 1], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("low", "high"), [(0.05, 0.1), (1.0, 0.3)])
def test_pnpo_equals_the_formula(seed: int, low: float, high: float, cases, check_objective) -> None:
    def reference(d: list[float], a: list[float], logprobs: list[float]) -> list[tuple[float, float]]:
        out = []
        for t in range(1, len(d) + 1):
            w, h = math.exp(math.fsum(d[:t]) / t), math.sqrt(len(d) / t)
            w = w if 1 - low * h <= w <= 1 + high * h else 0.0
            out.append((w, -w * a[t - 1] * logprobs[t - 1]))
        return out

    objective = make_objective("pnpo", clip_low=low, clip_high=high)
    check_objective(objective, reference, cases.random(seed, 0.3), divisor="seq_mean_token_mean")


def kalman(d: list[float], gain: float) -> list[float]:
    x, out = 0.0, []
    for value in d:
        x += gain * (value - x)
        out.append(x)
    return out


def test_ema_kpo_by_hand(cases, run_objective) -> None:
    """q = 1/4: K = (sqrt(17) - 1) / 8 = 0.3904, the value at which KPO's own gains .2 .310 .359 .379 .386 settle."""
    assert kalman([1, 0, -1, 2, 0], (math.sqrt(17) - 1) / 8) == pytest.approx([0.39039, 0.23798, -0.24532, 0.63122, 0.3848], abs=2e-5)
    case = cases.of_ratios([math.e, 1.0, 1 / math.e, math.e**2, 1.0])
    expected = [math.exp(x) for x in kalman([1, 0, -1, 2, 0], (math.sqrt(17) - 1) / 8)]
    wide = {"noise_ratio": 0.25, "clip_low": 1.0, "clip_high": 9.0}
    assert weights(run_objective, case, "ema_kpo", **wide) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise_ratio", [1e-6, 0.25])
def test_ema_kpo_equals_the_formula(seed: int, noise_ratio: float, cases, check_objective, ppo_reference) -> None:
    width = 1e-3 if noise_ratio == 1e-6 else 0.2

    def reference(d: list[float], a: list[float], _logprobs: list[float]) -> list[tuple[float, float]]:
        averages = kalman(d, (math.sqrt(noise_ratio**2 + 4 * noise_ratio) - noise_ratio) / 2)
        return [ppo_reference(math.exp(min(x, 10)), y, 1 - width, 1 + width) for x, y in zip(averages, a, strict=True)]

    objective = make_objective("ema_kpo", noise_ratio=noise_ratio, clip_low=width, clip_high=width)
    check_objective(objective, reference, cases.random(seed, 0.5), divisor="seq_mean_token_mean")


def test_ema_kpo_with_an_endless_noise_ratio_is_ppo(cases, run_objective) -> None:
    case, widths = cases.random(4, 0.5), {"clip_low": 0.2, "clip_high": 0.3, "aggregation": "token_mean"}
    ours = run_objective(make_objective("ema_kpo", noise_ratio=1e9, **widths), case)
    for mine, ppo in zip(ours.weights, run_objective(make_objective("grpo", **widths), case).weights, strict=True):
        torch.testing.assert_close(mine, ppo, rtol=1e-6, atol=0)
