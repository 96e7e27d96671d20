"""Effective sample size of importance weights that are products over thousands of tokens, from sums that add up over ranks.

    ESS / B = (sum W)^2 / (B sum W^2), between 1 / B and 1 (Kish, 1965)

A product of ratios may be e^-1000, so W itself is no number. Sums of W and W^2 are kept per span of 256 nats of log W, each relative to the
middle of its span, where W^2 is at most e^256. Spans add up over micro-batches and ranks, and are joined relative to the largest one.

Shapes: N weights, K spans.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

WEIGHT_SUMS_SUFFIX = "/weight_sums"
_SPAN = 256.0  # nats
_MIDDLE = 64
_NUM_SPANS = 2 * _MIDDLE + 1  # the outermost ones are open and begin at +-16,256 nats
NUM_SUMS = 1 + 2 * _NUM_SPANS


def weight_sums(log_weights_N: Float[Tensor, " N"], share_N: Float64[Tensor, " N"]) -> Float64[Tensor, " sums"]:
    """Count, sums of W and sums of W^2 per span: float64 [1 + 2 K].

    Args:
        log_weights_N: log W.
        share_N: how much of a weight an entry stands for: 1, less where several stand for one weight together, 0 where W does not count.
    """
    x_N = torch.where(share_N > 0, log_weights_N.detach().double(), 0.0)
    span_N = (x_N / _SPAN).round().clamp(-_MIDDLE, _MIDDLE)
    inside_N = (x_N - _SPAN * span_N).clamp(-_SPAN / 2, _SPAN / 2)
    weight_N, bin_N = inside_N.exp(), span_N.long() + _MIDDLE
    first_N = share_N * weight_N
    sums_2K = [share_N.new_zeros(_NUM_SPANS).index_add(0, bin_N, x_N) for x_N in (first_N, first_N * weight_N)]
    return torch.cat([share_N.sum().reshape(1), *sums_2K])


def effective_sample_size(sums: Float64[Tensor, " sums"]) -> float:
    """ESS / B of the totals of `weight_sums`. NaN without a weight, or where the largest is beyond e^+-16,256 and so was not kept."""
    count, first, second = sums.double().cpu().split([1, _NUM_SPANS, _NUM_SPANS])
    used = first.nonzero()[:, 0]
    if not len(used) or (top := int(used[-1])) in (0, _NUM_SPANS - 1):
        return math.nan
    below = torch.arange(_NUM_SPANS, dtype=torch.float64).sub(top).clamp(max=0.0)
    total, squares = float((first * (_SPAN * below).exp()).sum()), float((second * (2 * _SPAN * below).exp()).sum())
    return total**2 / (squares * float(count))
