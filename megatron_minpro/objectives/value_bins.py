"""Fine bins of log ratios, so that a threshold over a whole mini-batch comes from sums alone.

A rank order over all ranks and micro-batches would need every value in one place. Counts per bin add up instead: 1024 bins per factor of
two between 2**-20 and 2**20 place a threshold to 0.1 % of its value, and which tokens it parts does not depend on packing or ranks.

Shapes: T local packed tokens, B = NUM_BINS bins.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Float64, Int64, Shaped
from torch import Tensor

_MANTISSA_BITS = 10
_DROPPED_BITS = 23 - _MANTISSA_BITS
_SMALLEST, _LARGEST = 2.0**-20, 2.0**20 * (1 - 2.0**-24)
_BINS_PER_SIGN = 40 << _MANTISSA_BITS
ZERO_BIN = _BINS_PER_SIGN  # |x| < 2**-20
NUM_BINS = 2 * _BINS_PER_SIGN + 1


def bin_of(x_T: Float32[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Bin of every fp32 value, int64 [T], non-decreasing in x. Values beyond +-2**20 share the outermost bins."""
    magnitude_T = x_T.detach().abs()
    bits_T = magnitude_T.clamp(_SMALLEST, _LARGEST).contiguous().view(torch.int32).long() >> _DROPPED_BITS
    first = int(torch.tensor(_SMALLEST).view(torch.int32)) >> _DROPPED_BITS
    step_T = torch.where(magnitude_T < _SMALLEST, 0, bits_T - first + 1)
    return ZERO_BIN + torch.where(x_T < 0, -step_T, step_T)


def sum_per_bin(bin_T: Int64[Tensor, " T"], values_T: Shaped[Tensor, " T"]) -> Float64[Tensor, " B"]:
    """Sum of values per bin: float64 [B]."""
    return torch.zeros(NUM_BINS, dtype=torch.float64, device=bin_T.device).index_add(0, bin_T, values_T.double())
