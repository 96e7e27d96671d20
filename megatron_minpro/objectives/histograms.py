"""Counts of log ratios in fixed bins, which add up over ranks, micro-batches and mini-batches, and the quantiles of their totals.

Shapes: T local packed tokens.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

# Symmetric, 16 per decade from 1e-5 to 100, one around 0, and open ends.
_MAGNITUDES = torch.logspace(-5, 2, 7 * 16 + 1, dtype=torch.float64)
BIN_EDGES = torch.cat([-_MAGNITUDES.flip(0), _MAGNITUDES])
NUM_BINS = len(BIN_EDGES) + 1


def bin_of(x_T: Float[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Number of the bin that x lies in. Bin i holds BIN_EDGES[i - 1] < x <= BIN_EDGES[i]; NaN lies in the last one."""
    return torch.bucketize(x_T.detach().double(), BIN_EDGES.to(x_T.device, non_blocking=True))


def histogram_quantile(counts: Float64[Tensor, " bins"], q: float) -> float:
    """The q-quantile of a histogram, linear inside its bin; the outermost edge in an open bin; NaN for an empty histogram.

    Raises ValueError for counts that are not of these bins.
    """
    if tuple(counts.shape) != (NUM_BINS,):
        raise ValueError(f"a histogram has {NUM_BINS} bins, got shape {list(counts.shape)}")
    counts = counts.double().cpu()
    total = float(counts.sum())
    if total == 0:
        return math.nan
    cumulative = counts.cumsum(0)
    wanted = q * total
    index = min(int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64))), NUM_BINS - 1)
    if index in (0, NUM_BINS - 1):
        return float(BIN_EDGES[0 if index == 0 else -1])
    low, high = float(BIN_EDGES[index - 1]), float(BIN_EDGES[index])
    inside = (wanted - float(cumulative[index] - counts[index])) / float(counts[index])
    return low + inside * (high - low)
