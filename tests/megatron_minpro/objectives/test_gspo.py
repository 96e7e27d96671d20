"""GSPO against a float64 loop and against the sequence form of its own paper."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import make_objective


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [2e-3, 0.3])
def test_equals_the_formula_token_by_token(cases, check_objective, ppo_reference, seed: int, width: float) -> None:
    def reference(d: list[float], a: list[float], _logprobs: list[float]) -> list[tuple[float, float]]:
        ratio = math.exp(math.fsum(d) / len(d)) if d else 1.0
        return [ppo_reference(ratio, y, 1 - width, 1 + width) for y in a]

    objective = make_objective("gspo", clip_low=width, clip_high=width)
    check_objective(objective, reference, cases.random(seed, 0.4), divisor="seq_mean_token_mean")


def test_gradient_is_that_of_the_sequence_ratio(cases, run_objective) -> None:
    """Autograd through exp(mean log rho) itself, the paper's equation 5, where A is constant in the sequence."""
    case = cases.random(5, 0.1)
    ran = run_objective(make_objective("gspo", clip_low=0.5, clip_high=0.5), case)
    leaves = [x.double().requires_grad_() for x in case.logprobs]
    loss = torch.zeros((), dtype=torch.float64)
    for x, b, a, mask in zip(leaves, case.behaviour, case.advantages, case.masks, strict=True):
        if mask.any():
            ratio = (x - b.double())[mask].mean().exp()
            loss = loss - torch.minimum(ratio * a[0], ratio.clamp(0.5, 1.5) * a[0]) / case.num_sequences
    assert ran.loss == pytest.approx(loss.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    for got, want in zip(ran.gradients, gradients, strict=True):
        torch.testing.assert_close(got.double(), torch.zeros_like(got).double() if want is None else want, rtol=1e-5, atol=1e-7)


def test_gspo_has_no_aggregation_of_choice() -> None:
    with pytest.raises(ValueError, match=r"objective\.aggregation = 'token_mean': gspo has no such option"):
        make_objective("gspo", aggregation="token_mean")
