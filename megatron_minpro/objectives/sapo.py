"""SAPO: a sigmoid gate in place of PPO's clip (arXiv:2511.20347)."""

from __future__ import annotations

import torch

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number
from megatron_minpro.objectives.policy_gradient import fixed_weights
from megatron_minpro.objectives.ratios import advantages, log_ratio, ratio, scan_batch


def sapo(
    batch: TokenBatch,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    aggregation: str = "seq_mean_token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = mean_t 4 / tau sigmoid(tau (rho_t - 1)) A_t (arXiv:2511.20347, eqs. 5 and 6): gradient weight 4 s (1 - s) rho_t, s = the sigmoid.

    The gradient is that of the formula; the loss reported is the weight times -A_t log pi_theta(t), as for all fixed weights.
    Defaults: the paper's, tau 1 where A > 0 and 1.05 where A <= 0. tau -> 0 gives plain importance sampling.
    A baseline that is known to fail when mini-batches are reused often (VESPO's table: 47.7 with 8, 19.8 with 32).

    Args:
        batch: one packed micro-batch.
        tau_positive: how sharply the gate closes where A > 0.
        tau_negative: where A <= 0.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    check_number("tau_positive", tau_positive, above=0)
    check_number("tau_negative", tau_negative, above=0)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    ratio_T = ratio(log_ratio_T.detach())
    gate_T = torch.where(advantages(batch) > 0, tau_positive, tau_negative) * (ratio_T - 1)
    # sigmoid(-x) is 1 - sigmoid(x) with its digits.
    return fixed_weights(batch, log_ratio_T, scanned, 4 * torch.sigmoid(gate_T) * torch.sigmoid(-gate_T) * ratio_T)
