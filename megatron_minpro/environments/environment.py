"""Environments by name or import path."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.environments.model import Model
from megatron_minpro.registry import PlugIns

ENVIRONMENTS = PlugIns(
    setting="environment.name",
    options="environment",
    known={"single_turn": "megatron_minpro.environments.single_turn:single_turn"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A named environment with its options: `await environment(prompt, model)` is a finished conversation."""

    name: str
    function: Callable[..., Awaitable[Conversation]]
    options: Mapping[str, Any]

    async def __call__(self, prompt: Prompt, model: Model) -> Conversation:
        return await self.function(prompt, model, **self.options)


def make_environment(name: str, **options: Any) -> Environment:
    """An environment with its options.

    Args:
        name: single_turn, or package.module:function for a coroutine of your own, `async def function(prompt, model, **options)`.
        options: keyword arguments of the function.

    Raises:
        PlugInError: the environment or an option is unknown or missing, or the function is no coroutine.
    """
    function = ENVIRONMENTS.find(name, options, passed=2)
    if not inspect.iscoroutinefunction(function):
        raise ENVIRONMENTS.refused(name, TypeError("expected a coroutine, async def function(prompt, model, **options)"))
    return Environment(name=name, function=function, options=options)
