"""What a reward is: a finished conversation in, a number out. `registry.py` makes one by name.

A reward reads the answer from the model's words, never from the question: questions may contain "Answer:" or a box themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron_minpro.batch.conversation import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """The judgement of one conversation."""

    reward: float  # what the advantages are made of
    correct: bool  # what pass@k counts
    extracted: str | None  # the answer found in the response; None when there is none
    error: str | None  # why grading failed ("timeout", "crash", an exception); the response then counts as wrong


class Reward(Protocol):
    """A judge of conversations, all of a batch together. Close it when the run ends: it may own processes."""

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


@runtime_checkable
class RewardOnArrival(Reward, Protocol):
    """A judge that needs no other conversation: it begins as soon as a conversation has ended, while others still go on."""

    async def judge(self, conversation: Conversation) -> RewardResult:
        """The judgement of one conversation. It runs beside the requests to the servers, so it must not compute for long."""
        ...


def judge_all(reward: RewardOnArrival, conversations: Sequence[Conversation]) -> list[RewardResult]:
    """`score` of a reward that judges on arrival."""

    async def judge() -> list[RewardResult]:
        return await asyncio.gather(*map(reward.judge, conversations))

    return asyncio.run(judge())
