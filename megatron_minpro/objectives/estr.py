"""ESTR: tokens whose ratio has moved further than the sampler's entropy explains are dropped in front of PPO's clip (arXiv:2607.22186)."""

from __future__ import annotations

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch, with_behaviour_entropies
from megatron_minpro.objectives.options import check_number, log_bounds
from megatron_minpro.objectives.policy_gradient import ppo_clip
from megatron_minpro.objectives.ratios import log_ratio, scan_batch, trained


@with_behaviour_entropies
def estr(
    batch: TokenBatch,
    *,
    tau: float = 1.6,
    epsilon: float = 0.01,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """PPO's clip over the tokens with (log rho_t)^2 / (H_t + epsilon) <= tau, H_t the entropy of the distribution that the token was
    sampled from (arXiv:2607.22186v1, appendices F and G, tables 3 to 6).

    Dropped tokens keep their place in the denominator. A token that the sampler was sure of (H = 0) is dropped from |log rho| > 0.126 on.
    H_t is the trainer's, under the weights that sampled, over the whole vocabulary at the sampling temperature: servers do not return it.
    It is recorded when the batch is scored, also with behaviour_logprobs = engine, where pi_old itself is the server's.
    Defaults: table 3's tau for math and GSM8K. It has 0.7 for BrowseComp-Plus. Unclear: the paper's headline result on 30B-A3B is tau = 1.0
    in table 4, where 0.7 gives less; a caption has 1e-8 for epsilon where the table has 0.01. tau -> infinity gives PPO.

    Args:
        batch: one packed micro-batch, with the entropies.
        tau: the largest score of a token that is kept.
        epsilon: added to the entropy.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range, or the batch has no entropies.
    """
    log_low, log_high = log_bounds(clip_low, clip_high)
    check_number("tau", tau, above=0)
    check_number("epsilon", epsilon, above=0)
    if batch.behaviour_entropies_T is None:
        raise ValueError("estr needs the entropies of the distributions that were sampled from")
    log_ratio_T = log_ratio(batch)
    entropies_T = trained(batch, batch.behaviour_entropies_T.detach()).clamp(min=0.0)  # rounding may give less
    keep_T = log_ratio_T.detach().square() <= tau * (entropies_T + epsilon)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    return ppo_clip(batch, log_ratio_T, scanned, log_ratio_T, log_low=log_low, log_high=log_high, keep_T=keep_T)
