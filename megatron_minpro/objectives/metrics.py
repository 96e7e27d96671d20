"""What every objective reports: sums, counts and fixed-bin histograms, which add up over ranks, micro-batches and mini-batches.

A metric is float64, [2] = (sum, count), or by the end of its name: [NUM_BINS] = counts per bin (`/histogram`), what
effective_sample_size.py sums (`/weight_sums`), what by_place.py sums (`/by_place`, `/by_share`). `finalize_metrics` makes numbers of
the totals.
megatron_minpro/tracking/metrics_table.py says what each name means. Shapes: T local packed tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float, Float64, Shaped, UInt8
from torch import Tensor

from megatron_minpro.objectives.base import TokenBatch
from megatron_minpro.objectives.by_place import (
    NUM_STRETCHES,
    PLACE_SUFFIX,
    SHARE_SUFFIX,
    SHARES,
    means_by_place,
    means_by_share,
    place_stretches,
    share_stretches,
    sums_by_stretch,
)
from megatron_minpro.objectives.cut import has_no_gradient, is_held
from megatron_minpro.objectives.effective_sample_size import WEIGHT_SUMS_SUFFIX, effective_sample_size, weight_sums
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, Scanned, ratio
from megatron_minpro.objectives.score_centering import Centering

# A log ratio within this is that of a ratio of 1: log-probs down to -20 carry fp32 errors of 2e-6 and more when packed differently.
UNIT_LOG_RATIO = 1e-5
# A token with a smaller weight teaches next to nothing.
VANISHED_WEIGHT = 0.01

HISTOGRAM_SUFFIX = "/histogram"
_SUFFIXES = f"{HISTOGRAM_SUFFIX}, {WEIGHT_SUMS_SUFFIX}, {PLACE_SUFFIX} or {SHARE_SUFFIX}"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

# Bins of a log ratio: symmetric, 16 per decade from 1e-5 to 100, one around 0, and open ends.
_MAGNITUDES = torch.logspace(-5, 2, 7 * 16 + 1, dtype=torch.float64)
BIN_EDGES = torch.cat([-_MAGNITUDES.flip(0), _MAGNITUDES])
NUM_BINS = len(BIN_EDGES) + 1


def token_metrics(
    batch: TokenBatch,
    *,
    log_ratio_T: Float[Tensor, " T"],
    scanned: Scanned,
    weights_T: Float[Tensor, " T"],
    cut_T: UInt8[Tensor, " T"],
    loss: Float[Tensor, ""],
) -> dict[str, Float64[Tensor, " _"]]:
    """Metrics of one micro-batch, over its trained tokens.

    cut_T: a Cut. clip/hard counts tokens whose gradient a clip, a gate or a filter made 0, clip/soft those whose weight was held.
    loss/policy has the denominator (local trained tokens / global_tokens), which is 1 over a mini-batch: its mean is the loss per
    mini-batch. policy/kl_to_behaviour is the estimator k3 = rho - 1 - log rho of KL(pi_old || pi_theta), whose samples come from pi_old
    (Schulman, "Approximating KL divergence", 2020). Ratios in metrics are held within exp(+-20).
    """
    mask_T = batch.loss_mask_T
    count = mask_T.sum().double()
    mean_of = partial(_sum_and_count, mask_T=mask_T, count=count)
    d_T, prefix_min_T = log_ratio_T.detach(), scanned.prefix_min_T
    share_S = (scanned.num_trained_S > 0).double() / batch.shard.cp_size  # every context-parallel rank knows the whole sequence's ratio
    hard_T, taught_T = has_no_gradient(cut_T), mask_T & (batch.advantages_T != 0)
    ratio_T = ratio(d_T.double())
    bounded_T = d_T.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "ratio/mean": mean_of(ratio_T),
        "log_ratio/mean": mean_of(d_T),
        "log_ratio/mean_square": mean_of(d_T.double().square()),
        "ratio/unit": mean_of(d_T.abs() <= UNIT_LOG_RATIO),
        "prefix_min/mean": mean_of(ratio(prefix_min_T.double())),
        "weight/mean": mean_of(weights_T),
        "weight/mean_square": mean_of(weights_T.double().square()),
        "weight/vanished": mean_of(weights_T.abs() < VANISHED_WEIGHT),
        "clip/hard": mean_of(hard_T),
        "clip/hard_with_advantage": _sum_and_count(hard_T, mask_T=taught_T, count=taught_T.sum().double()),
        "clip/soft": mean_of(is_held(cut_T)),
        "advantage/mean": mean_of(batch.advantages_T),
        "policy/kl_to_behaviour": mean_of(torch.expm1(bounded_T) - bounded_T),
        "loss/policy": torch.stack([loss.double(), count / batch.global_tokens]),
        "effective_sample_size/token/weight_sums": weight_sums(d_T, mask_T.double()),
        "effective_sample_size/prefix/weight_sums": weight_sums(scanned.cumulative_T, mask_T.double()),
        "effective_sample_size/sequence/weight_sums": weight_sums(scanned.sequence_S, share_S),
        "log_ratio/histogram": histogram(d_T, mask_T),
        "log_prefix_min/histogram": histogram(prefix_min_T, mask_T),
        **_along_the_response(batch, scanned, {"log_prefix_min": prefix_min_T, "weight": weights_T}),
    }


def _along_the_response(batch: TokenBatch, scanned: Scanned, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    place_T = place_stretches(scanned.place_T)
    share_T = share_stretches(scanned.place_T, batch.shard.per_token(scanned.num_trained_S))
    return {
        name + suffix: sums_by_stretch(x_T, stretch_T, batch.loss_mask_T, num_stretches=num_stretches)
        for name, x_T in values.items()
        for suffix, stretch_T, num_stretches in ((PLACE_SUFFIX, place_T, NUM_STRETCHES), (SHARE_SUFFIX, share_T, len(SHARES)))
    }


def centering_metrics(batch: TokenBatch, centering: Centering) -> dict[str, Float64[Tensor, " _"]]:
    """Metrics of what score centering subtracts, over the trained tokens of one micro-batch."""
    mean_of = partial(_sum_and_count, mask_T=batch.loss_mask_T, count=batch.loss_mask_T.sum().double())
    return {"centering/active": mean_of(centering.active_T), "centering/drift": mean_of(centering.drift_T)}


def _sum_and_count(x_T: Shaped[Tensor, " T"], mask_T: Tensor, count: Tensor) -> Float64[Tensor, " 2"]:
    return torch.stack([torch.where(mask_T, x_T.detach().double(), 0.0).sum(), count])


def histogram(x_T: Float[Tensor, " T"], mask_T: Bool[Tensor, " T"]) -> Float64[Tensor, " bins"]:
    """Counts of x per bin over unmasked tokens: float64 [NUM_BINS]. Bin i holds BIN_EDGES[i - 1] < x <= BIN_EDGES[i]."""
    bin_T = torch.bucketize(x_T.detach().double(), BIN_EDGES.to(x_T.device, non_blocking=True))
    return x_T.new_zeros(NUM_BINS, dtype=torch.float64, requires_grad=False).index_add(0, bin_T, mask_T.double())


def add_metrics(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Totals over micro-batches, ranks or mini-batches. Raises ValueError if the names differ."""
    totals: dict[str, Tensor] = {}
    for metrics in batches:
        if totals and totals.keys() != metrics.keys():
            raise ValueError(f"metrics differ in their names: {sorted(totals.keys() ^ metrics.keys())}")
        totals = {name: value + totals[name] if totals else value for name, value in metrics.items()}
    return totals


