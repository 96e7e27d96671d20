"""The held-out measurement inside a training run: pass@1 and pass@k on prompts that are never trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.config import EvaluationConfig
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.loop.responder import Responder
from megatron_minpro.report.pass_at_k import mean_pass_at_k, powers_of_two


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
    responder: Responder,
    max_new_tokens: int,
    seed: int,
    policy_version: int,
) -> dict[str, float]:
    """pass_at_1, pass_at_2, pass_at_4, ... up to samples_per_prompt: means over prompts of the unbiased estimator.

    Args:
        prompts: held-out prompts.
        config: how many samples, how they are drawn.
        responder: asks and judges as in training, in the run's environment.
        max_new_tokens: most tokens after a prompt.
        seed: of the draws.
        policy_version: of the weights that are measured.

    Raises:
        RolloutFailed, WeightsMissing, RuntimeError: as the responder.
    """
    num_samples = config.samples_per_prompt
    responses = responder.respond(
        prompts,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
        request_prefix="evaluation",
        policy_version=policy_version,
    ).judged
    correct = [
        sum(result.correct for _, result in responses[start : start + num_samples]) for start in range(0, len(responses), num_samples)
    ]
    sampled = [num_samples] * len(correct)
    return {f"pass_at_{k}": mean_pass_at_k(sampled, correct, k=k, estimator="unbiased") for k in powers_of_two(num_samples)}
