"""From prompts to a batch of judged samples. Runs on one rank only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.batch.routing_file import RoutingAppender
from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.batch.top_tokens_file import TopTokensAppender
from megatron_minpro.config import DynamicSamplingConfig
from megatron_minpro.data.prompts import PromptCursor
from megatron_minpro.loop.responder import Judged, Responder
from rollout.client import RolloutFailed, WeightsMissing
from rollout.records import Sinks

log = logging.getLogger(__name__)

Drawn = tuple[list[Prompt], Mapping[str, Any]]  # prompts, and the cursor's state behind them
AdvantageFunction = Callable[[torch.Tensor], torch.Tensor]  # rewards [G groups, K responses] -> advantages, same shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one call of `Collector.collect` made."""

    batch: RolloutBatch
    judged: tuple[Judged, ...]  # conversations and judgements, in the order of batch.samples, then of dropped
    reward_s: float
    cursor: Mapping[str, Any]  # of the prompts, behind those of this batch
    dropped: tuple[Sample, ...] = ()  # by dynamic sampling: whole groups, sampled and never trained; their advantage is 0
    rounds: int = 1  # times that responses were asked for
    equal_groups: int = 0  # equal groups that dynamic sampling had to leave in the batch
    servers: Mapping[str, float] = field(default_factory=dict)  # metrics: how the servers fared, and of what they returned beside tokens


def choose_groups(useful: Sequence[bool], wanted: int) -> list[int]:
    """Indices of the `wanted` groups to train, ascending: the earliest useful ones, and where these are too few the earliest others."""
    return sorted(sorted(range(len(useful)), key=lambda group: (not useful[group], group))[:wanted])


class Collector:
    """Draws prompts, has a group of responses to each sampled and judged, and computes advantages.

    With dynamic sampling (DAPO, arXiv:2503.14476, eq. 11) a group whose rewards (or verdicts, see DynamicSamplingConfig) are all equal is
    set aside, and as many further prompts are drawn as groups are missing, up to max_rounds rounds in one step. Then the earliest
    groups set aside fill the batch, so that its size never changes; the others are dropped and reported, responses and all.
    """

    def __init__(
        self,
        *,
        cursor: PromptCursor,
        responder: Responder,
        advantages: AdvantageFunction,
        prompts_per_step: int,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        dynamic_sampling: DynamicSamplingConfig | None = None,
        routing: Callable[[int], RoutingAppender] | None = None,
        top_tokens: Callable[[int], TopTokensAppender] | None = None,
    ) -> None:
        """
        Args:
            cursor, prompts_per_step: where prompts come from, and how many make a batch.
            responder, group_size, max_new_tokens, temperature, seed: who answers, how often and how.
            advantages: of a batch's rewards.
            dynamic_sampling: None: every group is trained.
            routing: makes the file for the experts of a global step's batch, as the servers return them; None: nobody asks for them.
            top_tokens: the same for the servers' most likely tokens.
        """
        self.cursor = cursor
        self._responder = responder
        self._advantages = advantages
        self._prompts_per_step = prompts_per_step
        self._group_size = group_size
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed
        self._dynamic_sampling = dynamic_sampling
        self._drawn: dict[int, Drawn] = {}  # by global step: of batches that are to be collected
        self._new_routing = routing
        self._routing: dict[int, RoutingAppender] = {}  # by global step: what has arrived stays, whatever breaks off
        self._new_top_tokens = top_tokens
        self._top_tokens: dict[int, TopTokensAppender] = {}  # the same

    def draw(self, step: int) -> None:
        """Draw the prompts of a batch before `collect`. Where batches are collected at the same time, this keeps their prompts in order."""
        self._drawn[step] = self._draw(self._prompts_per_step)

    def collect(self, step: int, *, policy_version: int) -> Collected:
        """The batch of global step `step`, not yet scored by the trainer.

        Raises what the responder raises; the prompts are then drawn again by the next call, which asks for the same responses.
        """
        if step in self._drawn:  # others are drawn meanwhile: the cursor is not touched
            collected = self._collect(step, policy_version)
            del self._drawn[step]
            return collected
        before = self.cursor.state()
        try:
            return self._collect(step, policy_version)
        except (RolloutFailed, WeightsMissing):
            self.cursor.load_state(before)
            raise

    def _collect(self, step: int, policy_version: int) -> Collected:
        groups: list[list[tuple[str, Judged]]] = []  # with their sample ids, in the order they were asked for
        numbers, reward_s = count(), 0.0
        fared: list[Mapping[str, float]] = []  # the servers, round by round
        if self._new_routing is not None and step not in self._routing:
            self._routing[step] = self._new_routing(step)
        if self._new_top_tokens is not None and step not in self._top_tokens:
            self._top_tokens[step] = self._new_top_tokens(step)
        routing, top = self._routing.get(step), self._top_tokens.get(step)
        while missing := self._missing_groups(groups, rounds := len(fared)):
            prompts, cursor = self._drawn[step] if step in self._drawn and not rounds else self._draw(missing)
            responses = self._responder.respond(
                prompts,
                num_samples=self._group_size,
                max_new_tokens=self._max_new_tokens,
                temperature=self._temperature,
                top_p=1.0,
                seed=self._seed * 1_000_003 + step,
                # A response's seed depends on its request's name, so every round has its own.
                request_prefix=f"step{step}-round{rounds}" if rounds else f"step{step}",
                policy_version=policy_version,
                sinks=Sinks(routes=routing, top=top),
            )
            named = [(f"step{step}-{next(numbers)}", response) for response in responses.judged]
            groups += [named[start : start + self._group_size] for start in range(0, len(named), self._group_size)]
            reward_s += responses.reward_s
            fared.append(responses.servers)
        useful = [self._is_useful(group) for group in groups]
        chosen = choose_groups(useful, self._prompts_per_step)
        trained = [item for group in chosen for item in groups[group]]
        dropped = [item for group in range(len(groups)) if group not in chosen for item in groups[group]]
        equal_groups = sum(not useful[group] for group in chosen)
        if equal_groups:
            log.warning("step %d: %d equal groups stay in the batch after %d rounds of sampling", step, equal_groups, len(fared))
        rewards = torch.tensor([result.reward for _, (_, result) in trained], dtype=torch.float32)
        advantages = self._advantages(rewards.view(-1, self._group_size)).reshape(-1).tolist()
        batch = RolloutBatch(
            sampled_at_step=step,
            policy_version=policy_version,
            group_size=self._group_size,
            samples=tuple(_sample(*item, advantage) for item, advantage in zip(trained, advantages, strict=True)),
            routing=None if routing is None else routing.close([_place(routing, conversation) for _, (conversation, _) in trained]),
            top_tokens=None if top is None else top.close([_place_of_top(top, conversation) for _, (conversation, _) in trained]),
        )
        self._routing.pop(step, None)
        self._top_tokens.pop(step, None)
        return Collected(
            batch=batch,
            judged=tuple(response for _, response in (*trained, *dropped)),
            reward_s=reward_s,
            cursor=cursor,
            dropped=tuple(_sample(*item, 0.0) for item in dropped),
            rounds=len(fared),
            equal_groups=equal_groups,
            servers={**_over_rounds(fared), **({} if top is None else top.metrics())},
        )

    def _draw(self, num_prompts: int) -> Drawn:
        return self.cursor.next(num_prompts), self.cursor.state()

    def _missing_groups(self, groups: Sequence[Sequence[tuple[str, Judged]]], rounds: int) -> int:
        """How many more prompts to draw; 0 also when no further round is allowed."""
        if rounds >= (1 if self._dynamic_sampling is None else self._dynamic_sampling.max_rounds):
            return 0
        return self._prompts_per_step - sum(self._is_useful(group) for group in groups)

    def _is_useful(self, group: Sequence[tuple[str, Judged]]) -> bool:
        if self._dynamic_sampling is None:
            return True
        by_reward = self._dynamic_sampling.equal == "reward"
        return len({result.reward if by_reward else result.correct for _, (_, result) in group}) > 1


