"""PPO's clip with bounds of each token's own: what DPPO, CPPO, A-3PO and SAT share.

A rule looks at the log ratios and at the answers of the scan, and returns (log_low_T, log_high_T), without gradient. -inf and +inf are no
bound. Everything else is the clip of policy_gradient.py. There the gradient of a token is rho_t A_t, or 0 where A_t > 0 and rho_t is above
its upper bound, or A_t < 0 and rho_t below its lower one: tokens that would move further away from pi_old.

Shapes: T local packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.policy_gradient import ppo_clip
from megatron_minpro.objectives.ratios import Scanned, log_ratio, scan_batch, trained
from parallel.prefix_scan import Request

Bounds = tuple[Tensor, Tensor]
# (log ratios without gradient [T], answers of the scan) -> bounds
BoundsRule = Callable[[Tensor, Scanned], Bounds]


def clip_by(batch: TokenBatch, rule: BoundsRule, *requests: Request, aggregation: str, aggregation_length: int | None) -> ObjectiveOutput:
    """PPO's clipped surrogate of rho_t, each token within the bounds that the rule gives it.

    Args:
        batch: one packed micro-batch.
        rule: gives the bounds, both in log space; `scanned.results` holds the answers to the requests.
        requests: what the rule needs from earlier tokens.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.
    """
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, *requests, aggregation=aggregation, aggregation_length=aggregation_length)
    log_low_T, log_high_T = rule(log_ratio_T.detach(), scanned)
    return ppo_clip(batch, log_ratio_T, scanned, log_ratio_T, log_low=log_low_T, log_high=log_high_T)


def around_one(below_T: Float[Tensor, " T"], above_T: Float[Tensor, " T"]) -> Bounds:
    """Logarithms of the bounds 1 - below and 1 + above: fp32 [T]. below >= 1: no lower bound."""
    return torch.log1p(-below_T.clamp(max=1.0)).float(), torch.log1p(above_T).float()


def total_variation_bounds(batch: TokenBatch, below: float | Float[Tensor, " T"], above: float | Float[Tensor, " T"]) -> Bounds:
    """The ratios at which the sampled token's probability has moved by `below` or `above`: pi >= pi_old - below, pi <= pi_old + above."""
    probability_T = trained(batch, batch.behaviour_logprobs_T).detach().double().exp()

    def moved(distance: float | Tensor) -> Tensor:
        distance_T = distance if isinstance(distance, Tensor) else torch.full_like(probability_T, distance)
        return torch.where(distance_T > 0, distance_T / probability_T, 0.0)  # 0 / 0, of a probability that underflowed, is no bound of 0

    return around_one(moved(below), moved(above))


def total_variation(batch: TokenBatch, log_ratio_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """|pi - pi_old| of the sampled token, the total variation of the two-way choice "this token or another": fp32 [T], 0 if masked."""
    larger_T = trained(batch, torch.maximum(batch.behaviour_logprobs_T, batch.logprobs_T).detach()).double().exp()
    # expm1, as the difference of two probabilities near 1 has lost its digits; of the larger one, as the other may underflow.
    moved_T = -larger_T * torch.expm1(-log_ratio_T.detach().double().abs())
    return trained(batch, moved_T.clamp(max=1.0).float())  # rounding may give log p > 0
