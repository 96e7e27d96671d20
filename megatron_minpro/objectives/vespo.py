"""VESPO: the sequence's ratio, reshaped so that it fades on both sides of 1 (arXiv:2602.10693)."""

from __future__ import annotations

import math

import torch

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number
from megatron_minpro.objectives.policy_gradient import weighted_policy_gradient
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, advantages, log_ratio, scan_batch


def vespo(
    batch: TokenBatch,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = 1/N sum_t sg(W^k exp(lambda (1 - W))) A_t log pi_theta(t), W = prod_i rho_i of the sequence (arXiv:2602.10693).

    W is the product, not a mean, held within e^+-20. The weight is at most 1.21 (A >= 0, at W = 2/3) and 1.24 (A < 0, at W = 3/2).
    Defaults: (k, lambda) = (2, 3) where A >= 0 and (3, 2) where A < 0, and the token mean, as the released code computes; its docstring
    lists other numbers. A long stale sequence has a W far from 1 and then trains next to nothing: W = 10 gives 2e-10. The metric
    weight/vanished shows it.
    Unclear: two tables of the paper disagree about its results with 8 mini-batches.

    Args:
        batch: one packed micro-batch.
        power_positive, decay_positive: k and lambda where A >= 0.
        power_negative, decay_negative: k and lambda where A < 0.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    for name, value in (("power_positive", power_positive), ("power_negative", power_negative)):
        check_number(name, value, at_least=0)
    for name, value in (("decay_positive", decay_positive), ("decay_negative", decay_negative)):
        check_number(name, value, at_least=0)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    product_T = batch.shard.per_token(scanned.sequence_S).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # its log
    bad_T = advantages(batch) < 0
    power_T, decay_T = torch.where(bad_T, power_negative, power_positive), torch.where(bad_T, decay_negative, decay_positive)
    log_weights_T = (power_T * product_T - decay_T * torch.expm1(product_T)).float()
    return weighted_policy_gradient(batch, log_ratio_T, scanned, log_weights_T, log_low=-math.inf, log_high=math.inf)
