"""What a bound or a filter did to a token's weight."""

from __future__ import annotations

from enum import IntEnum

from jaxtyping import Bool, UInt8
from torch import Tensor


class Cut(IntEnum):
    """One value per token, uint8. From BELOW on the token has no gradient."""

    NONE = 0
    HELD_LOW = 1  # the weight was raised to its lower bound
    HELD_HIGH = 2  # the weight was lowered to its upper bound
    BELOW = 3  # no gradient: under the lower bound
    ABOVE = 4  # no gradient: over the upper bound
    FILTERED = 5  # no gradient: the objective drops the token whatever its bounds are
    OVERFLOW = 6  # no gradient: the ratio is beyond exp(+-MAX_LOG_RATIO)


def has_no_gradient(cut_T: UInt8[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Tokens whose gradient a clip, a gate or a filter made 0."""
    return cut_T >= Cut.BELOW


def is_held(cut_T: UInt8[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Tokens whose weight was bounded but not made 0."""
    return (cut_T == Cut.HELD_LOW) | (cut_T == Cut.HELD_HIGH)
