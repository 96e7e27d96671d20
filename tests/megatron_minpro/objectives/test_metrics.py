"""Histograms, their quantiles, and sums that add up."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from megatron_minpro.objectives import OBJECTIVES, make_objective
from megatron_minpro.objectives.by_place import (
    NUM_STRETCHES,
    SHARES,
    STRETCHES,
    counts_by_stretch,
    means_by_stretch,
    place_stretches,
    share_stretches,
    sums_by_stretch,
)
from megatron_minpro.objectives.histograms import BIN_EDGES, NUM_BINS, bin_of, histogram_quantile
from megatron_minpro.objectives.metrics import add_metrics, finalize_metrics, histogram_counts
from megatron_minpro.tracking.metrics_table import check_declared


def histogram(x_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    [counts] = counts_by_stretch(bin_of(x_T), torch.zeros(len(x_T), dtype=torch.int64), mask_T, num_stretches=1)
    return counts


def test_histogram_counts_unmasked_values_in_their_bins() -> None:
    x_T = torch.tensor([0.0, 0.5, 0.5, -0.5, 1e6, -1e6, math.nan])
    counts = histogram(x_T, torch.tensor([True, True, True, True, True, True, False]))
    assert counts.sum() == 6 and counts[0] == counts[-1] == 1
    assert counts[NUM_BINS // 2] == 1, "0 lies in the middle bin"
    bin_of_half = int((BIN_EDGES < 0.5).sum())
    assert counts[bin_of_half] == 2 and counts[NUM_BINS - 1 - bin_of_half] == 1


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_quantiles_are_those_of_the_sample_up_to_a_bin(scale: float) -> None:
    x_T = scale * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    counts = histogram(x_T, torch.ones_like(x_T, dtype=torch.bool))
    for q in (0.01, 0.05, 0.25, 0.75, 0.95, 0.99):
        assert histogram_quantile(counts, q) == pytest.approx(float(x_T.quantile(q)), rel=0.02)
    assert abs(histogram_quantile(counts, 0.5)) < 0.02 * scale


def test_empty_sums_are_nan_and_never_zero() -> None:
    empty = torch.zeros(2, dtype=torch.float64)
    final = finalize_metrics(
        {"weight/mean": empty, "weight/mean_square": empty, "log_ratio/histogram": torch.zeros(NUM_BINS, dtype=torch.float64)}
    )
    assert all(math.isnan(value) for value in final.values()) and "weight/effective_sample_size" in final


def test_metrics_add_up_and_refuse_to_mix() -> None:
    total = add_metrics([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 2.0])}])
    assert finalize_metrics(total) == {"a": 1.0}
    with pytest.raises(ValueError, match=r"metrics differ in their names: \['a', 'b'\]"):
        add_metrics([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
    with pytest.raises(ValueError, match="metric 'a' has shape"):
        finalize_metrics({"a": torch.zeros(3)})


def test_a_ratio_of_one_up_to_rounding_counts_as_one(cases, run_objective) -> None:
    case = cases.of_ratios([1.0, math.exp(5e-6), math.exp(-5e-6), math.exp(2e-5), math.exp(-2e-5), 2.0])
    assert run_objective(make_objective("minpro"), case).metrics["ratio/unit"].tolist() == [3.0, 6.0]


@pytest.mark.parametrize("name", OBJECTIVES.known)
def test_every_objective_reports_the_same_list(name: str, cases, run_objective) -> None:
    objective = make_objective(name, **({"scale": 1.0} if name == "scaled_cispo" else {}))
    final = finalize_metrics(run_objective(objective, cases.random(0)).metrics)
    check_declared(final)
    logs = ("log_ratio", "log_prefix_min")
    quantiles = {f"{what}/p{q:02d}" for what in logs for q in (1, 5, 25, 50, 75, 95, 99)}
    stretches = (
        *("token_1", "tokens_2_3", "tokens_4_7", "tokens_8_15"),  # the longest response has 10 trained tokens,
        *("share_5_10", "share_10_20", "share_20_50", "share_50_100"),  # so none has a token before its 10th percentage
    )
    along = ("weight", *logs, *(f"{what}_p{q:02d}" for what in logs for q in (5, 50, 95)))
    assert final.keys() == quantiles | {f"{what}/{stretch}" for what in along for stretch in stretches} | {
        "ratio/mean",
        "log_ratio/mean",
        "log_ratio/mean_square",
        "ratio/unit",
        "prefix_min/mean",
        "weight/mean",
        "weight/mean_square",
        "weight/effective_sample_size",
        "weight/vanished",
        "effective_sample_size/token",
        "effective_sample_size/prefix",
        "effective_sample_size/sequence",
        "clip/hard",
        "clip/hard_with_advantage",
        "clip/soft",
        "advantage/mean",
        "policy/kl_to_behaviour",
        "loss/policy",
    }


def test_quantiles_of_log_ratio_and_prefix_min_by_hand(cases, run_objective) -> None:
    """Ratios 1/8, 2, 4, 8, ...: the smallest earlier ratio is 1 once and 1/8 ever after."""
    final = finalize_metrics(run_objective(make_objective("minpro"), cases.of_ratios([0.125, *[2.0] * 50, *[4.0] * 49])).metrics)
    bin_width = 10 ** (1 / 16)
    for name, ratio in (("log_prefix_min/p05", 0.125), ("log_prefix_min/p95", 0.125), ("log_ratio/p25", 2.0), ("log_ratio/p75", 4.0)):
        assert math.log(ratio) / final[name] == pytest.approx(1.0, abs=bin_width - 1), name
    assert final["prefix_min/mean"] == pytest.approx((1 + 99 / 8) / 100)


def test_means_by_place_are_those_of_a_loop(cases, run_objective) -> None:
    """Places count trained tokens only, from 1, also where the mask has holes; however it is packed."""
    case = cases.random(3, 0.4)
    weights, prefix_minima, log_ratios = defaultdict(list), defaultdict(list), defaultdict(list)
    for logprobs, behaviour, mask in zip(case.logprobs, case.behaviour, case.masks, strict=True):
        seen: list[float] = []
        for log_ratio in (logprobs - behaviour)[mask].double().tolist():
            stretch = int(math.log2(len(seen) + 1))
            smallest = min(seen, default=0.0)
            prefix_minima[stretch].append(smallest)
            weights[stretch].append(min(math.exp(log_ratio + smallest), 5.0))
            log_ratios[stretch].append(log_ratio)
            seen.append(log_ratio)
    final = finalize_metrics(run_objective(make_objective("minpro"), case, [[0, 2], [1, 3, 4], [5]]).metrics)
    names = ("token_1", "tokens_2_3", "tokens_4_7", "tokens_8_15")
    for group, expected in (("weight", weights), ("log_prefix_min", prefix_minima), ("log_ratio", log_ratios)):
        found = {name: value for name, value in final.items() if name.startswith(f"{group}/token")}
        assert found == pytest.approx({f"{group}/{names[i]}": statistics.fmean(expected[i]) for i in sorted(expected)}, rel=1e-5)


def test_stretches_double_and_the_last_one_is_open() -> None:
    place_T = torch.tensor([1.0, 2, 3, 4, 7, 8, 65535, 65536, 131072, 4194304])
    mask_T = torch.ones(10, dtype=torch.bool)
    sums = sums_by_stretch({"place": place_T, "two": 2 * place_T}, place_stretches(place_T), mask_T, num_stretches=NUM_STRETCHES)
    assert sums["place"][:, 1].tolist() == sums["two"][:, 1].tolist() == [1, 2, 2, 1, *[0] * 11, 1, 3]
    means = means_by_stretch(STRETCHES, sums["place"])
    assert means["tokens_2_3"] == 2.5 and means["tokens_65536_on"] == (65536 + 131072 + 4194304) / 3
    assert means_by_stretch(STRETCHES, sums["two"])["tokens_2_3"] == 5


def test_means_by_share_are_those_of_a_loop(cases, run_objective) -> None:
    """The share of a token is its place over the trained tokens of its response, also where the mask has holes; however it is packed."""
    case = cases.random(3, 0.4)
    prefix_minima = defaultdict(list)
    for logprobs, behaviour, mask in zip(case.logprobs, case.behaviour, case.masks, strict=True):
        log_ratios = (logprobs - behaviour)[mask].double().tolist()
        for place in range(1, len(log_ratios) + 1):
            last = next(percent for percent in (1, 2, 5, 10, 20, 50, 100) if place * 100 <= percent * len(log_ratios))
            prefix_minima[last].append(min(log_ratios[: place - 1], default=0.0))
    final = finalize_metrics(run_objective(make_objective("minpro"), case, [[0, 2], [1, 3, 4], [5]]).metrics)
    found = {name: value for name, value in final.items() if name.startswith("log_prefix_min/share")}
    first = {1: 0, 2: 1, 5: 2, 10: 5, 20: 10, 50: 20, 100: 50}
    expected = {f"log_prefix_min/share_{first[last]}_{last}": statistics.fmean(minima) for last, minima in prefix_minima.items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_histograms_along_the_response_are_those_of_a_loop(cases, run_objective) -> None:
    """Counts by place, by share and of all tokens, also where the mask has holes; however it is packed."""
    case = cases.random(3, 0.4)
    by_place, by_share = defaultdict(list), defaultdict(list)
    for logprobs, behaviour, mask in zip(case.logprobs, case.behaviour, case.masks, strict=True):
        log_ratios = (logprobs - behaviour)[mask].tolist()  # in float32, as the objective has them: the bin of a value on an edge is theirs
        for place, log_ratio in enumerate(log_ratios, start=1):
            share = next(number for number, percent in enumerate((1, 2, 5, 10, 20, 50, 100)) if place * 100 <= percent * len(log_ratios))
            for found, stretch in ((by_place, int(math.log2(place))), (by_share, share)):
                found["log_ratio", stretch].append(log_ratio)
                found["log_prefix_min", stretch].append(min(log_ratios[: place - 1], default=0.0))
    metrics = run_objective(make_objective("minpro"), case, [[0, 2], [1, 3, 4], [5]]).metrics
    for suffix, values, names in (("place", by_place, STRETCHES), ("share", by_share, SHARES)):
        for group in ("log_ratio", "log_prefix_min"):
            rows = [values[group, stretch] for stretch in range(len(names))]
            assert metrics[f"{group}/histogram_by_{suffix}"].tolist() == [counts_of(row) for row in rows]
    shown = histogram_counts(metrics)
    assert shown["log_ratio"] == counts_of([x for (group, _), row in by_place.items() if group == "log_ratio" for x in row])
    assert shown["log_prefix_min_histogram/share_20_50"] == counts_of(by_share["log_prefix_min", 5])


def counts_of(values: list[float]) -> list[float]:
    edges = BIN_EDGES.tolist()
    counts = [0.0] * NUM_BINS
    for value in values:
        counts[sum(edge < value for edge in edges)] += 1
    return counts


def test_quantiles_along_the_response_by_hand(cases, run_objective) -> None:
    """100 ratios: 1/8, then 2 up to place 63, then 4. A bin is 15.5% wide."""
    ratios = [0.125, *[2.0] * 62, *[4.0] * 37]
    final = finalize_metrics(run_objective(make_objective("minpro"), cases.of_ratios(ratios)).metrics)
    expected = {
        **{f"log_ratio_p{q}/token_1": 0.125 for q in ("05", "50", "95")},
        **{f"log_ratio_p{q}/tokens_32_63": 2.0 for q in ("05", "50", "95")},
        **{f"log_ratio_p{q}/tokens_64_127": 4.0 for q in ("05", "50", "95")},
        "log_ratio_p05/share_0_1": 0.125,
        "log_ratio_p95/share_1_2": 2.0,
        "log_ratio_p05/share_50_100": 2.0,  # 13 of 50
        "log_ratio_p50/share_50_100": 4.0,
        "log_prefix_min_p05/tokens_2_3": 0.125,
        "log_prefix_min_p95/share_50_100": 0.125,
    }
    for name, value in expected.items():
        assert math.log(value) / final[name] == pytest.approx(1.0, abs=10 ** (1 / 16) - 1), name
    assert abs(final["log_prefix_min_p50/token_1"]) <= 1e-5, "an empty prefix has ratio 1"
    assert "log_ratio_p50/tokens_128_255" not in final


def test_shares_end_with_their_percentage() -> None:
    place_T = torch.tensor([1.0, 2, 3, 5, 6, 10, 11, 20, 21, 50, 51, 100, 1])
    num_trained_T = torch.tensor([100.0] * 12 + [3.0])
    assert share_stretches(place_T, num_trained_T).tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 5]


def test_clipped_share_among_tokens_with_an_advantage(cases, run_objective) -> None:
    case = cases.of_ratios([2.0, 2.0, 1.0, 0.5])
    with_advantage = run_objective(make_objective("grpo"), case).metrics
    assert with_advantage["clip/hard_with_advantage"].tolist() == with_advantage["clip/hard"].tolist() == [2.0, 4.0]
    case = replace(case, advantages=[torch.tensor([1.0, 0.0, 0.0, 1.0])])
    assert run_objective(make_objective("grpo"), case).metrics["clip/hard_with_advantage"].tolist() == [1.0, 2.0]
