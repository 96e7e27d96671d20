"""TOPR: tapered importance ratios, different for good and bad responses (arXiv:2503.14286)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_choice, check_number
from megatron_minpro.objectives.policy_gradient import weighted_policy_gradient
from megatron_minpro.objectives.ratios import Scanned, advantages, log_ratio, scan_batch

LEVELS = ("sequence", "sequence_mean", "token")


def topr(
    batch: TokenBatch,
    *,
    positive_low: float = 1.0,
    positive_high: float = 1.0,
    negative_low: float = 0.0,
    negative_high: float = 1.0,
    level: str = "sequence",
    aggregation: str = "seq_mean_token_sum",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """grad J = sum_{A>0} clip(r, a+, b+) A grad log pi + sum_{A<=0} clip(r, a-, b-) A grad log pi (arXiv:2503.14286).

    Defaults: the paper's canonical tapers a+ = b+ = b- = 1, a- = 0. Others: (1, 1, 0, 0) trains on good responses alone, (1, 1, 1, 1) is
    REINFORCE, (0, 1, 0, 1) truncated importance sampling.
    Choices: the paper's rewards are +-1 without baseline; here the sign is the advantage's. Sums over a trajectory's tokens and the mean
    over trajectories are the paper's gradient.

    Args:
        batch: one packed micro-batch.
        positive_low, positive_high: a+ and b+, the taper of responses with A > 0.
        negative_low, negative_high: a- and b-, the taper of the others.
        level: of r. `sequence`: the product of the trajectory's ratios (the paper). `sequence_mean`: its geometric mean (verl's
            documentation). `token`: each token's own (ROLL, Trinity-RFT).
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range, or a low taper is above its high one.
    """
    check_choice("level", level, LEVELS)
    log_low_positive, log_high_positive = _log_taper("positive", positive_low, positive_high)
    log_low_negative, log_high_negative = _log_taper("negative", negative_low, negative_high)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    good_T = advantages(batch) > 0
    return weighted_policy_gradient(
        batch,
        log_ratio_T,
        scanned,
        _at_level(batch, log_ratio_T, scanned, level),
        log_low=torch.where(good_T, log_low_positive, log_low_negative),
        log_high=torch.where(good_T, log_high_positive, log_high_negative),
    )


def _log_taper(side: str, low: float, high: float) -> tuple[float, float]:
    check_number(f"{side}_low", low, at_least=0)
    check_number(f"{side}_high", high, at_least=0)
    if low > high:
        raise ValueError(f"{side}_low={low} is above {side}_high={high}")
    return (math.log(low) if low > 0 else -math.inf), (math.log(high) if high > 0 else -math.inf)


def _at_level(batch: TokenBatch, log_ratio_T: Tensor, scanned: Scanned, level: str) -> Tensor:
    match level:
        case "sequence":
            return batch.shard.per_token(scanned.sequence_S)
        case "sequence_mean":
            return batch.shard.per_token(scanned.sequence_S / scanned.num_trained_S.clamp(min=1.0))
    return log_ratio_T
