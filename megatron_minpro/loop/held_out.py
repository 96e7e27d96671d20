"""The held-out measurement inside a training run: pass@1 and pass@k on prompts that are never trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.config import EvaluationConfig
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.loop.sampler import judge_responses
from megatron_minpro.report.pass_at_k import mean_pass_at_k, powers_of_two
from megatron_minpro.rewards.reward import Reward
from rollout.client import GenerationClient
from rollout.records import SamplingParams


def held_out_prompts(config: EvaluationConfig, tokenizer: Any) -> list[Prompt]:
    """The first num_prompts prompts of the held-out source. Raises ValueError when it has fewer."""
    source, _ = load_prompts(tokenizer=tokenizer, **config.prompts.model_dump())
    if len(source) < config.num_prompts:
        raise ValueError(f"evaluation.num_prompts: {config.num_prompts}, but {source.name} has {len(source)} prompts")
    return [source[index] for index in range(config.num_prompts)]


def measure(
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    *,
    client: GenerationClient,
    tokenizer: Any,
    end_ids: tuple[int, ...],
    reward: Reward,
    max_new_tokens: int,
    seed: int,
    policy_version: int,
) -> dict[str, float]:
    """pass_at_1, pass_at_2, pass_at_4, ... up to samples_per_prompt: means over prompts of the unbiased estimator.

    policy_version: of the weights that are measured. Raises what the client raises.
    """
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=-1,
        stop_token_ids=end_ids,
        seed=seed,
    )
    num_samples = config.samples_per_prompt
    responses, _ = judge_responses(
        prompts,
        client=client,
        tokenizer=tokenizer,
        reward=reward,
        sampling=sampling,
        num_samples=num_samples,
        request_prefix="evaluation",
        policy_version=policy_version,
    )
    correct = [
        sum(response.result.correct for response in responses[start : start + num_samples])
        for start in range(0, len(responses), num_samples)
    ]
    sampled = [num_samples] * len(correct)
    return {f"pass_at_{k}": mean_pass_at_k(sampled, correct, k=k, estimator="unbiased") for k in powers_of_two(num_samples)}
