"""What a reward is: a finished conversation in, a number out. `registry.py` makes one by name.

A reward reads the answer from the model's words, never from the question: questions may contain "Answer:" or a box themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_minpro.batch.conversation import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """The judgement of one conversation."""

    reward: float  # what the advantages are made of
    correct: bool  # what pass@k counts
    extracted: str | None  # the answer found in the response; None when there is none
    error: str | None  # why grading failed ("timeout", "crash", an exception); the response then counts as wrong


class Reward(Protocol):
    """A judge of conversations. Close it when the run ends: it may own processes."""

    @property
    def name(self) -> str: ...

    @property
    def error_counts(self) -> Mapping[str, int]:
        """Grading failures so far, by kind."""
        ...

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        """One result per conversation, in order."""
        ...

    def close(self) -> None: ...
