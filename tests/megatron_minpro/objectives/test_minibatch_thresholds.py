"""M2PO and the prefix filter: thresholds over the whole mini-batch, against exact ones from sorted values."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import make_objective
from megatron_minpro.objectives.m2po import winsorized_bound
from megatron_minpro.objectives.value_bins import NUM_BINS, ZERO_BIN, bin_of, sum_per_bin

SPLIT = [[4], [0, 3], [5, 1, 2]]


def pooled(case) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Log ratios and advantages of all trained tokens in float64, with their places."""
    places = [(s, int(t)) for s, mask in enumerate(case.masks) for t in mask.nonzero()[:, 0]]
    d = torch.tensor([float(case.logprobs[s][t]) - float(case.behaviour[s][t]) for s, t in places], dtype=torch.float64)
    return d, torch.tensor([float(case.advantages[s][t]) for s, t in places], dtype=torch.float64), places


def loss_of(case, per_token_loss: torch.Tensor, places: list[tuple[int, int]]) -> float:
    """Of the mini-batch, dropped tokens in the denominator."""
    return float(per_token_loss.sum()) / len(places)


def logprobs_at(case, places: list[tuple[int, int]]) -> torch.Tensor:
    return torch.stack([case.logprobs[s][t] for s, t in places]).double()


def weights_at(ran, places: list[tuple[int, int]]) -> torch.Tensor:
    return torch.stack([ran.weights[s][t] for s, t in places]).double()


def test_bins_are_ordered_and_a_tenth_of_a_percent_wide() -> None:
    x_T = torch.cat([torch.randn(2000) * 3, torch.randn(500) * 1e-3, torch.tensor([0.0, 1e-9, -1e-9, 1e9, -1e9])]).sort().values
    bin_T = bin_of(x_T)
    assert bin_T.diff().ge(0).all() and bin_T.min() >= 0 and bin_T.max() < NUM_BINS
    assert (bin_of(torch.tensor([0.0, -0.0, 1e-9, -1e-9])) == ZERO_BIN).all()
    assert torch.equal(bin_of(-x_T) - ZERO_BIN, ZERO_BIN - bin_T)
    same = bin_of(torch.tensor([1.0, 1.0009, 1.0011]))
    assert same[0] == same[1] and same[2] > same[1]


@pytest.mark.parametrize("rule", ["paper", "second_moment_all"])
@pytest.mark.parametrize("micro_batches", [None, SPLIT])
def test_m2po_drops_the_largest_until_the_budget_is_met(cases, run_objective, rule: str, micro_batches) -> None:
    case = cases.random(2, 0.4)
    d, a, places = pooled(case)
    candidate = (a * d > 0) if rule == "paper" else torch.ones_like(d, dtype=torch.bool)
    keep = ~candidate
    chosen: list[float] = []
    for i in sorted(candidate.nonzero()[:, 0].tolist(), key=lambda i: float(d[i] ** 2)):
        chosen.append(float(d[i] ** 2))
        if sum(chosen) / len(chosen) > 0.04:
            break
        keep[i] = True
    assert 0 < int(keep.sum()) < len(d) and int((keep & candidate).sum()) > 0
    ran = run_objective(make_objective("m2po", rule=rule), case, micro_batches)
    weights = torch.where(keep, d.exp(), 0.0)
    torch.testing.assert_close(weights_at(ran, places), weights, rtol=1e-5, atol=1e-7)
    assert ran.loss == pytest.approx(loss_of(case, -weights * a * logprobs_at(case, places), places), rel=1e-5, abs=1e-6)
    assert ran.metrics["clip/hard"].tolist() == [int((~keep).sum()), len(d)]


