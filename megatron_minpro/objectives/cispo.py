"""CISPO: each token's own ratio, clipped and detached (arXiv:2506.13585); also times a constant, as a control."""

from __future__ import annotations

import torch

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_score_centering
from megatron_minpro.objectives.options import check_number, log_bounds
from megatron_minpro.objectives.policy_gradient import weighted_policy_gradient
from megatron_minpro.objectives.ratios import log_ratio, scan_batch


@with_score_centering
def cispo(
    batch: TokenBatch,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = 1/N sum_t sg(clip(rho_t, 1 - clip_low, 1 + clip_high)) A_t log pi_theta(t) (arXiv:2506.13585, eqs. 4 and 5).

    Defaults: the bounds of the MinPRO paper's comparison, 1 and 4 (arXiv:2601.22718), so no lower bound, as CISPO's paper advises; that
    paper does not publish its upper one.

    Args:
        batch: one packed micro-batch.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    return scaled_cispo(
        batch, scale=1.0, clip_low=clip_low, clip_high=clip_high, aggregation=aggregation, aggregation_length=aggregation_length
    )


@with_score_centering
def scaled_cispo(
    batch: TokenBatch,
    *,
    scale: float,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """CISPO with every weight times `scale` after the clip: the control for the smaller steps that MinPRO's minimum implies.

    Args:
        batch: one packed micro-batch.
        scale: multiplies every weight after the clip. It has no published default; the mean weight of a MinPRO run over that
            of a CISPO run is the one to compare with.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.
    """
    check_number("scale", scale, above=0)
    log_low, log_high = log_bounds(clip_low, clip_high)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    return weighted_policy_gradient(
        batch,
        log_ratio_T,
        scanned,
        log_ratio_T,
        log_low=log_low,
        log_high=log_high,
        scale=scale,
        log_factor_T=torch.zeros_like(log_ratio_T),
    )
