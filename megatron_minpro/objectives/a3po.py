"""A-3PO: PPO's clip around a policy between the sampling one and the current one, which costs no forward pass (arXiv:2512.06547)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import log_bounds
from megatron_minpro.objectives.ratios import Scanned
from megatron_minpro.objectives.token_bounds import Bounds, clip_by


def a3po(
    batch: TokenBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """PPO's clip with (1 - clip_low)^lag <= rho_t <= (1 + clip_high)^lag (arXiv:2512.06547v3).

    The paper clips pi_theta / pi_prox, log pi_prox = log pi_old + (lag - 1) / lag sg(log rho), and weights with pi_prox / pi_old. As
    pi_theta / pi_prox = rho^(1 / lag), this has the gradient of PPO on rho with its log bounds times the lag. At lag 1, and at lag 0,
    where pi_prox is pi_old, it is PPO. The region widens with age: clip_high 0.2 at lag 16 allows the ratio 18.5.
    lag counts versions of the weights that servers sample with, as AReaL's does: global steps of training between the weights that sampled
    and the current ones, the mini-batches of the step under way not counted. At staleness n it is n, and less in the first n steps.
    Defaults: PPO's 0.2 on both sides. Unclear: AReaL's code applies the factor pi_prox / pi_old only together with its rejection sampling,
    which is off by default; without it the weight is rho^(1 / lag). This is the paper's form, with the factor.

    Args:
        batch: one packed micro-batch, with its lag.
        clip_low: the lower bound is (1 - clip_low)^lag; 1 or more: no lower bound.
        clip_high: the upper bound is (1 + clip_high)^lag.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range, or the batch has no lag.
    """
    log_low, log_high = log_bounds(clip_low, clip_high)
    if batch.lag is None:
        raise ValueError("a3po needs the lag of the batch")
    lag = max(batch.lag, 1)

    def rule(log_ratio_T: Tensor, _scanned: Scanned) -> Bounds:
        return torch.full_like(log_ratio_T, lag * log_low), torch.full_like(log_ratio_T, lag * log_high)

    return clip_by(batch, rule, aggregation=aggregation, aggregation_length=aggregation_length)
