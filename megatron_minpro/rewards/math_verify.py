"""The reward for mathematics: the response's final answer against the label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.rewards.answers import AnswerStyle, compare_plainly, extract_answer
from megatron_minpro.rewards.grader_pool import GraderPool
from megatron_minpro.rewards.reward import RewardResult, judge_all


class MathVerifyReward:
    """1 if the response's final answer equals the label, else 0.

    Digits and text decide what they can ("025" equals "25", 23 digits stay exact; see answers.compare_plainly). Worker processes decide the
    rest: by exact arithmetic and rules (equality.py), then by math-verify. An answer that breaks or outlasts the grader is wrong;
    error_counts counts it.
    """

    name = "math_verify"

    def __init__(self, *, style: AnswerStyle, timeout_s: float = 5.0, workers: int = 1, memory_mb: int = 4096) -> None:
        """A grader with its worker processes, which start at the first answer that needs them.

        Args:
            style: where the prompts ask for the answer: dapo = the last "Answer:" line, boxed = the last \\boxed{...}. Never both: a grader
                that accepts the other form rewards what the prompt did not ask for.
            timeout_s: wall-clock limit per answer.
            workers: processes that grade at the same time.
            memory_mb: address space of each of them.

        Raises:
            ValueError: an option is out of range.
        """
        if style not in ("dapo", "boxed"):
            raise ValueError(f"reward.style = {style!r}, expected 'dapo' or 'boxed'")
        self._style = style
        self._pool = GraderPool(workers=workers, timeout_s=timeout_s, memory_mb=memory_mb)
        self.error_counts: Counter[str] = Counter()

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        """One result per conversation, in order. Raises ValueError naming the prompt for a label that is no text."""
        return judge_all(self, conversations)

    async def judge(self, conversation: Conversation) -> RewardResult:
        """See RewardOnArrival. Raises ValueError naming the prompt for a label that is no text."""
        label, truncated = _text_label(conversation.prompt, reward=self.name), conversation.finish_reason != "stop"
        answer = extract_answer(conversation.response, style=self._style, truncated=truncated, label=label)
        if answer is None:
            return _judged(False, None)
        verdict = compare_plainly(label, answer)
        if verdict is not None:
            return _judged(verdict, answer)
        judgement = await self._pool.compare_one(label, answer)
        if judgement.error is not None:
            self.error_counts[judgement.error.partition(":")[0]] += 1
        return _judged(judgement.equal is True, answer, judgement.error)

    def close(self) -> None:
        self._pool.close()


def _text_label(prompt: Prompt, *, reward: str) -> str:
    if not isinstance(prompt.answer, str):
        raise ValueError(f"reward {reward}: the answer of {prompt.prompt_id} is a {type(prompt.answer).__name__}, expected text")
    return prompt.answer


def _judged(correct: bool, extracted: str | None, error: str | None = None) -> RewardResult:
    return RewardResult(reward=float(correct), correct=correct, extracted=extracted, error=error)
