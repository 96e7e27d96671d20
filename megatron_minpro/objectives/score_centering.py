"""Score centering: subtract what a truncated importance weight adds to the gradient in the mean (arXiv:2609.20807).

s_v = grad log p_v is the score of token v, p the trained policy, q the distribution that was sampled from. The untruncated weight p / q has
E_q[(p / q) s] = sum_v p_v s_v = 0: a baseline in the advantages changes nothing in the mean. A weight f(p / q) that is truncated, or 1, has
a drift E_q[f s] = sum_v q_v f(p_v / q_v) s_v, and every step moves by it times the advantage. The loss that subtracts it exactly is

    -A [ f(p_a / q_a) log p_a - sum_v sg(q_v f(p_v / q_v)) log p_v ]

H are the K most likely tokens of q, with masses Q_H and P_H. The others are taken as one, q_v = rho p_v with

    rho = (1 - Q_H) / (1 - P_H)    both floored at 1e-6
    alpha = rho f(1 / rho)         of all other tokens: q_v f(p_v / q_v) = alpha p_v
    c_v = q_v f(p_v / q_v) - alpha p_v    for v in H
    loss = -A [ f(p_a / q_a) log p_a - sum_H sg(c_v) log p_v ]

as sum_v p_v s_v = 0 takes alpha p_v off every token at no cost: the others need no ids.

What the weight is enters as q f(p / q) alone, a `LogMass`. It is formed in log space: p / q has no bound.

    f = 1                        q                       no correction
    f = clip(u r, low, high)     clip(u p, low q, high q)   u = 1: CISPO; u of earlier tokens: MinPRO, the prefix product
    f = r, or 0 outside [low, high]    p, or 0              masked importance sampling

u must be known before the token is drawn, as the minimum and the product of earlier ratios are. A weight that looks at the whole response
(GSPO), at the mini-batch, or at the sign of the advantage (PPO's clip) is none of these: such an objective is refused. An f that never
truncates gives c = 0. MinPRO at its published ceiling of 5 should be near that; a narrow ceiling, f = 1 and quantized servers are not.

The text of the paper was not available. This follows the authors' code and its ports to other frameworks; that MinPRO's weight can be
centred follows from the algebra above and is published by nobody. Unclear: whether the paper floors the two masses as its code does.

q must be the distribution that the server sampled from, so `behaviour_logprobs` is `engine`.

Shapes: T local packed tokens, K top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from parallel.top_tokens import ScoredTopTokens

# Below this a tail has no ratio: what rounding leaves of 1 - Q_H.
SMALLEST_TAIL = 1e-6

# (log p, log q) of tokens, [T, K] -> log(q f(p / q)), a new tensor, -inf for 0. Homogeneous: of (p, q) times x it gives x times as much.
LogMass = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Centering:
    """What is subtracted from each token's w log p. Rows of tokens that are not trained are 0."""

    term_T: Float[Tensor, " T"]  # sum_H sg(c_v) log p_v, with gradient
    drift_T: Float64[Tensor, " T"]  # sum over the vocabulary of |its gradient with respect to the logit|, with the other tokens as one
    active_T: Bool[Tensor, " T"]  # c is not 0 everywhere


def clipped(log_factor_T: Float[Tensor, " T"], log_low_T: Float[Tensor, " T"], log_high_T: Float[Tensor, " T"]) -> LogMass:
    """f(r) = clip(u r, low, high), from log u, which is known before the token is drawn, and the bounds in log space."""
    factor_T1, low_T1, high_T1 = (x_T.detach()[:, None] for x_T in (log_factor_T, log_low_T, log_high_T))

    def log_mass(log_p: Tensor, log_q: Tensor) -> Tensor:
        bounded = torch.maximum(factor_T1 + log_p, low_T1 + log_q)
        return torch.minimum(bounded, high_T1 + log_q, out=bounded)

    return log_mass


def masked(*, log_low: float, log_high: float) -> LogMass:
    """f(r) = r where low <= r <= high, else 0, from the bounds in log space."""

    def log_mass(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_ratio = log_p - log_q
        return torch.where((log_ratio < log_low) | (log_ratio > log_high), -math.inf, log_p)

    return log_mass


def center(loss_mask_T: Bool[Tensor, " T"], top: ScoredTopTokens, log_mass: LogMass, *, scale: float) -> Centering:
    """The centering of every trained token, in the dtype of the log-probs; the tail's masses in float64.

    Args:
        loss_mask_T: True where a token is trained.
        top: log-probs of the sampler's most likely tokens.
        log_mass: what the objective's weight makes of a token.
        scale: multiplies f.
    """
    mask_T1 = loss_mask_T[:, None]
    # Replaced before anything is computed of it: NaN * 0 would be NaN, in backward too.
    logprobs_TK = torch.where(mask_T1, top.logprobs_TK, 0.0)
    with torch.no_grad():
        log_q_TK = torch.where(mask_T1, top.behaviour_logprobs_TK, 0.0)
        coefficients_TK = _coefficients(logprobs_TK, log_q_TK, log_mass).mul_(scale).masked_fill_(~mask_T1, 0.0)
        del log_q_TK
        total_T1 = coefficients_TK.sum(1, keepdim=True)
        probabilities_TK = logprobs_TK.exp()
        of_tail_T1 = (_tail(probabilities_TK).clamp(min=0.0) * total_T1).masked_fill_(~mask_T1, 0.0)
        of_top_TK = probabilities_TK.mul_(total_T1).sub_(coefficients_TK)
    return Centering(
        term_T=(coefficients_TK * logprobs_TK).sum(1),
        drift_T=of_top_TK.abs_().sum(1, dtype=torch.float64) + of_tail_T1[:, 0].abs().double(),
        active_T=(coefficients_TK != 0).any(1),
    )


def _coefficients(log_p_TK: Tensor, log_q_TK: Tensor, log_mass: LogMass) -> Tensor:
    """c_v. Without rounding where nothing is truncated: both of its terms are then the same numbers."""
    log_tails_T1 = [_tail(x_TK.exp()).clamp(min=SMALLEST_TAIL).log() for x_TK in (log_q_TK, log_p_TK)]
    log_tail_ratio_T1 = (log_tails_T1[0] - log_tails_T1[1]).to(log_p_TK.dtype)
    # alpha p = q f(p / q) of a token with q = rho p.
    log_alpha_T1 = log_mass(torch.zeros_like(log_tail_ratio_T1), log_tail_ratio_T1)
    return log_mass(log_p_TK, log_q_TK).exp_().sub_((log_alpha_T1 + log_p_TK).exp_())


def _tail(probabilities_TK: Tensor) -> Float64[Tensor, "T 1"]:
    return 1 - probabilities_TK.sum(1, keepdim=True, dtype=torch.float64)
