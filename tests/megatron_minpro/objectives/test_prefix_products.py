"""Objectives on products of ratios, CTPO, the prefix ratio and TOPR, against float64 loops."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import make_objective


def test_prefix_ratio_golden_vector(cases, run_objective) -> None:
    ran = run_objective(make_objective("prefix_ratio"), cases.of_ratios([2, 3, 1.5, 0.5, 4]))
    torch.testing.assert_close(ran.weights[0], torch.tensor([2, 5, 5, 4.5, 5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_prefix_ratio_equals_the_formula(cases, check_objective, seed: int) -> None:
    def reference(d: list[float], a: list[float], logprobs: list[float]) -> list[tuple[float, float]]:
        weights = [min(math.exp(math.fsum(d[: t + 1])), 5.0) for t in range(len(d))]
        return [(w, -w * y * lp) for w, y, lp in zip(weights, a, logprobs, strict=True)]

    check_objective(make_objective("prefix_ratio"), reference, cases.random(seed, 0.6))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [0.5, 0.0])
def test_ctpo_equals_the_formula(cases, check_objective, ppo_reference, seed: int, power: float) -> None:
    def reference(d: list[float], a: list[float], _logprobs: list[float]) -> list[tuple[float, float]]:
        tokens = []
        for t, y in enumerate(a, start=1):
            growth = t**power
            tokens.append(ppo_reference(math.exp(math.fsum(d[:t])), y, math.exp(-0.025 * growth), math.exp(0.05 * growth)))
        return tokens

    check_objective(make_objective("ctpo", power=power), reference, cases.random(seed, 0.03), divisor="seq_mean_token_mean")


def test_ctpo_holds_the_cumulative_log_ratio_but_keeps_the_gradient(cases, run_objective) -> None:
    ran = run_objective(make_objective("ctpo"), cases.of_ratios([math.exp(8.0), math.exp(8.0)], -1.0))
    torch.testing.assert_close(ran.weights[0], torch.tensor([8.0, 10.0]).exp(), rtol=1e-5, atol=0)


def test_ctpo_holds_a_tokens_log_ratio_within_twenty(cases, run_objective) -> None:
    ran = run_objective(make_objective("ctpo"), cases.of_ratios([math.exp(-25.0), math.exp(22.0)]))
    torch.testing.assert_close(ran.weights[0], torch.tensor([math.exp(-20.0), 1.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", ["sequence", "sequence_mean", "token"])
@pytest.mark.parametrize("tapers", [(1.0, 1.0, 0.0, 1.0), (0.2, 0.9, 0.1, 0.7), (1.0, 1.0, 0.0, 0.0)])
def test_topr_equals_the_formula(cases, check_objective, level: str, tapers: tuple[float, float, float, float]) -> None:
    def reference(d: list[float], a: list[float], logprobs: list[float]) -> list[tuple[float, float]]:
        tokens = []
        for x, y, lp in zip(d, a, logprobs, strict=True):
            log_ratio = {"sequence": math.fsum(d), "sequence_mean": math.fsum(d) / len(d), "token": x}[level]
            low, high = tapers[:2] if y > 0 else tapers[2:]
            w = min(max(math.exp(log_ratio), low), high)
            tokens.append((w, -w * y * lp))
        return tokens

    names = ("positive_low", "positive_high", "negative_low", "negative_high")
    objective = make_objective("topr", level=level, **dict(zip(names, tapers, strict=True)))
    check_objective(objective, reference, cases.random(1, 0.6), divisor="seq_mean_token_sum")


def test_topr_refuses_crossed_tapers_and_unknown_levels() -> None:
    with pytest.raises(ValueError, match=r"negative_low=2.0 is above negative_high=1.0"):
        make_objective("topr", negative_low=2.0)
    with pytest.raises(ValueError, match="level must be one of sequence, sequence_mean, token; got 'tokens'"):
        make_objective("topr", level="tokens")
