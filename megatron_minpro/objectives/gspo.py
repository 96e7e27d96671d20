"""GSPO: one ratio per sequence, the geometric mean of its tokens' (arXiv:2507.18071)."""

from __future__ import annotations

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import log_bounds
from megatron_minpro.objectives.policy_gradient import ppo_clip
from megatron_minpro.objectives.ratios import log_ratio, scan_batch


def gspo(batch: TokenBatch, *, clip_low: float = 2e-3, clip_high: float = 2e-3) -> ObjectiveOutput:
    """J = 1/S sum_s 1/n_s sum_t min(s_t A_t, clip(s_t, 1 - clip_low, 1 + clip_high) A_t), s_t = sg(s) pi_theta(t) / sg(pi_theta(t)),
    s = exp(mean_t log rho_t) (arXiv:2507.18071, eqs. 5 and 7; the per-token form is its GSPO-token, eqs. 13 and 14).

    Defaults: 2e-3 on both sides, GSPO's bounds as the MinPRO paper's baseline uses them (arXiv:2601.22718); GSPO's own are 3e-4 and 4e-4.
    The aggregation is the method's own, seq_mean_token_mean. The gradient runs through every token of the sequence and equals that of
    the sequence's ratio where A is constant in it.

    Args:
        batch: one packed micro-batch.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.

    Raises:
        ValueError: an option is out of range.
    """
    log_low, log_high = log_bounds(clip_low, clip_high)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation="seq_mean_token_mean", aggregation_length=None)
    mean_S = scanned.sequence_S / scanned.num_trained_S.clamp(min=1.0)
    # The value is the sequence's, the gradient the token's own.
    sequence_log_ratio_T = batch.shard.per_token(mean_S) + (log_ratio_T - log_ratio_T.detach())
    return ppo_clip(batch, log_ratio_T, scanned, sequence_log_ratio_T, log_low=log_low, log_high=log_high)
