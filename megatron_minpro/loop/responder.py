"""From prompts to judged conversations: the environment asks the servers, the reward judges. Runs on one rank only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.environments.conversations import hold_conversations
from megatron_minpro.environments.environment import Environment
from megatron_minpro.rewards.reward import Reward, RewardOnArrival, RewardResult
from rollout.client import GenerationClient
from rollout.records import NO_SINKS, SamplingParams, Sinks

Judged = tuple[Conversation, RewardResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """What `Responder.respond` gives."""

    judged: list[Judged]  # prompt by prompt
    reward_s: float  # of judging after the last conversation's end
    servers: Mapping[str, float]  # metrics: how the servers fared


@dataclass(frozen=True, kw_only=True)
class Responder:
    """What training batches and held-out measurements have in common."""

    client: GenerationClient
    tokenizer: Any
    end_ids: tuple[int, ...]  # tokens that end an answer
    environment: Environment
    reward: Reward

    def respond(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        request_prefix: str,
        policy_version: int,
        sinks: Sinks = NO_SINKS,
    ) -> Responses:
        """`num_samples` judged conversations on every prompt.

        Args:
            prompts: what to ask.
            num_samples: conversations per prompt.
            max_new_tokens: most tokens after a prompt.
            temperature, top_p: how to sample.
            seed: together with request_prefix and the place of a conversation it makes every answer repeatable.
            request_prefix: begins the names of the requests.
            policy_version: every token is sampled under these weights.
            sinks: keep what else the answers hold.

        Raises:
            RolloutFailed, WeightsMissing: as the client. The same call, made again, asks the servers only for what is missing.
            RuntimeError: the environment failed.
        """
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=-1, stop_token_ids=self.end_ids, seed=seed
        )

        ended_at = 0.0  # the last conversation so far

        async def judge(conversation: Conversation) -> tuple[Conversation, RewardResult | None]:
            nonlocal ended_at
            ended_at = time.perf_counter()
            return conversation, await self.reward.judge(conversation) if isinstance(self.reward, RewardOnArrival) else None

        async def ask() -> tuple[list[tuple[Conversation, RewardResult | None]], dict[str, float]]:
            async with self.client.session(sampling, policy_version=policy_version, sinks=sinks) as session:
                held = await hold_conversations(
                    self.environment,
                    prompts,
                    session=session,
                    tokenizer=self.tokenizer,
                    end_ids=self.end_ids,
                    max_new_tokens=max_new_tokens,
                    num_samples=num_samples,
                    request_prefix=request_prefix,
                    judge=judge,
                )
                return held, session.metrics()

        held, servers = self.client.run(ask())
        if isinstance(self.reward, RewardOnArrival):
            judged = [(conversation, result) for conversation, result in held if result is not None]
        else:
            conversations = [conversation for conversation, _ in held]
            judged = list(zip(conversations, self.reward.score(conversations), strict=True))
        return Responses(judged=judged, reward_s=time.perf_counter() - ended_at, servers=servers)
