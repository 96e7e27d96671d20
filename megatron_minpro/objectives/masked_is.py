"""Masked importance sampling: each token's own ratio where it lies within two bounds, else nothing."""

from __future__ import annotations

import math

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_score_centering
from megatron_minpro.objectives.options import check_number
from megatron_minpro.objectives.policy_gradient import masked_policy_gradient
from megatron_minpro.objectives.ratios import log_ratio, scan_batch


@with_score_centering
def masked_is(
    batch: TokenBatch,
    *,
    low: float = 0.5,
    high: float = 5.0,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = 1/N sum_t sg(rho_t [low <= rho_t <= high]) A_t log pi_theta(t), whatever the sign of A_t.

    Defaults: the bounds of IcePop (arXiv:2510.18855), which sets them around the ratio of trainer to server under the same weights and
    multiplies PPO's; here rho_t is the whole ratio. Dropped tokens keep their place in the denominator.

    Args:
        batch: one packed micro-batch.
        low: smallest ratio that is kept; 0: none is too small.
        high: largest ratio that is kept.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    check_number("low", low, at_least=0)
    check_number("high", high, above=low)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    log_low = math.log(low) if low > 0 else -math.inf
    return masked_policy_gradient(batch, log_ratio_T, scanned, log_low=log_low, log_high=math.log(high))
