"""DRPO: a quadratic penalty on the sampled token's probability in place of a clip (arXiv:2606.09821)."""

from __future__ import annotations

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number
from megatron_minpro.objectives.policy_gradient import fixed_weights
from megatron_minpro.objectives.ratios import advantages, log_ratio, ratio, scan_batch
from megatron_minpro.objectives.token_bounds import total_variation


def drpo(
    batch: TokenBatch, *, epsilon: float = 12.5, aggregation: str = "token_mean", aggregation_length: int | None = None
) -> ObjectiveOutput:
    """J = 1/N sum_t rho_t A_t - |A_t| pi_old(t) (rho_t - 1)^2 / (2 epsilon) (arXiv:2606.09821, eqs. 8 and 9): gradient weight
    rho_t (1 - sign(A_t (rho_t - 1)) |pi_theta(t) - pi_old(t)| / epsilon).

    The gradient is that of the formula; the loss reported is the weight times -A_t log pi_theta(t), as for all fixed weights.
    Default: 12.5, that of paper and recipe. What it means: two probabilities differ by at most 1, so the factor lies in [0.92, 1.08], and
    the objective is within 8 % of unclipped importance sampling; no token ever leaves its trust region. Why it works in the paper is
    unknown. With epsilon around 0.2 it is a smooth DPPO, whose weight turns negative where a token has moved outward by more than epsilon.
    The paper's recipe divides by a constant length: aggregation=constant aggregation_length=8192; its code's default is the token mean.
    epsilon -> infinity gives plain importance sampling.

    Args:
        batch: one packed micro-batch.
        epsilon: how far a token's probability may move outward before its weight turns.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    check_number("epsilon", epsilon, above=0)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    outward_T = advantages(batch).sign() * log_ratio_T.detach().sign()
    weights_T = ratio(log_ratio_T.detach()) * (1 - outward_T * total_variation(batch, log_ratio_T) / epsilon)
    return fixed_weights(batch, log_ratio_T, scanned, weights_T)
