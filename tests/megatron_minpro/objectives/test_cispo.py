"""CISPO, its scaled control and REINFORCE against a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import make_objective


def reference(scale: float = 1.0, low: float = 0.0, high: float = 5.0):
    def tokens(d: list[float], a: list[float], logprobs: list[float]) -> list[tuple[float, float]]:
        weights = [scale * min(max(math.exp(x), low), high) for x in d]
        return [(w, -w * y * lp) for w, y, lp in zip(weights, a, logprobs, strict=True)]

    return tokens


def test_golden_vector(cases, run_objective) -> None:
    ran = run_objective(make_objective("cispo"), cases.of_ratios([2, 3, 1.5, 0.5, 4, 8]))
    torch.testing.assert_close(ran.weights[0], torch.tensor([2, 3, 1.5, 0.5, 4, 5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula_token_by_token(cases, check_objective, seed: int) -> None:
    case = cases.random(seed, 1.5)
    check_objective(make_objective("cispo"), reference(), case)
    check_objective(make_objective("cispo", clip_low=0.1, clip_high=0.2), reference(1.0, 0.9, 1.2), case)
    check_objective(make_objective("scaled_cispo", scale=0.4), reference(0.4), case)
    check_objective(make_objective("reinforce"), reference(1.0, 1.0, 1.0), case)


def test_the_scale_has_no_default_and_is_positive() -> None:
    with pytest.raises(ValueError, match="needs the option scale"):
        make_objective("scaled_cispo")
    with pytest.raises(ValueError, match="scale must be a finite number above 0, got 0"):
        make_objective("scaled_cispo", scale=0)


def test_reinforce_bounds_nothing(cases, run_objective) -> None:
    ran = run_objective(make_objective("reinforce"), cases.of_ratios([0.1, 1.0, 9.0]))
    assert ran.weights[0].tolist() == [1.0, 1.0, 1.0]
    assert ran.metrics["clip/soft"].tolist() == ran.metrics["clip/hard"].tolist() == [0.0, 3.0]
