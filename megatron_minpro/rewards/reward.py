"""Verifiable rewards: a finished conversation in, a number out.

A reward reads the answer from the model's words, never from the question: questions may contain "Answer:" or a box themselves.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.objectives.options import check_number
from megatron_minpro.registry import PlugInError, PlugIns
from megatron_minpro.rewards.answers import AnswerStyle, compare_plainly, extract_answer
from megatron_minpro.rewards.grader_pool import GraderPool


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


class MathVerifyReward:
    """1 if the response's final answer equals the label, else 0.

    What digits and text can decide is decided by them ("025" equals "25", 23 digits stay exact; see answers.compare_plainly), everything
    else by math-verify in worker processes. An answer that breaks or outlasts the grader is wrong and counted in error_counts.
    """

    name = "math_verify"

    def __init__(self, *, style: AnswerStyle, timeout_s: float = 5.0, workers: int = 1, memory_mb: int = 4096) -> None:
        """style: where the prompts ask for the answer: dapo = the last "Answer:" line, boxed = the last \\boxed{...}. Never both: a grader
        that accepts the other form rewards what the prompt did not ask for. timeout_s: per answer. Raises ValueError for bad options."""
        if style not in ("dapo", "boxed"):
            raise ValueError(f"reward.style = {style!r}, expected 'dapo' or 'boxed'")
        self._style = style
        self._pool = GraderPool(workers=workers, timeout_s=timeout_s, memory_mb=memory_mb)
        self.error_counts: Counter[str] = Counter()

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        results: list[RewardResult] = []
        undecided: list[tuple[int, str, str]] = []  # index, label, answer
        for index, conversation in enumerate(conversations):
            label, truncated = _text_label(conversation.prompt, reward=self.name), conversation.finish_reason != "stop"
            extracted = extract_answer(conversation.response, style=self._style, truncated=truncated, label=label)
            if extracted is None:
                results.append(_judged(False, None))
                continue
            verdict = compare_plainly(label, extracted)
            if verdict is not None:
                results.append(_judged(verdict, extracted))
                continue
            results.append(_judged(False, extracted))  # until the workers have spoken
            undecided.append((index, label, extracted))

        judgements = self._pool.compare([(label, answer) for _, label, answer in undecided])
        for (index, _, answer), judgement in zip(undecided, judgements, strict=True):
            if judgement.error is not None:
                self.error_counts[judgement.error.partition(":")[0]] += 1
            results[index] = _judged(judgement.equal is True, answer, judgement.error)
        return results

    def close(self) -> None:
        self._pool.close()


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


class OverlongShaping:
    """Another reward plus DAPO's soft punishment of length (arXiv:2503.14476, eq. 13); `correct` is left alone.

    Responses of up to max_tokens - buffer_tokens are not punished, then the punishment grows linearly to -factor at max_tokens.
    """

    def __init__(self, reward: Reward, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> None:
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
        return [
            replace(result, reward=result.reward + self.penalty(conversation.num_response_tokens))
            for result, conversation in zip(self._reward.score(conversations), conversations, strict=True)
        ]

    def penalty(self, num_tokens: int) -> float:
        """0 to -factor."""
        excess = num_tokens - (self._max_tokens - self._buffer_tokens)
        return -self._factor * min(max(excess / self._buffer_tokens, 0.0), 1.0)

    def close(self) -> None:
        self._reward.close()


REWARDS = PlugIns(setting="reward.name", options="reward", known={"math_verify": "megatron_minpro.rewards.reward:MathVerifyReward"})


def make_reward(name: str, *, overlong: Mapping[str, Any] | None = None, concurrency: int = 32, **options: Any) -> Reward:
    """A reward by name.

    Args:
        name: math_verify, or package.module:function for a function of your own (see FunctionReward).
        overlong: {max_tokens, buffer_tokens, factor} adds DAPO's length punishment (see OverlongShaping).
        concurrency: calls of a coroutine that run at once.
        options: passed to the reward.

    Raises:
        PlugInError: the reward or an option is unknown (the message has the nearest known name), missing, or out of range.
    """
    try:
        if name in REWARDS.known:
            reward: Reward = REWARDS.find(name, options, passed=0)(**options)
        else:
            reward = FunctionReward(name, REWARDS.find(name, options, passed=2), options, concurrency=concurrency)
        return reward if overlong is None else OverlongShaping(reward, **overlong)
    except PlugInError:
        raise
    except ValueError as error:
        raise REWARDS.refused(name, error) from error


def _number(value: Any) -> float | None:
    """A finite number as float: Python's, NumPy's, or a tensor without axes. None for anything else."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text_label(prompt: Prompt, *, reward: str) -> str:
    if not isinstance(prompt.answer, str):
        raise ValueError(f"reward {reward}: the answer of {prompt.prompt_id} is a {type(prompt.answer).__name__}, expected text")
    return prompt.answer


def _judged(correct: bool, extracted: str | None, error: str | None = None) -> RewardResult:
    return RewardResult(reward=float(correct), correct=correct, extracted=extracted, error=error)
