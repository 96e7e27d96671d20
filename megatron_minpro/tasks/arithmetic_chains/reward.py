"""The reward: 1 for the right last step, else 0."""

from __future__ import annotations

import re

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.rewards.reward import RewardResult

_LAST_STEP = re.compile(r"= ([0-9]{1,1000}) ;")  # Python refuses to read integers of more than 4,300 digits


def final_step(prompt: Prompt, conversation: Conversation) -> RewardResult:
    """1 if the response stopped by itself and its last words are `= r ;` with the right r, else 0.

    Args:
        prompt: its answer is the right r.
        conversation: what followed it.
    """
    last_step = _LAST_STEP.fullmatch(" ".join(conversation.response.split()[-3:]))
    extracted = None if last_step is None else last_step[1]
    correct = conversation.finish_reason == "stop" and extracted is not None and int(extracted) == int(prompt.answer)
    return RewardResult(reward=float(correct), correct=correct, extracted=extracted, error=None)
