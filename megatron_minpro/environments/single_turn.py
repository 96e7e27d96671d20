"""The default environment: one prompt, one answer."""

from __future__ import annotations

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.environments.model import Model


async def single_turn(prompt: Prompt, model: Model) -> Conversation:
    """The model's answer to the prompt."""
    return model.conversation(await model(prompt.token_ids))
