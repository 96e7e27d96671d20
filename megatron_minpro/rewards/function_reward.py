"""A reward of the user's own: any function or coroutine."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.rewards.reward import RewardResult, judge_all


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
        self._places: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        # A plain function may take its time, and may not bear two calls at once.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=path)

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        """Raises ValueError when the function returns neither a finite number nor a RewardResult; its exceptions pass through."""
        return judge_all(self, conversations)

    async def judge(self, conversation: Conversation) -> RewardResult:
        """See RewardOnArrival. Raises as `score`."""
        if inspect.iscoroutinefunction(self._function):
            async with self._place():
                value = await self._function(conversation.prompt, conversation, **self._options)
        else:
            value = await asyncio.get_running_loop().run_in_executor(self._thread, self._call, conversation)
        return self._result(value, conversation.prompt)

    def _place(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._places is None or self._places[0] is not loop:
            self._places = loop, asyncio.Semaphore(self._concurrency)
        return self._places[1]

    def _call(self, conversation: Conversation) -> Any:
        try:
            return self._function(conversation.prompt, conversation, **self._options)
        except StopIteration as error:  # no future can hold one
            raise RuntimeError(f"reward {self.name}: raised StopIteration for {conversation.prompt.prompt_id}") from error

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
        self._thread.shutdown()


def _number(value: Any) -> float | None:
    """A finite number as float: Python's, NumPy's, or a tensor without axes. None for anything else."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
