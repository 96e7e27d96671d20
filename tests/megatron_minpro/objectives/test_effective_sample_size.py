"""Effective sample sizes against float64 with the maximum subtracted, where products lie far outside float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import finalize_metrics, make_objective
from megatron_minpro.objectives.effective_sample_size import effective_sample_size, weight_sums


def reference(log_weights: list[float]) -> float:
    top = max(log_weights)
    weights = [math.exp(x - top) for x in log_weights]
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


@pytest.mark.parametrize(
    ("weights", "expected"), [([1, 1, 1, 1], 1.0), ([4, 1, 0.5, 0.5], 0.51429), ([100, 1, 1, 1], 0.26515), ([3, 0], 0.5)]
)
def test_by_hand(weights: list[float], expected: float) -> None:
    log_weights_N = torch.tensor(weights).log()
    log_weights_N[log_weights_N == -math.inf] = -700.0
    sums = weight_sums(log_weights_N, torch.ones(len(weights), dtype=torch.float64))
    assert effective_sample_size(sums) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("shift", [0.0, 127.9, 128.1, -400.0, -9000.0, 12_000.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 200.0])
def test_equals_the_definition_wherever_the_weights_lie(shift: float, spread: float) -> None:
    x_N = (shift + spread * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).float()
    ones_N = torch.ones(60, dtype=torch.float64)
    parts = [weight_sums(part_N, ones_N[: len(part_N)]) for part_N in x_N.split(7)]
    assert effective_sample_size(sum(parts)) == pytest.approx(reference(x_N.double().tolist()), rel=1e-9)


def test_nothing_or_what_was_not_kept_is_nan() -> None:
    one_N = torch.ones(1, dtype=torch.float64)
    assert math.isnan(effective_sample_size(weight_sums(torch.zeros(1), 0 * one_N)))
    assert math.isnan(effective_sample_size(weight_sums(torch.tensor([2e4]), one_N)))
    assert math.isnan(effective_sample_size(weight_sums(torch.tensor([-2e4]), one_N)))


@pytest.mark.parametrize("micro_batches", [None, [[4], [0, 3], [5, 1, 2]]])
def test_every_level_equals_the_definition(cases, run_objective, micro_batches) -> None:
    case = cases.random(0, 0.8)
    final = finalize_metrics(run_objective(make_objective("minpro"), case, micro_batches).metrics)
    tokens, prefixes, sequences = [], [], []
    for logprobs, behaviour, mask in zip(case.logprobs, case.behaviour, case.masks, strict=True):
        d = (logprobs - behaviour)[mask].double()
        tokens += d.tolist()
        prefixes += d.cumsum(0).tolist()
        sequences += [float(d.sum())] if len(d) else []
    for level, log_weights in (("token", tokens), ("prefix", prefixes), ("sequence", sequences)):
        assert final[f"effective_sample_size/{level}"] == pytest.approx(reference(log_weights), rel=1e-5)
