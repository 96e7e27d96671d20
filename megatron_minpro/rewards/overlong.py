"""DAPO's soft punishment of long responses, added to another reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.objectives.options import check_number
from megatron_minpro.rewards.reward import RewardOnArrival, RewardResult, judge_all


class OverlongShaping:
    """Another reward plus DAPO's soft punishment of length (arXiv:2503.14476, eq. 13); `correct` is left alone.

    Responses of up to max_tokens - buffer_tokens are not punished, then the punishment grows linearly to -factor at max_tokens.
    """

    def __init__(self, reward: RewardOnArrival, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> None:
        """max_tokens, buffer_tokens: L_max and L_cache of the paper; max_tokens is the limit that cuts responses. factor: 1 in the paper.

        Raises ValueError unless 0 < buffer_tokens <= max_tokens and factor > 0.
        """
        for name, value in (("max_tokens", max_tokens), ("buffer_tokens", buffer_tokens), ("factor", factor)):
            check_number(f"reward.overlong: {name}", value)
        if not 0 < buffer_tokens <= max_tokens:
            raise ValueError(f"reward.overlong: buffer_tokens = {buffer_tokens}, expected 1 to max_tokens = {max_tokens}")
        if not factor > 0:
            raise ValueError(f"reward.overlong: factor = {factor}, expected a positive number")
        self._reward, self._max_tokens, self._buffer_tokens, self._factor = reward, max_tokens, buffer_tokens, factor

    @property
    def name(self) -> str:
        return f"{self._reward.name}+overlong"

    @property
    def error_counts(self) -> Mapping[str, int]:
        return self._reward.error_counts

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        return judge_all(self, conversations)

    async def judge(self, conversation: Conversation) -> RewardResult:
        """See RewardOnArrival."""
        result = await self._reward.judge(conversation)
        return replace(result, reward=result.reward + self.penalty(conversation.num_response_tokens))

    def penalty(self, num_tokens: int) -> float:
        """0 to -factor."""
        excess = num_tokens - (self._max_tokens - self._buffer_tokens)
        return -self._factor * min(max(excess / self._buffer_tokens, 0.0), 1.0)

    def close(self) -> None:
        self._reward.close()
