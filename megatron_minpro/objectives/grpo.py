"""GRPO's clipped surrogate with separate bounds (arXiv:2402.03300; clip-higher of DAPO, arXiv:2503.14476)."""

from __future__ import annotations

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number, log_bounds
from megatron_minpro.objectives.policy_gradient import ppo_clip
from megatron_minpro.objectives.ratios import log_ratio, scan_batch


def grpo(
    batch: TokenBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = 1/N sum_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) (arXiv:2503.14476, eq. 8), without a KL term.

    Defaults: DAPO's bounds 0.2 and 0.28 and its token-mean, with which the MinPRO paper trains GRPO; seq_mean_token_mean is the formula of
    GRPO's own paper. Gradient zero: A > 0 and rho > 1 + clip_high, A < 0 and rho < 1 - clip_low, A < 0 and rho > c.
    A log ratio beyond +-20 is held there, without gradient: exp of it would overflow.

    Args:
        batch: one packed micro-batch.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.
        dual_clip: c bounds the loss of a token with A < 0 by -A c (arXiv:1912.09729; 3.0 where it is used); None: off.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    log_low, log_high = log_bounds(clip_low, clip_high)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, above=1)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    return ppo_clip(batch, log_ratio_T, scanned, log_ratio_T, log_low=log_low, log_high=log_high, dual_clip=dual_clip)
