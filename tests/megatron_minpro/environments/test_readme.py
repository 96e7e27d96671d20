"""The README's example runs as printed."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_minpro.environments.conversations import hold_conversations
from megatron_minpro.environments.environment import make_environment
from megatron_minpro.rewards.registry import make_reward
from tests.megatron_minpro.conftest import unjudged
from tests.megatron_minpro.environments.test_conversations import END, PROMPTS, Session, Tokenizer

REPOSITORY = Path(__file__).resolve().parents[3]
TEXT = (REPOSITORY / "megatron_minpro/environments/README.md").read_text(encoding="utf-8")


class ChatTokenizer(Tokenizer):
    """A message's tokens are the numbers in its content, between 60 and 61."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(f"60 {message['content']} 61" for message in messages)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_the_example_holds_a_conversation_and_judges_it(users_module: Callable[[str], str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    name = users_module(code)
    environment = make_environment(f"{name}:search", max_calls=4)

    async def look_up(query: str) -> str:
        return query

    # The model says the last token plus one; two lookups, then nothing is asked.
    sys.modules[name].read_query = lambda text: "40" if text in ("1", "11") else None  # type: ignore[attr-defined]
    sys.modules[name].look_up = look_up  # type: ignore[attr-defined]
    conversations = asyncio.run(
        hold_conversations(
            environment,
            PROMPTS,
            session=Session(),  # type: ignore[arg-type]
            tokenizer=ChatTokenizer(),
            end_ids=(END,),
            max_new_tokens=20,
            num_samples=1,
            request_prefix="step0",
            judge=unjudged,
        )
    )
    assert [[turn.author for turn in said.turns] for said in conversations] == [["model", "environment", "model"]] * 2
    assert conversations[0].token_ids == (7, 0, 1, END, 61, 60, 40, 61, 62, END)
    results = make_reward(f"{name}:found_it", concurrency=8).score(conversations)
    assert [result.reward for result in results] == [1.0, 1.0]  # the empty answer is in every text
