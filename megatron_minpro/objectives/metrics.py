"""What every objective reports: sums, counts and fixed-bin histograms, which add up over ranks, micro-batches and mini-batches.

A metric is float64, [2] = (sum, count), or by the end of its name: counts per bin of histograms.py (`/histogram`), what
effective_sample_size.py sums (`/weight_sums`), what by_place.py sums (`/by_place`, `/by_share`) and counts (`/histogram_by_place`,
`/histogram_by_share`). `finalize_metrics` makes numbers of the totals.
megatron_minpro/tracking/metrics_table.py says what each name means. Shapes: T local packed tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Float, Float64, Shaped, UInt8
from torch import Tensor

from megatron_minpro.objectives.base import TokenBatch
from megatron_minpro.objectives.by_place import (
    HISTOGRAM_BY_PLACE_SUFFIX,
    HISTOGRAM_BY_SHARE_SUFFIX,
    NUM_STRETCHES,
    PLACE_SUFFIX,
    SHARE_SUFFIX,
    SHARES,
    STRETCH_QUANTILES,
    STRETCHES,
    counts_by_stretch,
    means_by_stretch,
    place_stretches,
    quantiles_by_stretch,
    share_stretches,
    sums_by_stretch,
)
from megatron_minpro.objectives.cut import has_no_gradient, is_held
from megatron_minpro.objectives.effective_sample_size import WEIGHT_SUMS_SUFFIX, effective_sample_size, weight_sums
from megatron_minpro.objectives.histograms import bin_of, histogram_quantile
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, Scanned, ratio
from megatron_minpro.objectives.score_centering import Centering

# A log ratio within this is that of a ratio of 1: log-probs down to -20 carry fp32 errors of 2e-6 and more when packed differently.
UNIT_LOG_RATIO = 1e-5
# A token with a smaller weight teaches next to nothing.
VANISHED_WEIGHT = 0.01

HISTOGRAM_SUFFIX = "/histogram"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


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
        **_along_the_response(batch, scanned, {"log_ratio": d_T, "log_prefix_min": prefix_min_T}, {"weight": weights_T}),
    }


def _along_the_response(
    batch: TokenBatch, scanned: Scanned, logs: Mapping[str, Tensor], ratios: Mapping[str, Tensor]
) -> dict[str, Float64[Tensor, " B _"]]:
    """Means of all, histograms of the logs, by place and by share."""
    mask_T, bins = batch.loss_mask_T, {name: bin_of(x_T) for name, x_T in logs.items()}
    place_T = place_stretches(scanned.place_T)
    share_T = share_stretches(scanned.place_T, batch.shard.per_token(scanned.num_trained_S))
    found: dict[str, Tensor] = {}
    for stretch_T, num_stretches, means, histograms in (
        (place_T, NUM_STRETCHES, PLACE_SUFFIX, HISTOGRAM_BY_PLACE_SUFFIX),
        (share_T, len(SHARES), SHARE_SUFFIX, HISTOGRAM_BY_SHARE_SUFFIX),
    ):
        sums = sums_by_stretch({**logs, **ratios}, stretch_T, mask_T, num_stretches=num_stretches)
        found |= {name + means: sums_B2 for name, sums_B2 in sums.items()}
        counts = {name: counts_by_stretch(bin_T, stretch_T, mask_T, num_stretches=num_stretches) for name, bin_T in bins.items()}
        found |= {name + histograms: counts_of for name, counts_of in counts.items()}
    return found


def centering_metrics(batch: TokenBatch, centering: Centering) -> dict[str, Float64[Tensor, " _"]]:
    """Metrics of what score centering subtracts, over the trained tokens of one micro-batch."""
    mean_of = partial(_sum_and_count, mask_T=batch.loss_mask_T, count=batch.loss_mask_T.sum().double())
    return {"centering/active": mean_of(centering.active_T), "centering/drift": mean_of(centering.drift_T)}


def _sum_and_count(x_T: Shaped[Tensor, " T"], mask_T: Tensor, count: Tensor) -> Float64[Tensor, " 2"]:
    return torch.stack([torch.where(mask_T, x_T.detach().double(), 0.0).sum(), count])


def add_metrics(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Totals over micro-batches, ranks or mini-batches. Raises ValueError if the names differ."""
    totals: dict[str, Tensor] = {}
    for metrics in batches:
        if totals and totals.keys() != metrics.keys():
            raise ValueError(f"metrics differ in their names: {sorted(totals.keys() ^ metrics.keys())}")
        totals = {name: value + totals[name] if totals else value for name, value in metrics.items()}
    return totals


