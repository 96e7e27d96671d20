"""Corrections for a server that scores its own tokens differently from the trainer, under the same weights. All off by default.

Kernels, precision and the layout of the servers differ from the trainer's, so tokens come from pi_engine and not from the policy pi_trainer
whose log-probs are pi_old. For every response token

    k_t = pi_trainer(o_t) / pi_engine(o_t),    both under the weights that sampled it

and the token's loss is multiplied, without gradient, by

    truncated_is   min(k_t, max_weight)                    truncated importance sampling; max_weight 2 is common
    masked_is      k_t where low <= k_t <= high, else 0    IcePop (arXiv:2510.18855); 0.5 and 5 are common
    rejection      0 for every token of a response whose ratio lies outside [low, high], else 1; of level
                     geometric_mean   exp(mean_t log k_t); 0.999 and 1.001 are common
                     product          exp(sum_t log k_t), which leaves any bounds as responses grow long

They compose: with truncated_is and masked_is the weight is min(k_t, max_weight) where k_t, not the truncated weight, is within the bounds;
rejection looks at the k_t of all tokens, masked ones included, and multiplies. With rejection alone the weight is 1 or 0.

Choices: the weights are computed once, when the batch is collected, and stay with it. pi_old, the objective's ratios and its thresholds do
not know of them. A token of weight 0, in rejected responses too, keeps its place in every denominator. Everything is formed in float64
and in log space.

Shapes: R response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.config import CorrectionsConfig


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Corrected:
    """The correction of one response."""

    weights_R: Float64[Tensor, " R"]
    truncated_R: Bool[Tensor, " R"]  # k_t is above max_weight
    masked_R: Bool[Tensor, " R"]  # k_t is outside the bounds of masked_is
    rejected: bool


def correction(log_ratio_R: Float64[Tensor, " R"], corrections: CorrectionsConfig) -> Corrected:
    """Weights of one response from log k_t, float64 [R]. Pure."""
    truncated_is, masked_is, rejection = corrections.truncated_is, corrections.masked_is, corrections.rejection
    truncated_R = masked_R = torch.zeros_like(log_ratio_R, dtype=torch.bool)
    log_weights_R = log_ratio_R if truncated_is or masked_is else torch.zeros_like(log_ratio_R)
    if truncated_is is not None:
        truncated_R = log_ratio_R > math.log(truncated_is.max_weight)
        log_weights_R = log_weights_R.clamp(max=math.log(truncated_is.max_weight))
    if masked_is is not None:
        masked_R = _outside(log_ratio_R, masked_is.low, masked_is.high)
    rejected = False
    if rejection is not None:
        of_response = log_ratio_R.mean() if rejection.level == "geometric_mean" else log_ratio_R.sum()
        rejected = bool(_outside(of_response, rejection.low, rejection.high))
    # where, as exp of what is dropped may be infinite.
    weights_R = torch.where(masked_R | rejected, -math.inf, log_weights_R).exp()
    return Corrected(weights_R=weights_R, truncated_R=truncated_R, masked_R=masked_R, rejected=rejected)


def correct(batch: RolloutBatch, corrections: CorrectionsConfig) -> tuple[RolloutBatch, dict[str, float]]:
    """The batch with its correction weights, and what they look like: mean weight, truncated and masked fractions over response tokens,
    rejected responses.

    batch: scored by the trainer. Raises ValueError naming the response, for a log-prob that is missing or not finite.
    """
    corrected = [correction(_log_ratio(sample), corrections) for sample in batch.samples]
    samples = tuple(
        replace(sample, correction_weights=found.weights_R.float()) for sample, found in zip(batch.samples, corrected, strict=True)
    )
    tokens = batch.num_response_tokens
    metrics = {
        "correction/weight": sum(float(found.weights_R.sum()) for found in corrected) / tokens,
        "correction/truncated": sum(int(found.truncated_R.sum()) for found in corrected) / tokens,
        "correction/masked": sum(int(found.masked_R.sum()) for found in corrected) / tokens,
        "correction/rejected": sum(found.rejected for found in corrected),
    }
    return replace(batch, samples=samples), metrics


def _log_ratio(sample: Sample) -> Tensor:
    if sample.behaviour_logprobs is None:
        raise ValueError(f"{sample.sample_id}: behaviour_logprobs are missing; corrections compare them with the server's")
    log_ratio_R = sample.behaviour_logprobs.double() - sample.engine_logprobs.double()
    if not log_ratio_R.isfinite().all():
        t = int((~log_ratio_R.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"{sample.sample_id}: response token {t} has log-prob {float(sample.engine_logprobs[t])} (server) and "
            f"{float(sample.behaviour_logprobs[t])} (trainer); corrections need finite ones"
        )
    return log_ratio_R


def _outside(log_ratio: Tensor, low: float, high: float) -> Tensor:
    return (log_ratio < (math.log(low) if low > 0 else -math.inf)) | (log_ratio > math.log(high))
