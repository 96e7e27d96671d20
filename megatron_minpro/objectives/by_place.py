"""Means over the trained tokens of one stretch of a response: does a quantity change along long responses?

A token's place among the trained tokens of its response counts from 1. Stretches double: token 1, tokens 2 to 3, 4 to 7, ..., the last one
from 65,536 on. Stretches of its share, 100 place / (trained tokens of the response), end at 1, 2, 5, 10, 20, 50 and 100 percent.
Shapes: T local packed tokens, B stretches.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

PLACE_SUFFIX = "/by_place"
NUM_STRETCHES = 17
_FIRST_PLACES = [2**stretch for stretch in range(NUM_STRETCHES)]
STRETCHES = (
    "token_1",
    *(f"tokens_{first}_{2 * first - 1}" for first in _FIRST_PLACES[1:-1]),
    f"tokens_{_FIRST_PLACES[-1]}_on",
)

SHARE_SUFFIX = "/by_share"
_SHARES = (0, 1, 2, 5, 10, 20, 50, 100)  # percent
SHARES = tuple(f"share_{first}_{last}" for first, last in pairwise(_SHARES))


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
    x_T: Float[Tensor, " T"], stretch_T: Int64[Tensor, " T"], mask_T: Bool[Tensor, " T"], *, num_stretches: int
) -> Float64[Tensor, " B 2"]:
    """Sum of x and number of tokens per stretch, over unmasked tokens. x may be anything where the mask is False."""
    pairs_T2 = torch.stack([torch.where(mask_T, x_T.detach().double(), 0.0), mask_T.double()], dim=1)
    return pairs_T2.new_zeros(num_stretches, 2).index_add(0, stretch_T, pairs_T2)


def means_by_place(sums_B2: Float64[Tensor, " B 2"]) -> dict[str, float]:
    """Name of a stretch of places -> mean of x there. Stretches that no response reaches are left out."""
    return _means(STRETCHES, sums_B2)


def means_by_share(sums_B2: Float64[Tensor, " B 2"]) -> dict[str, float]:
    """Name of a stretch of shares -> mean of x there. Stretches without a token are left out: short responses have no first percent."""
    return _means(SHARES, sums_B2)


def _means(names: tuple[str, ...], sums_B2: Tensor) -> dict[str, float]:
    return {name: total / count for name, (total, count) in zip(names, sums_B2.tolist(), strict=True) if count}
