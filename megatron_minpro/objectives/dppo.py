"""DPPO: a trust region of the sampled token's probability instead of its ratio (arXiv:2602.04879), by total variation or by KL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number
from megatron_minpro.objectives.ratios import Scanned, trained
from megatron_minpro.objectives.token_bounds import Bounds, clip_by, total_variation_bounds

_FLOOR = 1e-8  # added to the probabilities of "another token" in the logarithm, as the released code does


def dppo_tv(
    batch: TokenBatch,
    *,
    delta_low: float = 0.15,
    delta_high: float = 0.15,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """PPO's clip with 1 - delta_low / pi_old(t) <= rho_t <= 1 + delta_high / pi_old(t) (arXiv:2602.04879, eqs. 11 to 16, binary form).

    So a token is dropped where it would move on outward and |pi_theta(t) - pi_old(t)| > delta. Its ratio has no further cap: a token with
    pi_old = 0.02 may reach the ratio 11 at delta 0.2.
    Defaults: the paper's 0.15 for total variation; SkyRL and prime-rl use 0.2, and CPPO's paper 0.15 for dense models, 0.2 for 30B-A3B.
    Choices: binary, as the paper finds no significant gain in its top-k form. pi_old must be the distribution that sampled: the paper shows
    collapse with log-probs that the trainer computes anew. The official recipe sums over tokens and divides by a constant length, 8192:
    aggregation=constant aggregation_length=8192; token_mean is what the other objectives of a comparison have. verl caps the ratio at 3 by
    default and its recipe switches that off; so do we.

    Args:
        batch: one packed micro-batch.
        delta_low: how far the token's probability may fall.
        delta_high: how far it may rise.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    check_number("delta_low", delta_low, above=0)
    check_number("delta_high", delta_high, above=0)

    def rule(_log_ratio_T: Tensor, _scanned: Scanned) -> Bounds:
        return total_variation_bounds(batch, delta_low, delta_high)

    return clip_by(batch, rule, aggregation=aggregation, aggregation_length=aggregation_length)


def dppo_kl(
    batch: TokenBatch,
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """As `dppo_tv` with the KL divergence of the two-way choice "this token or another":
    mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)), mu = pi_old(t), pi = pi_theta(t) (arXiv:2602.04879, eqs. 11 to 16, binary form).

    A token is dropped where it would move on outward and the divergence exceeds delta.
    Defaults: the paper's 0.05. As in the released code 1e-8 is added to both probabilities of another token. The divergence has no inverse
    in closed form: a token inside has no bound, and one outside has the bound 1, so its loss is -A_t where PPO's would be that at the
    bound. The gradient is the same.

    Args:
        batch: one packed micro-batch.
        delta_low: divergence allowed where the token's probability has fallen.
        delta_high: where it has risen.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    check_number("delta_low", delta_low, above=0)
    check_number("delta_high", delta_high, above=0)

    def rule(log_ratio_T: Tensor, _scanned: Scanned) -> Bounds:
        divergence_T = _binary_kl(batch, log_ratio_T)
        log_low_T = torch.where(divergence_T > delta_low, 0.0, -math.inf)
        return log_low_T, torch.where(divergence_T > delta_high, 0.0, math.inf)

    return clip_by(batch, rule, aggregation=aggregation, aggregation_length=aggregation_length)


def _binary_kl(batch: TokenBatch, log_ratio_T: Tensor) -> Tensor:
    """KL(pi_old || pi_theta) of "this token or another": float64 [T]."""
    behaviour_T, current_T = (trained(batch, x.detach()).double() for x in (batch.behaviour_logprobs_T, batch.logprobs_T))
    other_behaviour_T, other_T = (-torch.expm1(x_T.clamp(max=0.0)) for x_T in (behaviour_T, current_T))  # rounding may give log p > 0
    other_log_ratio_T = (other_T + _FLOOR).log() - (other_behaviour_T + _FLOOR).log()
    return -behaviour_T.exp() * log_ratio_T.double() - other_behaviour_T * other_log_ratio_T
