"""Means and histograms over the trained tokens of one stretch of a response: does a quantity change along long responses?

A token's place among the trained tokens of its response counts from 1. Stretches double: token 1, tokens 2 to 3, 4 to 7, ..., the last one
from 65,536 on. Stretches of its share, 100 place / (trained tokens of the response), end at 1, 2, 5, 10, 20, 50 and 100 percent.
Shapes: T local packed tokens, B stretches.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from megatron_minpro.objectives.histograms import NUM_BINS, histogram_quantile

PLACE_SUFFIX = "/by_place"  # of means
HISTOGRAM_BY_PLACE_SUFFIX = "/histogram_by_place"
NUM_STRETCHES = 17
_FIRST_PLACES = [2**stretch for stretch in range(NUM_STRETCHES)]
STRETCHES = (
    "token_1",
    *(f"tokens_{first}_{2 * first - 1}" for first in _FIRST_PLACES[1:-1]),
    f"tokens_{_FIRST_PLACES[-1]}_on",
)

SHARE_SUFFIX = "/by_share"
HISTOGRAM_BY_SHARE_SUFFIX = "/histogram_by_share"
_SHARES = (0, 1, 2, 5, 10, 20, 50, 100)  # percent
SHARES = tuple(f"share_{first}_{last}" for first, last in pairwise(_SHARES))

STRETCH_QUANTILES = (0.05, 0.5, 0.95)


def place_stretches(place_T: Float[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Number of the stretch that a place lies in. place_T: from 1; a place below 1 counts as 1."""
    exponent_T = torch.frexp(place_T.detach().clamp(min=1.0))[1]  # place = f 2^e with 1/2 <= f < 1: exact, where log2 could round
    return (exponent_T.long() - 1).clamp(max=NUM_STRETCHES - 1)


def share_stretches(place_T: Float[Tensor, " T"], num_trained_T: Float[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Number of the stretch that the token's share of its response lies in: above the stretch's first percentage, up to its last one.

    place_T: from 1. num_trained_T: trained tokens of the token's response.
    """
    percent_T = 100 * place_T.detach().double() / num_trained_T.double().clamp(min=1.0)  # exact where it is a whole percentage
    edges = torch.tensor(_SHARES[1:-1], dtype=torch.float64)
    return torch.bucketize(percent_T, edges.to(percent_T.device, non_blocking=True))


def sums_by_stretch(
    values: Mapping[str, Float[Tensor, " T"]], stretch_T: Int64[Tensor, " T"], mask_T: Bool[Tensor, " T"], *, num_stretches: int
) -> dict[str, Float64[Tensor, " B 2"]]:
    """Sum of each of the values and number of tokens per stretch, over unmasked tokens. Values may be anything where the mask is False."""
    columns_TC = torch.stack([*(torch.where(mask_T, x_T.detach().double(), 0.0) for x_T in values.values()), mask_T.double()], dim=1)
    *sums, count_B = columns_TC.new_zeros(num_stretches, len(values) + 1).index_add(0, stretch_T, columns_TC).unbind(1)
    return {name: torch.stack([sum_B, count_B], dim=1) for name, sum_B in zip(values, sums, strict=True)}


def counts_by_stretch(
    bin_T: Int64[Tensor, " T"], stretch_T: Int64[Tensor, " T"], mask_T: Bool[Tensor, " T"], *, num_stretches: int
) -> Float64[Tensor, " B bins"]:
    """Number of unmasked tokens per stretch and bin: float64 [B, NUM_BINS]. bin_T: of histograms.py."""
    counts = mask_T.new_zeros(num_stretches * NUM_BINS, dtype=torch.float64)
    return counts.index_add(0, stretch_T * NUM_BINS + bin_T, mask_T.double()).view(num_stretches, NUM_BINS)


def means_by_stretch(stretches: tuple[str, ...], sums_B2: Float64[Tensor, " B 2"]) -> dict[str, float]:
    """Name of a stretch -> mean of x there. Stretches without a token are left out: short responses have no first percent.

    stretches: STRETCHES or SHARES.
    """
    return {name: total / count for name, (total, count) in zip(stretches, sums_B2.tolist(), strict=True) if count}


def quantiles_by_stretch(stretches: tuple[str, ...], counts: Float64[Tensor, " B bins"], q: float) -> dict[str, float]:
    """Name of a stretch -> the q-quantile of x there. Stretches without a token are left out."""
    return {name: histogram_quantile(row, q) for name, row in zip(stretches, counts.cpu(), strict=True) if row.any()}
