"""ESTR against its formula in float64, its golden vectors, and GRPO in its limit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_minpro.objectives import make_objective


@pytest.mark.parametrize(
    ("tau", "advantage", "weights"),
    [
        (0.7, 1.0, [0, 0, 0, 1.0513, 0]),
        (0.7, -1.0, [1.3499, 0, 2.7183, 1.0513, 0]),
        (1.0, 1.0, [0, 0.9139, 0, 1.0513, 0]),
    ],
)
def test_golden_vectors(tau: float, advantage: float, weights: list[float], cases, run_objective) -> None:
    case = cases.of_ratios([math.exp(d) for d in (0.3, -0.09, 1.0, 0.05, -0.8)], advantage)
    case = replace(case, entropies=[torch.tensor([0.5, 0.0, 2.0, 0.0, 0.1])])
    assert run_objective(make_objective("estr", tau=tau), case).weights[0].tolist() == pytest.approx(weights, abs=5e-5)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula_token_by_token(seed: int, cases, check_objective, ppo_reference) -> None:
    case = cases.random(seed, 0.5)
    entropies = iter([float(h) for row, mask in zip(case.behaviour_entropies, case.masks, strict=True) for h in row[mask]])

    def reference(d: list[float], a: list[float], _logprobs: list[float]) -> list[tuple[float, float]]:
        # check_objective goes through the sequences in order, once.
        scores = [x * x / (next(entropies) + 0.01) for x in d]
        return [(0.0, 0.0) if s > 0.4 else ppo_reference(math.exp(x), y, 0.8, 1.28) for s, x, y in zip(scores, d, a, strict=True)]

    check_objective(make_objective("estr", tau=0.4), reference, case)


def test_with_an_endless_tau_it_is_grpo(cases, run_objective) -> None:
    case = cases.random(4, 0.7)
    ours, grpo = run_objective(make_objective("estr", tau=1e9), case), run_objective(make_objective("grpo"), case)
    assert ours.loss == grpo.loss
    for mine, theirs in zip([*ours.weights, *ours.gradients], [*grpo.weights, *grpo.gradients], strict=True):
        assert torch.equal(mine, theirs)


def test_a_batch_without_entropies_is_refused(cases) -> None:
    batch, _ = cases.random(0).batch([0])
    with pytest.raises(ValueError, match="estr needs the entropies"):
        make_objective("estr")(replace(batch, behaviour_entropies_T=None))
