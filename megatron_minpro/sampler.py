"""From prompts to a batch of judged responses. Runs on one rank only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_minpro.prompts import Prompt, PromptCursor
from megatron_minpro.rewards import Reward, RewardResult
from megatron_minpro.samples import RolloutBatch, Sample
from rollout.client import GenerationClient
from rollout.records import Generation, GenerationRequest, SamplingParams

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
    responses: tuple[JudgedResponse, ...]  # in the order of batch.samples
    reward_s: float


def judge_responses(
    prompts: Sequence[Prompt],
    *,
    client: GenerationClient,
    tokenizer: Any,
    reward: Reward,
    sampling: SamplingParams,
    num_samples: int,
    request_prefix: str,
) -> tuple[list[JudgedResponse], float]:
    """num_samples responses to every prompt, prompt by prompt, and the seconds spent grading them."""
    requests = [
        GenerationRequest(request_id=f"{request_prefix}-{number}", prompt_token_ids=prompt.token_ids)
        for number, prompt in enumerate(prompts)
    ]
    groups = client.generate(requests, sampling, num_samples=num_samples)
    generated = time.perf_counter()
    owners = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    generations = [generation for group in groups for generation in group]
    texts = tokenizer.batch_decode([_graded_tokens(generation, sampling.stop_token_ids) for generation in generations])
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


def _graded_tokens(generation: Generation, stop_token_ids: Sequence[int]) -> list[int]:
    """The response without the token that ended it: the grader would read that token as part of the answer."""
    tokens = list(generation.response_token_ids)
    return tokens[:-1] if generation.finish_reason == "stop" and tokens[-1] in stop_token_ids else tokens


class Sampler:
    """Draws prompts, samples a group of responses to each, judges them and computes advantages."""

    def __init__(
        self,
        *,
        cursor: PromptCursor,
        client: GenerationClient,
        tokenizer: Any,
        reward: Reward,
        advantages: AdvantageFunction,
        prompts_per_step: int,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.cursor = cursor
        self._client = client
        self._tokenizer = tokenizer
        self._reward = reward
        self._advantages = advantages
        self._prompts_per_step = prompts_per_step
        self._group_size = group_size
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed

    def sample(self, step: int, *, policy_version: int) -> Sampled:
        """The batch of global step `step`, not yet scored by the trainer. Raises what the client raises, ValueError for a wrong version."""
        sampling = SamplingParams(
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            top_p=1.0,
            top_k=-1,
            stop_token_ids=(self._tokenizer.eos_token_id,),
            seed=self._seed * 1_000_003 + step,
        )
        responses, reward_s = judge_responses(
            self.cursor.next(self._prompts_per_step),
            client=self._client,
            tokenizer=self._tokenizer,
            reward=self._reward,
            sampling=sampling,
            num_samples=self._group_size,
            request_prefix=f"step{step}",
        )
        rewards = torch.tensor([response.result.reward for response in responses], dtype=torch.float32)
        advantages = self._advantages(rewards.view(-1, self._group_size)).reshape(-1).tolist()
        batch = RolloutBatch(
            sampled_at_step=step,
            policy_version=policy_version,
            group_size=self._group_size,
            samples=tuple(
                _sample(f"step{step}-{number}", response, advantage)
                for number, (response, advantage) in enumerate(zip(responses, advantages, strict=True))
            ),
        )
        return Sampled(batch=batch, responses=tuple(responses), reward_s=reward_s)


def _sample(sample_id: str, response: JudgedResponse, advantage: float) -> Sample:
    generation = response.generation
    versions = [span.policy_version for span in generation.version_spans]
    return Sample(
        sample_id=sample_id,
        token_ids=generation.prompt_token_ids + generation.response_token_ids,
        prompt_tokens=len(generation.prompt_token_ids),
        engine_logprobs=generation.engine_logprobs,
        behaviour_logprobs=None,
        policy_versions=(min(versions), max(versions)),
        finish_reason=generation.finish_reason,
        reward=response.result.reward,
        correct=response.result.correct,
        advantage=advantage,
    )
