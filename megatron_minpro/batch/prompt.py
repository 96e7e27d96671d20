"""One question: where the life of a batch begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]  # role and content, as chat templates take them


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, ready to be sent to a rollout server, and what environments and rewards know about it."""

    prompt_id: str  # unique within its source and the same in every run
    text: str  # the user message, wrapper included, chat template not
    token_ids: tuple[int, ...]  # chat template applied, generation prompt added
    answer: Any  # the label a reward compares with: text, or whatever JSON value the row holds, such as a list of test cases
    source: str  # name of the PromptSource
    preceding: tuple[Message, ...] = ()  # messages of the row that stand before the question, such as a system message
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all fields of the data row; empty for a generator

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as a chat template takes it."""
        return [*self.preceding, {"role": "user", "content": self.text}]
