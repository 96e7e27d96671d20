"""M2PO: a budget for the second moment of the log ratio, kept over the whole mini-batch (arXiv:2510.01161)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_minibatch_statistics
from megatron_minpro.objectives.options import check_choice, check_number
from megatron_minpro.objectives.policy_gradient import ppo_clip, weighted_policy_gradient
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, advantages, log_ratio, scan_batch
from megatron_minpro.objectives.value_bins import NUM_BINS, bin_of, sum_per_bin

RULES = ("paper", "official", "second_moment_all")


def m2po_statistics(batch: TokenBatch, *, rule: str, **_options: object) -> Float64[Tensor, " two_B"]:
    """Of the tokens that the rule looks at: how many, and the sum of (log rho)^2, per bin of |log rho|. float64 [2 * NUM_BINS]."""
    log_ratio_T = log_ratio(batch).detach()
    candidates_T = _candidates(batch, log_ratio_T, rule).double()
    bin_T = bin_of(log_ratio_T.abs())
    return torch.cat([sum_per_bin(bin_T, candidates_T), sum_per_bin(bin_T, candidates_T * log_ratio_T.double().square())])


@with_minibatch_statistics(m2po_statistics)
def m2po(
    batch: TokenBatch,
    statistics: Float64[Tensor, " two_B"],
    *,
    budget: float = 0.04,
    rule: str = "paper",
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = 1/N sum over kept tokens of rho_t A_t, where tokens are dropped until mean (log rho)^2 <= budget (arXiv:2510.01161).

    budget: 0.04, the paper's. Harmful tokens are those that a trust region gates: A > 0 and rho > 1, or A < 0 and rho < 1. rule:
      paper              harmful tokens with the largest (log rho)^2 are dropped until the mean over the remaining harmful ones meets it.
      official           the released code: PPO-min with bounds exp(-+tau), tau such that the mean of min((log rho)^2, tau^2) over harmful
                         tokens meets it. Gates more tokens than `paper`.
      second_moment_all  as `paper`, over all trained tokens whatever the sign of A, as AReaL does; the smallest stay even when they exceed
                         the budget. AReaL's further PPO clip is left out: it is another objective.
    Choices: scope is the whole mini-batch (the released code takes each micro-batch of each rank) and the sign is that of the token's own A
    (there, of the row's first column). Without a harmful token nothing is dropped. Dropped tokens keep their place in the denominator.
    Thresholds fall on the bins of value_bins.py, 0.1 % wide; a bin is kept or dropped as a whole.
    statistics: the sum of `m2po_statistics` over the mini-batch. Raises ValueError for an option out of range.
    """
    check_number("budget", budget, above=0)
    check_choice("rule", rule, RULES)
    counts, squares = statistics.view(2, NUM_BINS)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    if rule == "official":
        tau = winsorized_bound(counts, squares, budget)
        return ppo_clip(batch, log_ratio_T, scanned, log_ratio_T, log_low=-tau, log_high=tau)
    largest_kept = last_bin_within(counts, squares, budget)
    if rule == "second_moment_all":
        largest_kept = torch.maximum(largest_kept, (counts > 0).int().argmax())
    keep_T = ~_candidates(batch, log_ratio_T, rule) | (bin_of(log_ratio_T.abs()) <= largest_kept)
    return weighted_policy_gradient(batch, log_ratio_T, scanned, log_ratio_T, log_low=-MAX_LOG_RATIO, log_high=MAX_LOG_RATIO, keep_T=keep_T)


def last_bin_within(counts: Float64[Tensor, " B"], squares: Float64[Tensor, " B"], budget: float) -> Int64[Tensor, ""]:
    """The last bin such that the mean of the squares up to and with it is within the budget; -1 if there is none. A scalar tensor."""
    within = squares.cumsum(0) <= budget * counts.cumsum(0)
    # The running mean of ascending values never falls, so this is the length of a leading run.
    return within.int().cumprod(0).sum() - 1


def winsorized_bound(counts: Float64[Tensor, " B"], squares: Float64[Tensor, " B"], budget: float) -> float:
    """tau >= 0 such that the mean of min(v, tau^2) is the budget; +inf where the mean of v itself is within it."""
    wanted = budget * counts.sum()
    if squares.sum() <= wanted:
        return math.inf
    below, above = squares.cumsum(0) - squares, counts.flip(0).cumsum(0).flip(0)
    # If bin b is the first to be cut, the bins below count in full and the others tau^2 each.
    tau_squared = (wanted - below) / above.clamp(min=1)
    # As long as a bin lies below its tau^2 the next tau^2 is larger still, so the first bin that reaches its own is the one.
    mean = squares / counts.clamp(min=1)
    cut = ((counts > 0) & (mean >= tau_squared)).int().argmax()
    return float(tau_squared[cut].clamp(min=0).sqrt())


def _candidates(batch: TokenBatch, log_ratio_T: Tensor, rule: str) -> Tensor:
    if rule == "second_moment_all":
        return batch.loss_mask_T
    return batch.loss_mask_T & (advantages(batch) * log_ratio_T.detach().sign() > 0)
