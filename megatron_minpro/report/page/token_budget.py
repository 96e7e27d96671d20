"""Which recorded responses a page takes when it cannot take all: whole steps, evenly spread, the first and the last among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_minpro.report.page.packed import CHARACTERS_PER_BYTE

T = TypeVar("T")

_BYTES_OF_ANY_TOKEN = 2  # its piece
_BYTES_OF_A_TRAINED_TOKEN = 25  # six numbers of four bytes, and what cut it
_CHARACTERS_OF_A_RESPONSE = 600  # its record


def page_characters(*, num_tokens: int, num_response_tokens: int) -> int:
    """About how long a response is inside the page."""
    packed = _BYTES_OF_ANY_TOKEN * num_tokens + _BYTES_OF_A_TRAINED_TOKEN * num_response_tokens
    return _CHARACTERS_OF_A_RESPONSE + round(CHARACTERS_PER_BYTE * packed)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at equal distances, the first and the last among them (of one: the last); all where there are no more."""
    if count >= len(items):
        return list(items)
    if count <= 1:
        return list(items[-1:])[:count]
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What fits. step -> number of its responses that are taken, from its first on."""

    responses: Mapping[int, int]

    @property
    def steps(self) -> list[int]:
        """Global steps, ascending."""
        return sorted(self.responses)


def choose(sizes: Mapping[int, Sequence[int]], *, budget: int) -> Chosen:
    """The most steps that fit into the budget with all of their responses. Where first and last do not, as many of their responses as fit.

    Args:
        sizes: global step -> characters of each of its responses.
        budget: characters.
    """
    steps = sorted(sizes)
    for count in range(len(steps), min(len(steps), 2) - 1, -1):
        taken = evenly(steps, count)
        if sum(sum(sizes[step]) for step in taken) <= budget:
            return Chosen(responses={step: len(sizes[step]) for step in taken})
    return Chosen(responses=_of_the_ends(sizes, steps, budget))


def _of_the_ends(sizes: Mapping[int, Sequence[int]], steps: Sequence[int], budget: int) -> dict[int, int]:
    """Responses of the last and the first step in turn, until one does not fit."""
    ends = list(dict.fromkeys([*steps[-1:], *steps[:1]]))
    counts = dict.fromkeys(ends, 0)
    used = 0
    for place in range(max((len(sizes[step]) for step in ends), default=0)):
        for step in ends:
            if place < len(sizes[step]) and counts[step] == place and used + sizes[step][place] <= budget:
                counts[step] += 1
                used += sizes[step][place]
    return {step: count for step, count in counts.items() if count}
