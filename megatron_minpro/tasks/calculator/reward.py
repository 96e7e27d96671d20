"""The reward: 1 for a chain whose last result is right, whoever computed it."""

from __future__ import annotations

import re

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.rewards.reward import RewardResult

_LAST_RESULT = re.compile(r"= ([0-9]{1,1000}) ;")  # Python refuses to read integers of more than 4,300 digits


def last_result(prompt: Prompt, conversation: Conversation) -> RewardResult:
    """1 if the model ended its turn and the last words of the conversation are `= r ;` with the right r, else 0.

    Args:
        prompt: its answer is the right r.
        conversation: of the model with the calculator.
    """
    found = _LAST_RESULT.fullmatch(" ".join(conversation.text.split()[-3:]))
    extracted = None if found is None else found[1]
    correct = conversation.finish_reason == "stop" and extracted is not None and int(extracted) == int(prompt.answer)
    return RewardResult(reward=float(correct), correct=correct, extracted=extracted, error=None)
