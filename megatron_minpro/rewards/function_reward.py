"""A reward of the user's own: any function or coroutine."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.rewards.reward import RewardResult


class FunctionReward:
    """A reward of your own: `function(prompt, conversation, **options)`, which returns a number or a RewardResult.

    `prompt.row` holds all fields of the data row, `conversation.response` the text of the model's last answer, `conversation.turns`
    everything that was said. A bare number counts as correct when it is positive. The function may be a coroutine; then up to
    `concurrency` of its calls run at once.
    """

    def __init__(self, path: str, function: Callable[..., Any], options: Mapping[str, Any], *, concurrency: int) -> None:
        self.name = path
        self.error_counts: Counter[str] = Counter()
        self._function, self._options, self._concurrency = function, dict(options), concurrency

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        """Raises ValueError when the function returns neither a finite number nor a RewardResult; its exceptions pass through."""
        if inspect.iscoroutinefunction(self._function):
            values = asyncio.run(self._call_all(conversations))
        else:
            values = [self._function(conversation.prompt, conversation, **self._options) for conversation in conversations]
        return [self._result(value, conversation.prompt) for value, conversation in zip(values, conversations, strict=True)]

    async def _call_all(self, conversations: Sequence[Conversation]) -> list[Any]:
        places = asyncio.Semaphore(self._concurrency)

        async def call(conversation: Conversation) -> Any:
            async with places:
                return await self._function(conversation.prompt, conversation, **self._options)

        return await asyncio.gather(*(call(conversation) for conversation in conversations))

    def _result(self, value: Any, prompt: Prompt) -> RewardResult:
        number = _number(value.reward if isinstance(value, RewardResult) else value)
        if number is None:
            raise ValueError(f"reward {self.name}: returned {value!r} for {prompt.prompt_id}, expected a finite number or a RewardResult")
        if not isinstance(value, RewardResult):
            return RewardResult(reward=number, correct=number > 0, extracted=None, error=None)
        if value.error is not None:
            self.error_counts[value.error.partition(":")[0]] += 1
        return replace(value, reward=number, correct=bool(value.correct))

    def close(self) -> None:
        pass


def _number(value: Any) -> float | None:
    """A finite number as float: Python's, NumPy's, or a tensor without axes. None for anything else."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
