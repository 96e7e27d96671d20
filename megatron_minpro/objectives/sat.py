"""SAT: PPO's bounds tighten for the tokens whose ratio is among the most extreme of the mini-batch (arXiv:2607.18722)."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_minibatch_statistics
from megatron_minpro.objectives.options import check_number, log_bounds
from megatron_minpro.objectives.ratios import Scanned, log_ratio
from megatron_minpro.objectives.token_bounds import Bounds, around_one, clip_by
from megatron_minpro.objectives.value_bins import NUM_BINS, ZERO_BIN, bin_of, sum_per_bin


def sat_statistics(batch: TokenBatch, **_options: object) -> Float64[Tensor, " two_B"]:
    """Trained tokens, and the sum of |log rho|, per bin of |log rho|: float64 [2 * NUM_BINS]."""
    size_T = log_ratio(batch).detach().abs()
    bin_T, mask_T = bin_of(size_T), batch.loss_mask_T
    return torch.cat([sum_per_bin(bin_T, mask_T), sum_per_bin(bin_T, size_T * mask_T)])


@with_minibatch_statistics(sat_statistics)
def sat(
    batch: TokenBatch,
    statistics: Float64[Tensor, " two_B"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    quantile: float = 0.9,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """PPO's clip with 1 - clip_low c_t <= rho_t <= 1 + clip_high c_t (arXiv:2607.18722v1, eqs. 13 to 20, appendices E and F).

    u_t = |log rho_t|; q is the smallest u with at least the share `quantile` of all trained tokens at or below it (no interpolation);
    c_t = 1 / (1 + (u_t / q)^2) where u_t > q, on the side to which the token has moved, else 1. It falls from 1 to below 0.5 at q. q = 0,
    as on policy, tightens nothing. SAT acts only where q < log(1 + clip_high): beyond, PPO's own bound is the nearer one.
    Defaults: the paper's. Its form for GSPO is left out.
    Choices: q is that of the whole mini-batch over all ranks; the paper says "the current batch", and whether its code takes micro-batches
    is unknown. q comes from the bins of value_bins.py: the mean of the bin that holds it, so exact where the bin holds one value and
    within 0.1 % otherwise; tokens of that bin count as at q. Below 2^-20, which is rounding, q counts as 0.
    statistics: the sum of `sat_statistics` over the mini-batch. Unclear: the paper's KL and entropy terms; there are none here.

    Args:
        batch: one packed micro-batch.
        statistics: the sum of `sat_statistics` over the mini-batch.
        clip_low: the lower bound is 1 - clip_low c; 1 or more: no lower bound where c is 1.
        clip_high: the upper bound is 1 + clip_high c.
        quantile: the share of tokens whose bounds stay PPO's.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    log_bounds(clip_low, clip_high)
    if check_number("quantile", quantile, above=0) > 1:
        raise ValueError(f"quantile must be at most 1, got {quantile!r}")
    bin_of_q, q = _quantile(statistics, quantile)

    def rule(log_ratio_T: Tensor, _scanned: Scanned) -> Bounds:
        size_T = log_ratio_T.abs()
        extreme_T = (bin_of(size_T) > bin_of_q) & (q > 0)
        tightened_T = 1 / (1 + (size_T.double() / q).square())  # infinite where q is 0, and then not used
        below_T, above_T = (torch.where(extreme_T & side_T, tightened_T, 1.0) for side_T in (log_ratio_T < 0, log_ratio_T > 0))
        return around_one(clip_low * below_T, clip_high * above_T)

    return clip_by(batch, rule, aggregation=aggregation, aggregation_length=aggregation_length)


def _quantile(statistics: Float64[Tensor, " two_B"], quantile: float) -> tuple[Int64[Tensor, ""], Float64[Tensor, ""]]:
    """The bin of the quantile's order statistic, and the mean of the values in it; 0 where it is rounding. Scalar tensors."""
    counts, sums = statistics.view(2, NUM_BINS)
    rank = (quantile * counts.sum() - 1e-6).ceil().clamp(min=1)  # 0.9 * 10 may come out above 9
    index = (counts.cumsum(0) < rank).sum().clamp(max=NUM_BINS - 1)
    mean = sums[index] / counts[index].clamp(min=1)
    return index, torch.where(index > ZERO_BIN, mean, 0.0)
