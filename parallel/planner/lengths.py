"""Lengths of responses: what the planner's time of sampling rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_GROUPS = 128


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths: groups of equally many responses, shortest first."""

    tokens: tuple[float, ...]  # of each group
    source: str  # what they are taken from, for people

    @property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def longest(self) -> float:
        return self.tokens[-1]

    @property
    def under_way(self) -> float:
        """Mean tokens so far of the responses that are under way at one moment: E[L^2] / (2 E[L]). Long ones are under way longer."""
        return sum(length * length for length in self.tokens) / (2 * sum(self.tokens))


def exponential(mean: float, longest: float) -> Lengths:
    """Exponential, cut at `longest`, with this mean once cut. All are as long when mean and longest are equal."""
    if mean >= longest:
        return Lengths((float(longest),), f"every response has {longest:,.0f} tokens")
    low, high = mean, 1e6 * longest
    for _ in range(100):
        scale = math.sqrt(low * high)
        if sum(_quantiles(scale, longest)) < mean * _GROUPS:
            low = scale
        else:
            high = scale
    return Lengths(tuple(_quantiles(high, longest)), f"exponential with mean {mean:,.0f}, cut at {longest:,.0f} tokens")


def observed(lengths: Sequence[float], source: str) -> Lengths:
    """The lengths of real responses, in groups whose mean is kept. Raises ValueError when there is none."""
    if not lengths:
        raise ValueError(f"{source}: expected the lengths of responses, found none")
    ordered = sorted(lengths)
    groups = min(_GROUPS, len(ordered))
    size = len(ordered) / groups
    return Lengths(tuple(_mean_between(ordered, group * size, (group + 1) * size) for group in range(groups)), source)


def _quantiles(scale: float, longest: float) -> list[float]:
    return [min(longest, -scale * math.log(1 - (group + 0.5) / _GROUPS)) for group in range(_GROUPS)]


def _mean_between(ordered: Sequence[float], first: float, last: float) -> float:
    """Mean of the values from position `first` to `last`, with parts of a value at both ends."""
    total, position = 0.0, first
    while position < last - 1e-9:
        index = min(int(position + 1e-9), len(ordered) - 1)
        end = min(last, index + 1.0)
        total += (end - position) * ordered[index]
        position = end
    return total / (last - first)
