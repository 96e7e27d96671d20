"""What an objective says of single tokens: prefix minimum, product, and what a bound did, against loops and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from megatron_minpro.objectives import OBJECTIVES, make_objective
from megatron_minpro.objectives.cut import Cut

NONE, LOW, HIGH, BELOW, ABOVE, FILTERED, OVERFLOW = Cut


@pytest.mark.parametrize("name", OBJECTIVES.known)
def test_prefix_minimum_and_product_of_every_objective(name: str, cases, run_objective) -> None:
    case = cases.random(5, 0.4)
    objective = make_objective(name, **({"scale": 1.0} if name == "scaled_cispo" else {}))
    ran = run_objective(objective, case, [[4, 1], [0, 2, 3, 5]])
    hard = soft = 0
    for s, mask in enumerate(case.masks):
        log_ratios = (case.logprobs[s] - case.behaviour[s])[mask].double().tolist()
        minima = [0.0, *accumulate(log_ratios, min)][: len(log_ratios)]
        assert ran.prefix_minima[s][mask].tolist() == pytest.approx(minima, rel=1e-5, abs=1e-6)
        assert ran.cumulative[s][mask].tolist() == pytest.approx(list(accumulate(log_ratios)), rel=1e-4, abs=1e-5)
        assert not ran.cuts[s][~mask].any(), "a masked token is cut by nothing"
        without_gradient = ran.cuts[s] >= BELOW
        assert not ran.weights[s][without_gradient].any() and not ran.gradients[s][without_gradient].any()
        hard += int(without_gradient.sum())
        soft += int(((ran.cuts[s] == LOW) | (ran.cuts[s] == HIGH)).sum())
    assert (hard, soft) == (ran.metrics["clip/hard"][0], ran.metrics["clip/soft"][0])


def _cuts(cases, run_objective, name: str, ratios: list[float], signs: list[float] | None = None, **options: object) -> list[int]:
    case = cases.of_ratios(ratios)
    if signs is not None:
        case = replace(case, advantages=[torch.tensor(signs)])
    return run_objective(make_objective(name, **options), case).cuts[0].tolist()


def test_fixed_weights_are_held_at_their_bounds(cases, run_objective) -> None:
    ratios = [1.0, 0.4, 0.6, 3.0, 5.9, 7.0]
    assert _cuts(cases, run_objective, "cispo", ratios, clip_low=0.5, clip_high=4.0) == [NONE, LOW, NONE, NONE, HIGH, HIGH]
    # MinPRO's weights: 1, 0.4, 0.24, 1.2, 2.36, 2.8
    assert _cuts(cases, run_objective, "minpro", ratios, clip_low=0.5, clip_high=1.5) == [NONE, LOW, LOW, NONE, NONE, HIGH]


def test_ppo_gates_on_the_side_to_which_the_advantage_pushes(cases, run_objective) -> None:
    ratios, signs = [2.0, 2.0, 0.5, 0.5, 9.0, 1.0], [1.0, -1.0, 1.0, -1.0, -1.0, 1.0]
    assert _cuts(cases, run_objective, "grpo", ratios, signs) == [ABOVE, NONE, NONE, BELOW, NONE, NONE]
    assert _cuts(cases, run_objective, "grpo", ratios, signs, dual_clip=3.0) == [ABOVE, NONE, NONE, BELOW, ABOVE, NONE]
    overflow = [math.exp(21.0), math.exp(-21.0)]
    assert _cuts(cases, run_objective, "grpo", overflow, [-1.0, 1.0]) == [OVERFLOW, OVERFLOW]


def test_filters_and_masks_say_what_they_dropped(cases, run_objective) -> None:
    assert _cuts(cases, run_objective, "masked_is", [1.0, 0.1, 9.0]) == [NONE, BELOW, ABOVE]
    # The harmful ones are those with A > 0 and rho > 1: the largest go until their mean square is within the budget.
    assert _cuts(cases, run_objective, "m2po", [1.1, 3.0, 0.2], [1.0, 1.0, 1.0]) == [NONE, FILTERED, NONE]