def _over_rounds(fared: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The batch begins with its first round and ends with the tail of its last one."""
    return {
        **fared[0],
        "time/tail": fared[-1]["time/tail"],
        "servers/silent": fared[-1]["servers/silent"],
        "servers/used": max(servers["servers/used"] for servers in fared),
        "servers/retries": sum(servers["servers/retries"] for servers in fared),
    }


def _place(routing: RoutingAppender, conversation: Conversation) -> int | None:
    """Of a conversation's rows in the file; None where those of one of its answers are not known."""
    answers = [(answer.routes, answer.num_inputs) for answer in conversation.generations]
    known = [(place, num_inputs) for place, num_inputs in answers if place is not None]
    if len(known) < len(answers) or len(conversation.version_spans) > 1:
        return None
    return routing.joined(known, num_inputs=len(conversation.token_ids) - 1)


def _place_of_top(top_tokens: TopTokensAppender, conversation: Conversation) -> int:
    """Of a conversation's rows in the file."""
    answers = []
    for answer in conversation.generations:
        assert answer.top is not None, "the session asks for them"
        answers.append((answer.top, len(answer.response_token_ids)))
    return top_tokens.joined(answers)


def _sample(sample_id: str, judged: Judged, advantage: float) -> Sample:
    conversation, result = judged
    return Sample(
        sample_id=sample_id,
        token_ids=torch.from_numpy(np.array(conversation.token_ids, dtype=np.int32)),
        loss_mask=torch.from_numpy(np.array(conversation.loss_mask)),
        # SGLang computes them in float32 and writes every digit: no bit is lost here.
        engine_logprobs=torch.from_numpy(np.array(conversation.engine_logprobs, dtype=np.float32)),
        behaviour_logprobs=None,
        version_spans=conversation.version_spans,
        finish_reason=conversation.finish_reason,
        reward=result.reward,
        correct=result.correct,
        advantage=advantage,
    )
