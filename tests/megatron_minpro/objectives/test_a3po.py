"""A-3PO against the two-policy form of its paper, and PPO at lag 1."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_minpro.objectives import make_objective

OLD, NEW = [0.5, 0.2, 0.02, 0.6, 0.1, 0.9], [0.8, 0.1, 0.06, 0.35, 0.35, 0.45]


@pytest.mark.parametrize(
    ("lag", "advantage", "weights"),
    [
        (3, 1.0, [1.6, 0.5, 0, 7 / 12, 0, 0.5]),
        (3, -1.0, [1.6, 0, 3, 7 / 12, 3.5, 0]),
        (1, 1.0, [0, 0.5, 0, 7 / 12, 0, 0.5]),
        (1, -1.0, [1.6, 0, 3, 0, 3.5, 0]),
    ],
)
def test_golden_vector(lag: int, advantage: float, weights: list[float], cases, run_objective) -> None:
    case = replace(cases.of_probabilities(OLD, NEW, advantage), lag=lag)
    ran = run_objective(make_objective("a3po"), case)
    torch.testing.assert_close(ran.weights[0], torch.tensor(weights, dtype=torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_gradient_is_that_of_the_papers_two_policies(lag: int, cases, run_objective) -> None:
    """autograd through pi_prox / pi_old * min(pi / pi_prox A, clip(pi / pi_prox) A) in float64."""
    case = replace(cases.random(lag, 0.8), lag=lag)
    ran = run_objective(make_objective("a3po", clip_low=0.1, clip_high=0.3), case)
    for s, mask in enumerate(case.masks):
        logprobs = case.logprobs[s].double().requires_grad_()
        old, advantage = case.behaviour[s].double(), case.advantages[s].double()
        proximal = old + ((lag - 1) / lag if lag else 0.0) * (logprobs.detach() - old)
        ratio = (logprobs - proximal).exp()
        surrogate = (proximal - old).exp() * torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage)
        (gradient,) = torch.autograd.grad(-surrogate[mask].sum() / case.num_tokens, logprobs)
        torch.testing.assert_close(ran.gradients[s].double(), gradient, rtol=1e-5, atol=1e-8)


def test_a_batch_without_a_lag_is_refused(cases) -> None:
    batch, _ = replace(cases.random(0), lag=None).batch([0])
    with pytest.raises(ValueError, match="a3po needs the lag of the batch"):
        make_objective("a3po")(batch)


def test_the_region_widens_with_age(cases, run_objective) -> None:
    case = replace(cases.of_ratios([18.4, 18.6]), lag=16)
    assert run_objective(make_objective("a3po"), case).weights[0].tolist() == pytest.approx([18.4, 0.0])
    assert math.isclose(1.2**16, 18.488, rel_tol=1e-4)
