"""From per-token losses to one number. Always by global denominators, so packing, micro-batches and ranks change nothing.

With l_st the loss of trained token t of sequence s, N and S the trained tokens and the sequences with a trained token of the mini-batch,
n_s the trained tokens of sequence s, and L a constant:

    token_mean            sum l_st / N           DAPO (arXiv:2503.14476, eq. 8)
    seq_mean_token_mean   sum l_st / (S n_s)     GRPO (arXiv:2402.03300, eq. 3)
    seq_mean_token_sum    sum l_st / S           trajectory policy gradient
    constant              sum l_st / (S L)       Dr.GRPO (arXiv:2503.20783); L = aggregation_length, usually the longest response allowed

Each is a divisor per token. Shapes: T local packed tokens, S sequences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megatron_minpro.objectives.base import TokenBatch
from megatron_minpro.objectives.options import check_choice
from parallel.prefix_scan import SequenceSum

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant")


def check_aggregation(aggregation: str, aggregation_length: int | None) -> None:
    """Raise ValueError for an unknown name, or a length that is missing or out of place."""
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if aggregation == "constant":
        if not isinstance(aggregation_length, int) or isinstance(aggregation_length, bool) or aggregation_length < 1:
            raise ValueError(
                f"aggregation_length must be a whole number of at least 1 with aggregation=constant, got {aggregation_length!r}"
            )
    elif aggregation_length is not None:
        raise ValueError(f"aggregation_length={aggregation_length!r} has no meaning with aggregation={aggregation}; leave it out")


def divisors(
    batch: TokenBatch, aggregation: str, aggregation_length: int | None, num_trained_S: Float32[Tensor, " S"]
) -> Float32[Tensor, " T"]:
    """fp32 [T], at least 1: the mini-batch's loss is the sum of every token's loss over its divisor.

    num_trained_S: the answer to `trained_tokens`. The aggregation was checked.
    """
    ones_T = torch.ones_like(batch.logprobs_T, requires_grad=False)
    match aggregation:
        case "token_mean":
            return ones_T * batch.global_tokens
        case "seq_mean_token_mean":
            return batch.shard.per_token(num_trained_S.clamp(min=1.0)) * batch.global_sequences
        case "seq_mean_token_sum":
            return ones_T * batch.global_sequences
        case "constant":
            assert aggregation_length is not None  # check_aggregation refused it
            return ones_T * (batch.global_sequences * aggregation_length)
    raise AssertionError(aggregation)


def trained_tokens(batch: TokenBatch) -> SequenceSum:
    """Number of trained tokens of each sequence."""
    return SequenceSum(torch.ones_like(batch.logprobs_T, requires_grad=False), batch.loss_mask_T)


def aggregate(batch: TokenBatch, loss_T: Float[Tensor, " T"], divisors_T: Float[Tensor, " T"]) -> Float[Tensor, ""]:
    """This rank's share of the mini-batch loss, a scalar. Masked tokens add exactly 0."""
    return torch.where(batch.loss_mask_T, loss_T / divisors_T, 0.0).sum()
