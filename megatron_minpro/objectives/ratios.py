"""Log ratios of a TokenBatch, and the one scan that an objective makes over them.

Ratios live in log space until they are bounded: exp of a log ratio of 200 is infinite in fp32, exp of a clamped one is not.

Shapes: T local packed tokens, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megatron_minpro.objectives.aggregation import check_aggregation, divisors, trained_tokens
from megatron_minpro.objectives.base import TokenBatch
from parallel.prefix_scan import PrefixMin, PrefixSum, Request, SequenceSum, scan

# Where a ratio itself is needed, unbounded, its log ratio is held within this: exp(20) = 4.9e8 squares without overflow in fp32.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, eq=False)
class Scanned:
    """Answers of the one scan over a batch."""

    prefix_min_T: Float32[Tensor, " T"]  # log of the smallest ratio among earlier trained tokens, 0 where there is none
    cumulative_T: Float32[Tensor, " T"]  # log of the product of the ratios up to and with the token
    sequence_S: Float32[Tensor, " S"]  # log of the product of all ratios of the sequence
    num_trained_S: Float32[Tensor, " S"]  # trained tokens of the sequence
    place_T: Float32[Tensor, " T"]  # of the token among the trained ones of its sequence, from 1; before the first, 0
    divisors_T: Float32[Tensor, " T"]  # the aggregation's divisor of every token's loss
    results: list[Float32[Tensor, " _"]]  # [T] or [S]: of the objective's own requests, in order


def log_ratio(batch: TokenBatch) -> Float32[Tensor, " T"]:
    """d_t = log pi_theta(o_t) - log pi_old(o_t), with gradient: fp32 [T], exactly 0 (and no gradient) at masked tokens."""
    # Both are replaced before the difference is taken: NaN * 0 and inf - inf would be NaN, in backward too.
    return trained(batch, batch.logprobs_T) - trained(batch, batch.behaviour_logprobs_T.detach())


def advantages(batch: TokenBatch) -> Float32[Tensor, " T"]:
    """The advantages, 0 at masked tokens, without gradient: fp32 [T]."""
    return trained(batch, batch.advantages_T.detach())


def trained(batch: TokenBatch, x_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """x at trained tokens, 0 elsewhere, whatever stands there."""
    return torch.where(batch.loss_mask_T, x_T, 0.0)


def ratio(log_ratio_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """exp of a log ratio held within MAX_LOG_RATIO. Outside it has no gradient, on the bound itself it has."""
    # Not a clamp of the value with gradient: on its bound torch 2.13 gives a gradient of 1, torch 2.14.1 of 0.
    within_T = log_ratio_T.abs() <= MAX_LOG_RATIO
    return torch.where(within_T, log_ratio_T, log_ratio_T.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).exp()


def scan_batch(
    batch: TokenBatch, log_ratio_T: Float[Tensor, " T"], *requests: Request, aggregation: str, aggregation_length: int | None
) -> Scanned:
    """The scan for an objective's own requests and for what all objectives' metrics and the aggregation need: one collective together.

    Raises ValueError for an unknown aggregation, or a length that is missing or out of place.
    """
    check_aggregation(aggregation, aggregation_length)
    mask_T = batch.loss_mask_T
    shared: list[Request] = [
        PrefixMin(log_ratio_T, mask_T),
        PrefixSum(log_ratio_T, mask_T),
        SequenceSum(log_ratio_T, mask_T),
        trained_tokens(batch),
        PrefixSum(torch.ones_like(log_ratio_T, requires_grad=False), mask_T),
    ]
    prefix_min_T, cumulative_T, sequence_S, num_trained_S, place_T, *results = scan(batch.shard, [*shared, *requests])
    return Scanned(
        prefix_min_T=prefix_min_T,
        cumulative_T=cumulative_T,
        sequence_S=sequence_S,
        num_trained_S=num_trained_S,
        place_T=place_T,
        divisors_T=divisors(batch, aggregation, aggregation_length, num_trained_S),
        results=results,
    )
