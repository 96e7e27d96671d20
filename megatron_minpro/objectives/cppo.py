"""CPPO: DPPO's trust region with a budget that the prefix may use up (arXiv:2606.10968)."""

from __future__ import annotations

from torch import Tensor

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number
from megatron_minpro.objectives.ratios import Scanned, log_ratio
from megatron_minpro.objectives.token_bounds import Bounds, clip_by, total_variation, total_variation_bounds
from parallel.prefix_scan import PrefixMoment, PrefixSum


def cppo(
    batch: TokenBatch,
    *,
    delta: float = 0.15,
    delta_b: float = 0.015,
    w_min: float = 0.8,
    aggregation: str = "token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """PPO's clip with |pi_theta(t) - pi_old(t)| <= max(c_t, 0) / w_t outward (arXiv:2606.10968v2, eqs. 8 to 11 and 22, algorithm 1), where
    w_t = 1 - (1 - w_min) (t - 1) / (T - 1) and c_t = min(delta, delta + sum_{i<t} w_i (delta_b - |pi_theta(i) - pi_old(i)|)).

    t counts the trained tokens of a sequence, T are all of them. The sums run over all earlier tokens, kept, dropped and pulling back
    alike. c_t may fall below 0: then no token of the rest may move further outward, while those that pull back still train.
    Defaults: the paper's for its post-trained 1.7B model. It uses delta 0.2 for 30B-A3B. Its Base models have a delta_b for each sequence,
    the 90th percentile of that sequence's divergences held within [0.02, 0.04], which is left out: it is a quantile and not a scan.
    Unclear: the paper does not say how it aggregates; UniRL's code takes the token mean, its recipe a constant length. Its main runs use
    the total variation of the top 20 tokens; its ablation finds the binary one, used here, equal. Masked tokens do not count (UniRL's code
    lets them).

    Args:
        batch: one packed micro-batch.
        delta: the most that a token's probability may move, at the first token.
        delta_b: what a token adds to the budget of later ones; moving by more takes from it.
        w_min: how much the last token's move counts, the first one's being 1.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    check_number("delta", delta, above=0)
    check_number("delta_b", delta_b, at_least=0)
    if check_number("w_min", w_min, above=0) > 1:
        raise ValueError(f"w_min must be at most 1, got {w_min!r}")
    moved_T, mask_T = total_variation(batch, log_ratio(batch)), batch.loss_mask_T

    def rule(_log_ratio_T: Tensor, scanned: Scanned) -> Bounds:
        moved_before_T, moment_T = (x_T.double() for x_T in scanned.results)
        earlier_T = (scanned.place_T - mask_T.float()).double()
        # w is linear in the token's place: its sums are those of 1 and of the place.
        slope_T = (1 - w_min) / (batch.shard.per_token(scanned.num_trained_S).double() - 1).clamp(min=1.0)
        weight_T = 1 - slope_T * earlier_T
        weight_before_T = earlier_T - slope_T * earlier_T * (earlier_T - 1) / 2
        left_T = delta + (delta_b * weight_before_T - (moved_before_T - slope_T * moment_T)).clamp(max=0.0)
        distance_T = left_T.clamp(min=0.0) / weight_T
        return total_variation_bounds(batch, distance_T, distance_T)

    requests = (PrefixSum(moved_T, mask_T, exclusive=True), PrefixMoment(moved_T, mask_T))
    return clip_by(batch, rule, *requests, aggregation=aggregation, aggregation_length=aggregation_length)
