"""REINFORCE: no correction for the sampling policy at all (Williams, 1992)."""

from __future__ import annotations

import torch

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_score_centering
from megatron_minpro.objectives.policy_gradient import weighted_policy_gradient
from megatron_minpro.objectives.ratios import log_ratio, scan_batch


@with_score_centering
def reinforce(batch: TokenBatch, *, aggregation: str = "token_mean", aggregation_length: int | None = None) -> ObjectiveOutput:
    """J = 1/N sum_t A_t log pi_theta(t): weight 1 everywhere. The lower control: what staleness costs when nothing corrects for it."""
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    zeros_T = torch.zeros_like(log_ratio_T)
    return weighted_policy_gradient(batch, log_ratio_T, scanned, zeros_T, log_low=0.0, log_high=0.0, log_factor_T=zeros_T)
