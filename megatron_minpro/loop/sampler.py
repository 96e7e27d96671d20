"""Everything between a prompt and a finished batch or measurement: it asks the servers and judges, and knows no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.config import RunConfig
from megatron_minpro.loop import held_out
from megatron_minpro.loop.collector import Collected, Collector
from megatron_minpro.loop.responder import Responder
from megatron_minpro.loop.sampled_batch import SampledBatch, sampled_batch
from megatron_minpro.tracking.rollout_log import RolloutLog, RolloutRecord


class Sampler(Protocol):
    """What rank 0 asks for batches. In a run it lives in another process, see run/sampling/."""

    def draw(self, step: int) -> None:
        """Draw the prompts of a batch that `collect` is to make. Where batches are made at the same time, this keeps their order."""
        ...

    def collect(self, step: int, *, policy_version: int) -> SampledBatch:
        """The batch of one global step. Raises RolloutFailed, WeightsMissing, and what environments and rewards raise."""
        ...

    def measure(self, *, policy_version: int) -> dict[str, float]:
        """Held-out pass@k. Raises as `collect`."""
        ...

    def example_tokens(self, num_prompts: int) -> list[tuple[int, ...]]:
        """Token ids of the first training prompts, at most num_prompts. Deals none out."""
        ...

    def close(self) -> None:
        """End what it owns, such as graders."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalSampler:
    """A sampler in this process."""

    config: RunConfig
    collector: Collector
    responder: Responder
    held_out_prompts: Sequence[Prompt]
    rollouts: RolloutLog | None  # for people to read

    def draw(self, step: int) -> None:
        """See Sampler."""
        self.collector.draw(step)

    def collect(self, step: int, *, policy_version: int) -> SampledBatch:
        """See Sampler."""
        collected = self.collector.collect(step, policy_version=policy_version)
        if self.rollouts is not None:
            self.rollouts.write(step, _records(collected))
        return sampled_batch(collected, dynamic_sampling=self.config.rollout.dynamic_sampling is not None)

    def measure(self, *, policy_version: int) -> dict[str, float]:
        """See Sampler."""
        assert self.config.evaluation is not None
        return held_out.measure(
            self.held_out_prompts,
            self.config.evaluation,
            responder=self.responder,
            max_new_tokens=self.config.rollout.max_new_tokens,
            seed=self.config.seed,
            policy_version=policy_version,
        )

    def example_tokens(self, num_prompts: int) -> list[tuple[int, ...]]:
        """See Sampler."""
        return [prompt.token_ids for prompt in self.collector.cursor.examples(num_prompts)]

    def close(self) -> None:
        """See Sampler."""
        self.responder.reward.close()
        self.responder.client.close()


def _records(collected: Collected) -> list[RolloutRecord]:
    num_trained = len(collected.batch.samples)
    samples = (*collected.batch.samples, *collected.dropped)
    return [
        RolloutRecord(
            sample_id=sample.sample_id,
            group=number // collected.batch.group_size if number < num_trained else None,
            prompt_id=conversation.prompt.prompt_id,
            prompt=conversation.prompt.text,
            response=conversation.text,
            answer=conversation.prompt.answer,
            extracted=result.extracted,
            error=result.error,
            reward=result.reward,
            advantage=sample.advantage,
            policy_version=sample.policy_versions[1],
            finish_reason=sample.finish_reason,
            num_response_tokens=sample.num_response_tokens,
            dropped=None if number < num_trained else "dynamic sampling: its group's responses are all equal",
        )
        for number, ((conversation, result), sample) in enumerate(zip(collected.judged, samples, strict=True))
    ]
