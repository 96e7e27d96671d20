"""From prompts to a batch of judged responses. Runs on one rank only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.config import DynamicSamplingConfig
from megatron_minpro.data.end_tokens import response_text
from megatron_minpro.data.prompts import PromptCursor
from megatron_minpro.rewards.reward import Reward, RewardResult
from rollout.client import GenerationClient, RolloutFailed, WeightsMissing
from rollout.records import Generation, GenerationRequest, SamplingParams

log = logging.getLogger(__name__)

AdvantageFunction = Callable[[torch.Tensor], torch.Tensor]  # rewards [G groups, K responses] -> advantages, same shape


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedResponse:
    """One response with its text and its judgement; what is kept for people to read."""

    prompt: Prompt
    generation: Generation
    text: str
    result: RewardResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What one call of `Sampler.sample` made."""

    batch: RolloutBatch
    responses: tuple[JudgedResponse, ...]  # in the order of batch.samples, then of dropped
    reward_s: float
    dropped: tuple[Sample, ...] = ()  # by dynamic sampling: whole groups, sampled and never trained; their advantage is 0
    rounds: int = 1  # times that responses were asked for
    equal_groups: int = 0  # equal groups that dynamic sampling had to leave in the batch
    servers: Mapping[str, float] = field(default_factory=dict)  # metrics: how the servers fared


def judge_responses(
    prompts: Sequence[Prompt],
    *,
    client: GenerationClient,
    tokenizer: Any,
    reward: Reward,
    sampling: SamplingParams,
    num_samples: int,
    request_prefix: str,
    policy_version: int,
) -> tuple[list[JudgedResponse], float]:
    """num_samples responses to every prompt, prompt by prompt, and the seconds spent grading them. Raises what the client raises."""
    requests = [
        GenerationRequest(request_id=f"{request_prefix}-{number}", prompt_token_ids=prompt.token_ids)
        for number, prompt in enumerate(prompts)
    ]
    groups = client.generate(requests, sampling, num_samples=num_samples, policy_version=policy_version)
    generated = time.perf_counter()
    owners = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    generations = [generation for group in groups for generation in group]
    texts = [response_text(tokenizer, generation.response_token_ids, end_ids=sampling.stop_token_ids) for generation in generations]
    results = reward.score(
        owners,
        texts,
        [generation.finish_reason for generation in generations],
        num_response_tokens=[len(generation.response_token_ids) for generation in generations],
    )
    responses = [
        JudgedResponse(prompt=prompt, generation=generation, text=text, result=result)
        for prompt, generation, text, result in zip(owners, generations, texts, results, strict=True)
    ]
    return responses, time.perf_counter() - generated


def choose_groups(useful: Sequence[bool], wanted: int) -> list[int]:
    """Indices of the `wanted` groups to train, ascending: the earliest useful ones, and where these are too few the earliest others."""
    return sorted(sorted(range(len(useful)), key=lambda group: (not useful[group], group))[:wanted])


