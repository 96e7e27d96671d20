"""A sampled response on its way from the server to the optimizer, and the batch it travels in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.packing import TokenSequence

# What a sample holds per token. 12 bytes a token once it is scored: batches wait on every rank.
STREAMS = {
    "token_ids": torch.int32,
    "engine_logprobs": torch.float32,
    "behaviour_logprobs": torch.float32,
    "correction_weights": torch.float32,
}


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Sample:
    """One response to one prompt. P prompt tokens, R response tokens. Tensors lie on the CPU and are never written to.

    Raises ValueError naming the sample and the field for a stream of another dtype or length.
    """

    sample_id: str
    token_ids: Tensor  # int32 [P + R]
    prompt_tokens: int
    engine_logprobs: Tensor  # fp32 [R], as the server scored its own tokens
    behaviour_logprobs: Tensor | None  # fp32 [R] under the weights that sampled them; None until scored
    policy_versions: tuple[int, int]  # oldest and newest weights used while decoding
    finish_reason: str
    reward: float
    correct: bool
    advantage: float
    correction_weights: Tensor | None = None  # fp32 [R] for the server's different log-probs, of corrections.py; None: no correction

    def __post_init__(self) -> None:
        for name, dtype in STREAMS.items():
            stream = getattr(self, name)
            if stream is not None and (stream.dtype != dtype or stream.dim() != 1):
                raise ValueError(f"{self.sample_id}: {name} is {stream.dtype} {list(stream.shape)}, expected {dtype} with one axis")
        num_response = len(self.token_ids) - self.prompt_tokens
        if self.prompt_tokens < 1 or num_response < 1:
            raise ValueError(
                f"{self.sample_id}: {self.prompt_tokens} prompt and {num_response} response tokens, expected at least 1 of each"
            )
        for name in ("engine_logprobs", "behaviour_logprobs", "correction_weights"):
            values = getattr(self, name)
            if values is not None and len(values) != num_response:
                raise ValueError(f"{self.sample_id}: {len(values)} {name} for {num_response} response tokens")

    @property
    def response_token_ids(self) -> Tensor:
        return self.token_ids[self.prompt_tokens :]

    def scored_with(self, logprobs: Tensor) -> Sample:
        """Take behaviour log-probs from the trainer's scores of the whole sequence, fp32 [P + R - 1] on logit positions."""
        # A copy: a view would keep the scores of all prompts of the batch alive.
        return replace(self, behaviour_logprobs=logprobs[self.prompt_tokens - 1 :].clone())

    def sequence(self) -> TokenSequence:
        """The sequence alone, for scoring."""
        return TokenSequence(token_ids=self.token_ids.long(), loss_mask=self._loss_mask(), streams={})

    def training_sequence(self) -> TokenSequence:
        """The sequence with what the objective needs. Raises ValueError when it was never scored (invariant: pi_old is the sampler)."""
        if self.behaviour_logprobs is None:
            raise ValueError(f"{self.sample_id}: behaviour_logprobs are missing; a batch is scored under its own weights before it waits")
        mask = self._loss_mask()
        behaviour = torch.zeros(len(mask), dtype=torch.float32)
        behaviour[mask] = self.behaviour_logprobs
        advantages = torch.where(mask, torch.tensor(self.advantage, dtype=torch.float32), torch.tensor(0.0))
        streams = {"behaviour_logprobs": behaviour, "advantages": advantages}
        if self.correction_weights is not None:
            streams["correction_weights"] = torch.zeros(len(mask), dtype=torch.float32)
            streams["correction_weights"][mask] = self.correction_weights
        return TokenSequence(token_ids=self.token_ids.long(), loss_mask=mask, streams=streams)

    def _loss_mask(self) -> Tensor:
        # Logit position p scores token p + 1, so the first response token is scored by the last prompt position.
        mask = torch.zeros(len(self.token_ids) - 1, dtype=torch.bool)
        mask[self.prompt_tokens - 1 :] = True
        return mask


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RolloutBatch:
    """All samples of one global step: groups of responses to one prompt, group_size each, group by group."""

    sampled_at_step: int
    policy_version: int  # optimizer steps behind the weights that sampled it
    group_size: int
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if len(self.samples) % self.group_size:
            raise ValueError(f"{len(self.samples)} samples are no whole number of groups of {self.group_size}")
        for sample in self.samples:
            if sample.policy_versions != (self.policy_version, self.policy_version):
                raise ValueError(
                    f"{sample.sample_id}: sampled under policy versions {sample.policy_versions}, expected {self.policy_version} throughout"
                )
            if (sample.correction_weights is None) != (self.samples[0].correction_weights is None):
                raise ValueError(f"{sample.sample_id}: correction_weights must be there for all samples of a batch or for none")

    @property
    def num_groups(self) -> int:
        return len(self.samples) // self.group_size

    @property
    def num_response_tokens(self) -> int:
        return sum(len(sample.token_ids) - sample.prompt_tokens for sample in self.samples)

    def scored_with(self, logprobs: Sequence[Tensor]) -> RolloutBatch:
        """The same batch with the trainer's log-probs of every sample as behaviour log-probs."""
        return replace(self, samples=tuple(sample.scored_with(x) for sample, x in zip(self.samples, logprobs, strict=True)))

    def scored_by_engine(self) -> RolloutBatch:
        """The same batch with the server's own log-probs as behaviour log-probs."""
        return replace(self, samples=tuple(replace(sample, behaviour_logprobs=sample.engine_logprobs) for sample in self.samples))

    def mini_batches(self, *, num_mini_batches: int, seed: int) -> list[list[Sample]]:
        """Deal whole groups out to equal mini-batches in a random order that seed and step fix.

        Raises ValueError when the groups cannot be shared equally.
        """
        if self.num_groups % num_mini_batches:
            raise ValueError(f"actor.updates_per_step: {num_mini_batches} does not divide {self.num_groups} prompts")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.sampled_at_step)
        order = torch.randperm(self.num_groups, generator=generator).tolist()
        per_batch = self.num_groups // num_mini_batches
        size = self.group_size
        return [
            [sample for group in order[i * per_batch : (i + 1) * per_batch] for sample in self.samples[group * size : (group + 1) * size]]
            for i in range(num_mini_batches)
        ]