def test_m2po_official_bound_is_the_winsorized_budget(cases, run_objective) -> None:
    case = cases.random(3, 0.5)
    d, a, places = pooled(case)
    squares = (d[a * d > 0] ** 2).sort().values
    low, high = 0.0, 10.0
    for _ in range(100):  # bisection on tau^2, independent of the closed form
        middle = (low + high) / 2
        low, high = (middle, high) if squares.clamp(max=middle).mean() <= 0.04 else (low, middle)
    tau = math.sqrt(low)
    bins = bin_of(d.abs().float())
    harmful = (a * d > 0).double()
    assert winsorized_bound(sum_per_bin(bins, harmful), sum_per_bin(bins, harmful * d**2), 0.04) == pytest.approx(tau, rel=1e-3)
    gated = ((a > 0) & (d > tau)) | ((a < 0) & (d < -tau))
    ran = run_objective(make_objective("m2po", rule="official"), case, SPLIT)
    torch.testing.assert_close(weights_at(ran, places), torch.where(gated, 0.0, d.exp()), rtol=1e-5, atol=1e-7)
    # The bound falls on a bin's mean, 0.1 % wide.
    surrogate = torch.minimum(d.exp() * a, d.clamp(-tau, tau).exp() * a)
    assert ran.loss == pytest.approx(loss_of(case, -surrogate, places), rel=2e-3)


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_m2po_tokens_without_an_advantage_or_a_drift_are_not_harmful(cases, run_objective, rule: str) -> None:
    # Of the harmful two the mean of (log rho)^2 is 0.051; with the two others it would be 0.026 and nothing dropped.
    case = cases.of_ratios([1.2, 1.3, 1.0, 1.01], [1.0, 1.0, 1.0, 0.0])
    assert run_objective(make_objective("m2po", rule=rule), case).weights[0].tolist() == pytest.approx([1.2, 0.0, 1.0, 1.01], rel=1e-6)


def test_m2po_within_the_budget_drops_nothing(cases, run_objective) -> None:
    case = cases.random(4, 0.01)
    for rule in ("paper", "official", "second_moment_all"):
        assert run_objective(make_objective("m2po", rule=rule), case).metrics["clip/hard"][0] == 0


def test_m2po_over_the_budget_everywhere_keeps_the_smallest(cases, run_objective) -> None:
    case = cases.of_ratios([3.0, 4.0, 5.0], 1.0)
    assert run_objective(make_objective("m2po", rule="paper"), case).weights[0].tolist() == [0.0, 0.0, 0.0]
    kept = run_objective(make_objective("m2po", rule="second_moment_all"), case).weights[0]
    assert kept.tolist() == pytest.approx([3.0, 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("micro_batches", [None, SPLIT])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
def test_prefix_filter_drops_the_lowest_prefixes_of_the_whole_mini_batch(cases, run_objective, micro_batches, fraction: float) -> None:
    case = cases.random(7, 0.5)
    d, a, places = pooled(case)
    cumulative, total, last = [], 0.0, None
    for (s, _t), x in zip(places, d.tolist(), strict=True):
        total = x if s != last else total + x
        last = s
        cumulative.append(total)
    dropped = sorted(range(len(d)), key=cumulative.__getitem__)[: math.floor(fraction * len(d))]
    expected = d.exp().clamp(max=5.0)
    expected[dropped] = 0.0
    ran = run_objective(make_objective("prefix_filter", fraction=fraction), case, micro_batches)
    torch.testing.assert_close(weights_at(ran, places), expected, rtol=1e-5, atol=1e-7)
    assert ran.loss == pytest.approx(loss_of(case, -expected * a * logprobs_at(case, places), places), rel=1e-5, abs=1e-6)
    assert ran.metrics["clip/hard"].tolist() == [len(dropped), len(d)]


def test_a_token_that_is_dropped_is_not_also_counted_as_bounded(cases, run_objective) -> None:
    # Prefix products 0.001, 0.006, 6, 6: the first two are dropped, of the others the third is bounded to 5.
    ran = run_objective(make_objective("prefix_filter", fraction=0.5), cases.of_ratios([0.001, 6.0, 1000.0, 1.0]))
    assert ran.weights[0].tolist() == pytest.approx([0.0, 0.0, 5.0, 1.0])
    assert (ran.metrics["clip/hard"].tolist(), ran.metrics["clip/soft"].tolist()) == ([2.0, 4.0], [1.0, 4.0])


def test_statistics_must_be_handed_back_and_only_where_they_are_needed(cases) -> None:
    batch, _ = cases.random(0).batch([0, 1])
    with pytest.raises(ValueError, match="'m2po': mini-batch statistics are missing"):
        make_objective("m2po")(batch)
    with pytest.raises(ValueError, match="'minpro': mini-batch statistics were given"):
        make_objective("minpro")(batch, torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="needs no mini-batch statistics"):
        make_objective("minpro").minibatch_statistics(batch)