class Sampler:
    """Draws prompts, samples a group of responses to each, judges them and computes advantages.

    With dynamic sampling (DAPO, arXiv:2503.14476, eq. 11) a group whose rewards (or verdicts, see DynamicSamplingConfig) are all equal is
    set aside, and as many further prompts are drawn as groups are missing, up to max_rounds rounds in one step. Then the earliest
    groups set aside fill the batch, so that its size never changes; the others are dropped and reported, responses and all.
    """

    def __init__(
        self,
        *,
        cursor: PromptCursor,
        client: GenerationClient,
        tokenizer: Any,
        end_ids: tuple[int, ...],
        reward: Reward,
        advantages: AdvantageFunction,
        prompts_per_step: int,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        dynamic_sampling: DynamicSamplingConfig | None = None,
    ) -> None:
        self.cursor = cursor
        self._client = client
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._reward = reward
        self._advantages = advantages
        self._prompts_per_step = prompts_per_step
        self._group_size = group_size
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed
        self._dynamic_sampling = dynamic_sampling

    def sample(self, step: int, *, policy_version: int) -> Sampled:
        """The batch of global step `step`, not yet scored by the trainer.

        Raises what the client raises; the prompts are then drawn again by the next call, which asks for the same responses.
        """
        before = self.cursor.state()
        try:
            return self._sample_batch(step, policy_version)
        except (RolloutFailed, WeightsMissing):
            self.cursor.load_state(before)
            raise

    def _sample_batch(self, step: int, policy_version: int) -> Sampled:
        sampling = SamplingParams(
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            top_p=1.0,
            top_k=-1,
            stop_token_ids=self._end_ids,
            seed=self._seed * 1_000_003 + step,
        )
        groups: list[list[tuple[str, JudgedResponse]]] = []  # with their sample ids, in the order they were asked for
        numbers, reward_s, rounds = count(), 0.0, 0
        while missing := self._missing_groups(groups, rounds):
            responses, seconds = judge_responses(
                self.cursor.next(missing),
                client=self._client,
                tokenizer=self._tokenizer,
                reward=self._reward,
                sampling=sampling,
                num_samples=self._group_size,
                # A response's seed hangs on its request's name, so every round has its own.
                request_prefix=f"step{step}-round{rounds}" if rounds else f"step{step}",
                policy_version=policy_version,
            )
            named = [(f"step{step}-{next(numbers)}", response) for response in responses]
            groups += [named[start : start + self._group_size] for start in range(0, len(named), self._group_size)]
            reward_s += seconds
            rounds += 1
        useful = [self._is_useful(group) for group in groups]
        chosen = choose_groups(useful, self._prompts_per_step)
        trained = [item for group in chosen for item in groups[group]]
        dropped = [item for group in range(len(groups)) if group not in chosen for item in groups[group]]
        equal_groups = sum(not useful[group] for group in chosen)
        if equal_groups:
            log.warning("step %d: %d equal groups stay in the batch after %d rounds of sampling", step, equal_groups, rounds)
        rewards = torch.tensor([response.result.reward for _, response in trained], dtype=torch.float32)
        advantages = self._advantages(rewards.view(-1, self._group_size)).reshape(-1).tolist()
        batch = RolloutBatch(
            sampled_at_step=step,
            policy_version=policy_version,
            group_size=self._group_size,
            samples=tuple(_sample(*item, advantage) for item, advantage in zip(trained, advantages, strict=True)),
        )
        return Sampled(
            batch=batch,
            responses=tuple(response for _, response in (*trained, *dropped)),
            reward_s=reward_s,
            dropped=tuple(_sample(*item, 0.0) for item in dropped),
            rounds=rounds,
            equal_groups=equal_groups,
            servers=self._client.take_report(),
        )

    def _missing_groups(self, groups: Sequence[Sequence[tuple[str, JudgedResponse]]], rounds: int) -> int:
        """How many more prompts to draw; 0 also when no further round is allowed."""
        if rounds >= (1 if self._dynamic_sampling is None else self._dynamic_sampling.max_rounds):
            return 0
        return self._prompts_per_step - sum(self._is_useful(group) for group in groups)

    def _is_useful(self, group: Sequence[tuple[str, JudgedResponse]]) -> bool:
        if self._dynamic_sampling is None:
            return True
        by_reward = self._dynamic_sampling.equal == "reward"
        return len({response.result.reward if by_reward else response.result.correct for _, response in group}) > 1


def _sample(sample_id: str, response: JudgedResponse, advantage: float) -> Sample:
    generation = response.generation
    num_prompt = len(generation.prompt_token_ids)
    token_ids = torch.tensor(generation.prompt_token_ids + generation.response_token_ids, dtype=torch.int32)
    return Sample(
        sample_id=sample_id,
        token_ids=token_ids,
        loss_mask=torch.arange(len(token_ids)) >= num_prompt,
        # SGLang computes them in float32 and writes every digit: no bit is lost here.
        engine_logprobs=torch.tensor(generation.engine_logprobs, dtype=torch.float32),
        behaviour_logprobs=None,
        version_spans=generation.version_spans,
        finish_reason=generation.finish_reason,
        reward=response.result.reward,
        correct=response.result.correct,
        advantage=advantage,
    )