def finalize_metrics(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of the (sum, count) pairs under their names, quantiles of the histograms as group/p01 ... group/p99, effective sample sizes,
    and weight/effective_sample_size = mean(w)^2 / mean(w^2), the share of tokens that equal weights would need (Kish, 1965).

    Along the response, of stretches that have a token: means by place as group/token_1, group/tokens_2_3, ..., by share as
    group/share_0_1, ..., and quantiles under the same names in group_p05, group_p50 and group_p95.

    A metric without any token is NaN, never 0. Raises ValueError for a shape that is none of these.
    """
    final: dict[str, float] = {}
    for name, value in with_whole_histograms(totals).items():
        stem, slash, kind = name.rpartition("/")
        if slash + kind in _NUMBERS:
            final |= _NUMBERS[slash + kind](stem, value)
        elif tuple(value.shape) == (2,):
            total, count = value.tolist()
            final[name] = total / count if count else math.nan
        else:
            raise ValueError(f"metric {name!r} has shape {list(value.shape)}; expected [2], or a name that ends in {', '.join(_NUMBERS)}")
    if "weight/mean" in final and "weight/mean_square" in final:
        mean_square = final["weight/mean_square"]
        final["weight/effective_sample_size"] = final["weight/mean"] ** 2 / mean_square if mean_square else math.nan
    return final


def with_whole_histograms(totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The totals, and for each histogram by place that of all tokens: every token has a place."""
    whole = {
        name.removesuffix(HISTOGRAM_BY_PLACE_SUFFIX) + HISTOGRAM_SUFFIX: counts.sum(0)
        for name, counts in totals.items()
        if name.endswith(HISTOGRAM_BY_PLACE_SUFFIX)
    }
    return {**totals, **whole}


def _quantiles(stem: str, counts: Tensor) -> dict[str, float]:
    return {f"{stem}/{_percent(q)}": histogram_quantile(counts, q) for q in QUANTILES}


def _means_along(stretches: tuple[str, ...], stem: str, sums: Tensor) -> dict[str, float]:
    return {f"{stem}/{stretch}": mean for stretch, mean in means_by_stretch(stretches, sums).items()}


def _quantiles_along(stretches: tuple[str, ...], stem: str, counts: Tensor) -> dict[str, float]:
    return {
        f"{stem}_{_percent(q)}/{stretch}": value
        for q in STRETCH_QUANTILES
        for stretch, value in quantiles_by_stretch(stretches, counts, q).items()
    }


def _percent(q: float) -> str:
    return f"p{round(100 * q):02d}"


# End of a metric's name -> what comes of the total, given the name before that end.
_NUMBERS: Mapping[str, Callable[[str, Tensor], dict[str, float]]] = {
    HISTOGRAM_SUFFIX: _quantiles,
    WEIGHT_SUMS_SUFFIX: lambda stem, sums: {stem: effective_sample_size(sums)},
    PLACE_SUFFIX: partial(_means_along, STRETCHES),
    SHARE_SUFFIX: partial(_means_along, SHARES),
    HISTOGRAM_BY_PLACE_SUFFIX: partial(_quantiles_along, STRETCHES),
    HISTOGRAM_BY_SHARE_SUFFIX: partial(_quantiles_along, SHARES),
}


def histogram_counts(totals: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The histograms for people to look at, counts per bin: of all tokens as group, by share as group_histogram/share_0_1, ..."""
    found: dict[str, list[float]] = {}
    for name, counts in with_whole_histograms(totals).items():
        if name.endswith(HISTOGRAM_SUFFIX):
            found[name.removesuffix(HISTOGRAM_SUFFIX)] = counts.tolist()
        elif name.endswith(HISTOGRAM_BY_SHARE_SUFFIX):
            group = f"{name.removesuffix(HISTOGRAM_BY_SHARE_SUFFIX)}_histogram"
            found |= {f"{group}/{share}": row for share, row in zip(SHARES, counts.tolist(), strict=True)}
    return found
