"""The held-out measurement with a client whose responses are known: pass@k by counting subsets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.config import EvaluationConfig, load_config
from megatron_minpro.environments.environment import make_environment
from megatron_minpro.loop.held_out import held_out_prompts, measure
from megatron_minpro.loop.responder import Responder
from megatron_minpro.rewards.registry import make_reward
from rollout.records import NO_SINKS, Generation, GenerationRequest, SamplingParams, Sinks, VersionSpan

REPOSITORY = Path(__file__).resolve().parents[3]


def evaluation(*overrides: str) -> EvaluationConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", overrides).evaluation


class Client:
    """Answers each prompt rightly in the samples listed for it, and wrongly in the others."""

    def __init__(self, tokenizer: Any, answers: dict[tuple[int, ...], str], right: Sequence[set[int]]) -> None:
        self.tokenizer, self.answers, self.right = tokenizer, answers, right
        self.sampling: SamplingParams | None = None

    samples_per_call = None
    is_rolling = False
    run = staticmethod(asyncio.run)

    def begin(self, request_ids: Iterable[str]) -> None: ...
    def end(self, request_id: str) -> None: ...
    def metrics(self) -> dict[str, float]:
        return {}

    @asynccontextmanager
    async def session(self, sampling: SamplingParams, *, policy_version: int, sinks: Sinks) -> AsyncIterator[Client]:
        assert sinks == NO_SINKS, "experts and likeliest tokens are for training"
        assert policy_version == 12
        self.sampling, self.settings = sampling, self
        yield self

    async def generate(self, requests: Sequence[GenerationRequest], *, on_generation: None) -> list[Generation]:
        prompts = dict.fromkeys(request.prompt_token_ids for request in requests)
        right = dict(zip(prompts, self.right, strict=True))
        generations = []
        for request in requests:
            answer = int(self.answers[request.prompt_token_ids])
            said = answer if request.sample_index in right[request.prompt_token_ids] else (answer + 1) % 10
            generations.append(self.generation(request, f"1 + 1 = {said} ;"))
        return generations

    def generation(self, request: GenerationRequest, text: str) -> Generation:
        ids = (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id)
        return Generation(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            response_token_ids=ids,
            engine_logprobs=(-1.0,) * len(ids),
            version_spans=(VersionSpan(policy_version=0, start=0, end=len(ids)),),
            finish_reason="stop",
            latency_s=0.0,
            num_retries=0,
        )


def pass_at_k(num_samples: int, right: set[int], k: int) -> float:
    """The share of subsets of k samples that hold a right one, by listing all of them."""
    subsets = list(combinations(range(num_samples), k))
    return sum(bool(right & set(subset)) for subset in subsets) / len(subsets)


@pytest.mark.parametrize(("num_samples", "ks"), [(1, [1]), (3, [1, 2]), (6, [1, 2, 4]), (8, [1, 2, 4, 8])])
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_response(chain_tokenizer: Any, num_samples: int, ks: list[int]) -> None:
    config = evaluation("evaluation.num_prompts=4", f"evaluation.samples_per_prompt={num_samples}", "evaluation.top_p=0.7")
    prompts = held_out_prompts(config, chain_tokenizer)
    right = [set(), {0}, set(range(num_samples)), set(range(0, num_samples, 2))]
    client = Client(chain_tokenizer, {prompt.token_ids: prompt.answer for prompt in prompts}, right)
    found = measure(
        prompts,
        config,
        responder=Responder(
            client=client,  # type: ignore[arg-type]
            tokenizer=chain_tokenizer,
            end_ids=(chain_tokenizer.eos_token_id,),
            environment=make_environment("single_turn"),
            reward=make_reward("megatron_minpro.tasks.arithmetic_chains.reward:final_step"),
        ),
        max_new_tokens=56,
        seed=5,
        policy_version=12,
    )
    assert found == pytest.approx({f"pass_at_{k}": sum(pass_at_k(num_samples, each, k) for each in right) / 4 for k in ks})
    assert client.sampling == SamplingParams(
        max_new_tokens=56, temperature=1.0, top_p=0.7, top_k=-1, stop_token_ids=(chain_tokenizer.eos_token_id,), seed=5
    )


def test_held_out_prompts_are_the_first_of_their_source_and_untrained(chain_tokenizer: Any) -> None:
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml")
    prompts = held_out_prompts(config.evaluation, chain_tokenizer)
    assert len(prompts) == config.evaluation.num_prompts
    assert prompts == held_out_prompts(config.evaluation, chain_tokenizer)
    fewer = held_out_prompts(evaluation("evaluation.num_prompts=3"), chain_tokenizer)
    assert fewer == prompts[:3]
    from megatron_minpro.data.sources import load_prompts

    source, _ = load_prompts(tokenizer=chain_tokenizer, **config.prompts.model_dump())
    trained = {text_of(source[index]) for index in range(5000)}
    assert trained.isdisjoint(map(text_of, prompts))


def text_of(prompt: Prompt) -> str:
    return prompt.text


def test_a_source_with_too_few_prompts_is_refused(chain_tokenizer: Any) -> None:
    config = evaluation("evaluation.num_prompts=20", "evaluation.prompts.options.size=10")
    with pytest.raises(ValueError, match=r"^evaluation\.num_prompts: 20, but .* has 10 prompts$"):
        held_out_prompts(config, chain_tokenizer)