def finalize_metrics(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of the (sum, count) pairs under their names, quantiles of the histograms as group/p01 ... group/p99, means by place as
    group/token_1, group/tokens_2_3, ... and by share as group/share_0_1, ... (those that have a token), effective sample sizes, and
    weight/effective_sample_size = mean(w)^2 / mean(w^2), the share of tokens that equal weights would need (Kish, 1965).

    A metric without any token is NaN, never 0. Raises ValueError for a shape that is none of these.
    """
    final: dict[str, float] = {}
    for name, value in totals.items():
        if name.endswith(HISTOGRAM_SUFFIX):
            stem = name.removesuffix(HISTOGRAM_SUFFIX)
            final |= {f"{stem}/p{round(100 * q):02d}": histogram_quantile(value, q) for q in QUANTILES}
        elif name.endswith(WEIGHT_SUMS_SUFFIX):
            final[name.removesuffix(WEIGHT_SUMS_SUFFIX)] = effective_sample_size(value)
        elif name.endswith(PLACE_SUFFIX):
            stem = name.removesuffix(PLACE_SUFFIX)
            final |= {f"{stem}/{stretch}": mean for stretch, mean in means_by_place(value).items()}
        elif name.endswith(SHARE_SUFFIX):
            stem = name.removesuffix(SHARE_SUFFIX)
            final |= {f"{stem}/{stretch}": mean for stretch, mean in means_by_share(value).items()}
        elif tuple(value.shape) == (2,):
            total, count = value.tolist()
            final[name] = total / count if count else math.nan
        else:
            raise ValueError(f"metric {name!r} has shape {list(value.shape)}; expected [2], or a name that ends in {_SUFFIXES}")
    if "weight/mean" in final and "weight/mean_square" in final:
        mean_square = final["weight/mean_square"]
        final["weight/effective_sample_size"] = final["weight/mean"] ** 2 / mean_square if mean_square else math.nan
    return final


def histogram_counts(totals: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The histograms under their names without the suffix: NUM_BINS counts each, of the bins that BIN_EDGES parts."""
    return {name.removesuffix(HISTOGRAM_SUFFIX): value.tolist() for name, value in totals.items() if name.endswith(HISTOGRAM_SUFFIX)}


def histogram_quantile(counts: Float64[Tensor, " bins"], q: float) -> float:
    """The q-quantile of a histogram, linear inside its bin; the outermost edge in an open bin; NaN for an empty histogram."""
    if tuple(counts.shape) != (NUM_BINS,):
        raise ValueError(f"a histogram has {NUM_BINS} bins, got shape {list(counts.shape)}")
    counts = counts.double().cpu()
    total = float(counts.sum())
    if total == 0:
        return math.nan
    cumulative = counts.cumsum(0)
    wanted = q * total
    index = min(int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64))), NUM_BINS - 1)
    if index in (0, NUM_BINS - 1):
        return float(BIN_EDGES[0 if index == 0 else -1])
    low, high = float(BIN_EDGES[index - 1]), float(BIN_EDGES[index])
    inside = (wanted - float(cumulative[index] - counts[index])) / float(counts[index])
    return low + inside * (high - low)
