"""Tokens with the least likely prefixes are dropped (arXiv:2601.22718, section 6.2, the indirect way)."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_minibatch_statistics
from megatron_minpro.objectives.options import check_number, log_bounds
from megatron_minpro.objectives.policy_gradient import weighted_policy_gradient
from megatron_minpro.objectives.ratios import log_ratio, scan_batch
from megatron_minpro.objectives.value_bins import bin_of, sum_per_bin
from parallel.prefix_scan import PrefixSum, scan


def prefix_filter_statistics(batch: TokenBatch, **_options: object) -> Float64[Tensor, " B"]:
    """Trained tokens per bin of the log of the cumulative ratio: float64 [NUM_BINS]. One scan."""
    (cumulative_T,) = scan(batch.shard, [PrefixSum(log_ratio(batch), batch.loss_mask_T)])
    return sum_per_bin(bin_of(cumulative_T), batch.loss_mask_T)


@with_minibatch_statistics(prefix_filter_statistics)
def prefix_filter(
    batch: TokenBatch,
    statistics: Float64[Tensor, " B"],
    *,
    fraction: float = 0.01,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """CISPO without the `fraction` of tokens whose cumulative ratio prod_{i<=t} rho_i is lowest.

    Defaults: 1 % (the paper) and CISPO's bounds. Choices that the paper leaves open: the ranking spans the whole mini-batch, in log space;
    the denominator stays the number of all trained tokens; the base is CISPO. At most `fraction` is dropped: bins of value_bins.py (0.1 %
    wide) go as a whole, so tokens that tie are kept together.

    Args:
        batch: one packed micro-batch.
        statistics: the sum of `prefix_filter_statistics` over the mini-batch.
        fraction: of the trained tokens, at most this share is dropped.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    if check_number("fraction", fraction, at_least=0) >= 1:
        raise ValueError(f"fraction must be below 1, got {fraction!r}")
    log_low, log_high = log_bounds(clip_low, clip_high)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    num_dropped_bins = (statistics.cumsum(0) <= fraction * statistics.sum()).sum()
    keep_T = bin_of(scanned.cumulative_T) >= num_dropped_bins
    return weighted_policy_gradient(batch, log_ratio_T, scanned, log_ratio_T, log_low=log_low, log_high=log_high, keep_T=keep_T)
