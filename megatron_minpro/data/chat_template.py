"""What a chat template writes between an assistant's words and what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_minpro.batch.prompt import Message

_MARK = "the-assistants-words"  # stands where the assistant's words stand; no chat template contains it


def text_behind_an_answer(tokenizer: Any, following: Sequence[Message], *, generation_prompt: bool) -> str:
    """The text that the chat template writes behind an assistant's words.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        following: the messages after the assistant's.
        generation_prompt: whether the assistant's next turn begins at the end.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}, *following]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    return rendered.rpartition(_MARK)[2]
