"""The full prefix product as weight: what MinPRO replaces (arXiv:2601.22718, section 6.2, the direct way)."""

from __future__ import annotations

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_score_centering
from megatron_minpro.objectives.options import log_bounds
from megatron_minpro.objectives.policy_gradient import weighted_policy_gradient
from megatron_minpro.objectives.ratios import log_ratio, scan_batch


@with_score_centering
def prefix_ratio(
    batch: TokenBatch,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = 1/N sum_t sg(clip(prod_{i<=t} rho_i, 1 - clip_low, 1 + clip_high)) A_t log pi_theta(t).

    Defaults as MinPRO's. Choice: the product includes the token's own ratio, is formed in log space over trained tokens, and is clipped
    once, at the end. Ratios [2, 3, 1.5, 0.5, 4] give weights [2, 5, 5, 4.5, 5].

    Args:
        batch: one packed micro-batch.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    log_low, log_high = log_bounds(clip_low, clip_high)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    earlier_T = scanned.cumulative_T - log_ratio_T
    return weighted_policy_gradient(
        batch, log_ratio_T, scanned, scanned.cumulative_T, log_low=log_low, log_high=log_high, log_factor_T=earlier_T
    )
