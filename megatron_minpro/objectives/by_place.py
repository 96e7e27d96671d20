"""Means over the trained tokens of one stretch of a response: does a quantity change along long responses?

A token's place among the trained tokens of its response counts from 1. Stretches double: token 1, tokens 2 to 3, 4 to 7, ..., the last one
from 65,536 on. Shapes: T local packed tokens, B stretches.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

PLACE_SUFFIX = "/by_place"
NUM_STRETCHES = 17
_FIRST_PLACES = [2**stretch for stretch in range(NUM_STRETCHES)]
STRETCHES = (
    "token_1",
    *(f"tokens_{first}_{2 * first - 1}" for first in _FIRST_PLACES[1:-1]),
    f"tokens_{_FIRST_PLACES[-1]}_on",
)


def sums_by_place(x_T: Float[Tensor, " T"], place_T: Float[Tensor, " T"], mask_T: Bool[Tensor, " T"]) -> Float64[Tensor, " B 2"]:
    """Sum of x and number of tokens per stretch, over unmasked tokens. x may be anything where the mask is False."""
    exponent_T = torch.frexp(place_T.detach().clamp(min=1.0))[1]  # place = f 2^e with 1/2 <= f < 1: exact, where log2 could round
    stretch_T = (exponent_T.long() - 1).clamp(max=NUM_STRETCHES - 1)
    pairs_T2 = torch.stack([torch.where(mask_T, x_T.detach().double(), 0.0), mask_T.double()], dim=1)
    return pairs_T2.new_zeros(NUM_STRETCHES, 2).index_add(0, stretch_T, pairs_T2)


def means_by_place(sums_B2: Float64[Tensor, " B 2"]) -> dict[str, float]:
    """Name of a stretch -> mean of x there. Stretches that no response reaches are left out."""
    return {name: total / count for name, (total, count) in zip(STRETCHES, sums_B2.tolist(), strict=True) if count}
