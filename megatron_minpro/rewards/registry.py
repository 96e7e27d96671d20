"""Rewards by name: ours, or package.module:function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_minpro.registry import PlugInError, PlugIns
from megatron_minpro.rewards.function_reward import FunctionReward
from megatron_minpro.rewards.overlong import OverlongShaping
from megatron_minpro.rewards.reward import RewardOnArrival

REWARDS = PlugIns(setting="reward.name", options="reward", known={"math_verify": "megatron_minpro.rewards.math_verify:MathVerifyReward"})


def make_reward(name: str, *, overlong: Mapping[str, Any] | None = None, concurrency: int = 32, **options: Any) -> RewardOnArrival:
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
            reward: RewardOnArrival = REWARDS.find(name, options, passed=0)(**options)
        else:
            reward = FunctionReward(name, REWARDS.find(name, options, passed=2), options, concurrency=concurrency)
        return reward if overlong is None else OverlongShaping(reward, **overlong)
    except PlugInError:
        raise
    except ValueError as error:
        raise REWARDS.refused(name, error) from error
