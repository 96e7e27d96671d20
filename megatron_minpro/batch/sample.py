"""A sampled response on its way from the server to the optimizer, and the batch it travels in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_minpro.batch.routing_file import RoutingFile
from megatron_minpro.batch.top_tokens_file import TopTokensFile
from parallel.token_sequence import TokenSequence
from parallel.top_tokens import TopTokens
from rollout.records import VersionSpan

# What a sample holds per token of the sequence, and per token that the model wrote. A scored response costs 13 bytes a token, and 4 more
# with correction weights or entropies: batches wait on every rank.
SEQUENCE_STREAMS = {"token_ids": torch.int32, "loss_mask": torch.bool}
RESPONSE_STREAMS = dict.fromkeys(("engine_logprobs", "behaviour_logprobs", "correction_weights", "behaviour_entropies"), torch.float32)
STREAMS = SEQUENCE_STREAMS | RESPONSE_STREAMS


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Sample:
    """One response to one prompt, which may be a conversation with tools.

    L tokens, of which the model wrote R; only these are trained. Tensors lie on the CPU and are never written to.

    Raises ValueError naming the sample and the field for a stream of another dtype or length.
    """

    sample_id: str
    token_ids: Tensor  # int32 [L], prompt first
    loss_mask: Tensor  # bool [L]: True for the R tokens that the model wrote
    engine_logprobs: Tensor  # fp32 [R], as the server scored its own tokens
    behaviour_logprobs: Tensor | None  # fp32 [R] under the weights that sampled them; None until scored
    version_spans: tuple[VersionSpan, ...]  # weights that sampled the R tokens; start and end count these alone
    finish_reason: str
    reward: float
    correct: bool
    advantage: float
    correction_weights: Tensor | None = None  # fp32 [R] for the server's different log-probs, of corrections.py; None: no correction
    behaviour_entropies: Tensor | None = None  # fp32 [R] of the distributions that were sampled from; None: the objective needs none

    def __post_init__(self) -> None:
        for name, dtype in STREAMS.items():
            stream = getattr(self, name)
            if stream is not None and (stream.dtype != dtype or stream.dim() != 1):
                raise ValueError(f"{self.sample_id}: {name} is {stream.dtype} {list(stream.shape)}, expected {dtype} with one axis")
        if len(self.loss_mask) != len(self.token_ids):
            raise ValueError(f"{self.sample_id}: loss_mask has {len(self.loss_mask)} entries for {len(self.token_ids)} tokens")
        num_response = int(self.loss_mask.sum())
        if not num_response or self.loss_mask[0]:
            raise ValueError(f"{self.sample_id}: loss_mask must be False for the first token and True for at least one other")
        for name in RESPONSE_STREAMS:
            values = getattr(self, name)
            if values is not None and len(values) != num_response:
                raise ValueError(f"{self.sample_id}: {len(values)} {name} for {num_response} response tokens")
        covered = [position for span in self.version_spans for position in (span.start, span.end)]
        if covered[:1] != [0] or covered[-1:] != [num_response] or covered[1:-1:2] != covered[2::2]:
            raise ValueError(f"{self.sample_id}: version_spans {covered} do not cover {num_response} response tokens one after the other")

    @property
    def num_response_tokens(self) -> int:
        """Tokens that the model wrote."""
        return len(self.engine_logprobs)

    @property
    def policy_versions(self) -> tuple[int, int]:
        """Oldest and newest weights used while decoding."""
        versions = [span.policy_version for span in self.version_spans]
        return min(versions), max(versions)

    def scored_with(self, logprobs: Tensor, entropies: Tensor | None = None) -> Sample:
        """Take behaviour log-probs from the trainer's scores of the whole sequence, fp32 [L - 1] on logit positions; and entropies."""
        scored = self._scored_positions()
        kept = None if entropies is None else entropies[scored]
        return replace(self, behaviour_logprobs=logprobs[scored], behaviour_entropies=kept)

    def sequence(self, experts: Tensor | None = None) -> TokenSequence:
        """The sequence alone, for scoring. experts: rows that the routers replay."""
        return TokenSequence(token_ids=self.token_ids.long(), loss_mask=self._scored_positions(), streams={}, experts=experts)

    def training_sequence(self, experts: Tensor | None = None, top: TopTokens | None = None) -> TokenSequence:
        """The sequence with what the objective needs. Raises ValueError when it was never scored (invariant: pi_old is the sampler).

        experts: rows that the routers replay. top: rows of the servers' most likely tokens, for score centering.
        """
        if self.behaviour_logprobs is None:
            raise ValueError(f"{self.sample_id}: behaviour_logprobs are missing; a batch is scored under its own weights before it waits")
        mask = self._scored_positions()
        streams = {"advantages": torch.where(mask, torch.tensor(self.advantage, dtype=torch.float32), torch.tensor(0.0))}
        for name in ("behaviour_logprobs", "correction_weights", "behaviour_entropies"):
            if (values := getattr(self, name)) is not None:
                streams[name] = torch.zeros(len(mask), dtype=torch.float32)
                streams[name][mask] = values
        return TokenSequence(token_ids=self.token_ids.long(), loss_mask=mask, streams=streams, experts=experts, top=top)

    def _scored_positions(self) -> Tensor:
        # Logit position p scores token p + 1, so the first token of an answer is scored by the position before it.
        return self.loss_mask[1:]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RolloutBatch:
    """All samples of one global step: groups of responses to one prompt, group_size each, group by group."""

    sampled_at_step: int
    policy_version: int  # optimizer steps behind the weights that sampled it
    group_size: int
    samples: tuple[Sample, ...]
    routing: RoutingFile | None = None  # the experts that its tokens visited, where they are replayed
    top_tokens: TopTokensFile | None = None  # the servers' most likely tokens, where scores are centred

    def __post_init__(self) -> None:
        if len(self.samples) % self.group_size:
            raise ValueError(f"{len(self.samples)} samples are not a whole number of groups of {self.group_size}")
        for sample in self.samples:
            if sample.policy_versions != (self.policy_version, self.policy_version):
                raise ValueError(
                    f"{sample.sample_id}: sampled under policy versions {sample.policy_versions}, expected {self.policy_version} throughout"
                )
            for name in ("correction_weights", "behaviour_entropies"):
                if (getattr(sample, name) is None) != (getattr(self.samples[0], name) is None):
                    raise ValueError(f"{sample.sample_id}: {name} must be there for all samples of a batch or for none")

    @property
    def files(self) -> list[str]:
        """Paths in the run folder of what goes with the batch and not in it."""
        return [file.path for file in (self.routing, self.top_tokens) if file is not None]

    @property
    def num_groups(self) -> int:
        return len(self.samples) // self.group_size

    @property
    def num_response_tokens(self) -> int:
        return sum(sample.num_response_tokens for sample in self.samples)

    def scored_with(self, logprobs: Sequence[Tensor], entropies: Sequence[Tensor] | None = None) -> RolloutBatch:
        """The same batch with the trainer's log-probs of every sample as behaviour log-probs, and with the trainer's entropies."""
        with_entropies = [None] * len(self.samples) if entropies is None else entropies
        scores = zip(self.samples, logprobs, with_entropies, strict=True)
        return replace(self, samples=tuple(sample.scored_with(x, entropy) for sample, x, entropy in scores))

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
