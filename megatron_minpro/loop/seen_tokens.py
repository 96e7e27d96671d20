"""What the objective sees of single tokens while it trains a mini-batch, kept for people to look at.

The responses of a few groups are marked by a stream of their own, which travels with them through packing and sharding: 0, or the number of
the response in the mini-batch, from 1. The loss function takes the marked tokens' values from the objective's own tensors. Each rank keeps
what it holds; rank 0 puts the parts together once the mini-batch is trained.

Shapes: T local packed tokens, N recorded tokens of this rank, V values of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.loop.collector import choose_groups
from megatron_minpro.objectives import ObjectiveOutput, TokenBatch
from megatron_minpro.tracking.token_records import CUT_NOT_TOLD, SEEN_DTYPES, RecordedResponse, TokenRecords
from parallel.token_sequence import TokenSequence

MARK = "recorded"  # the stream
Part = tuple[np.ndarray, np.ndarray]  # int64 [N, 2]: number of the response, logit position; float32 [N, V], in the order of SEEN_DTYPES


def recorded_groups(batch: RolloutBatch, num_groups: int) -> dict[str, int]:
    """Sample id -> group, of the groups that are recorded: the first whose rewards differ, and where these are too few the first others."""
    size = batch.group_size
    groups = [batch.samples[start : start + size] for start in range(0, len(batch.samples), size)]
    differ = [len({sample.reward for sample in group}) > 1 for group in groups]
    return {sample.sample_id: number for number in choose_groups(differ, num_groups) for sample in groups[number]}


@dataclass(frozen=True, kw_only=True)
class SeenTokens:
    """What the objective sees of the recorded responses of one mini-batch."""

    samples: Sequence[Sample]  # of the whole mini-batch
    groups: Mapping[str, int]  # sample id -> group, of those that are recorded
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of this rank, still on its device

    def mark(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """The mini-batch's sequences with the stream that marks them."""
        numbers = [number if sample.sample_id in self.groups else 0 for number, sample in enumerate(self.samples, start=1)]
        return [
            replace(sequence, streams={**sequence.streams, MARK: torch.full((sequence.num_positions,), float(number))})
            for sequence, number in zip(sequences, numbers, strict=True)
        ]

    def look(self, mark_T: Tensor, batch: TokenBatch, output: ObjectiveOutput, entropy_T: Tensor) -> None:
        """Keep the marked tokens of one micro-batch.

        Args:
            mark_T: the stream.
            batch: what the objective got.
            output: what it made of that.
            entropy_T: of the policy, in nats.
        """
        at_N = ((mark_T > 0) & batch.loss_mask_T).nonzero()[:, 0]
        not_told_T = torch.full_like(mark_T, math.nan)
        seen = {
            "logprobs": batch.logprobs_T,
            "prefix_min": not_told_T if output.prefix_min_T is None else output.prefix_min_T,
            "cumulative": not_told_T if output.cumulative_T is None else output.cumulative_T,
            "weights": output.weights_T,
            "entropy": entropy_T,
            "cut": torch.full_like(mark_T, CUT_NOT_TOLD) if output.cut_T is None else output.cut_T,
        }
        places_N2 = torch.stack([mark_T[at_N].long(), batch.shard.position_T[at_N]], dim=1)
        values_NV = torch.stack([seen[name].detach()[at_N].float() for name in SEEN_DTYPES], dim=1)
        self.parts.append((places_N2, values_NV))

    def gather(self, *, speaks: bool, group: dist.ProcessGroup) -> list[Part] | None:
        """Collective over `group`. All parts on rank 0, None elsewhere. speaks: of the actor; what other ranks hold are copies."""
        mine = [(places.cpu().numpy(), values.cpu().numpy()) for places, values in self.parts] if speaks else []
        everyone: list[list[Part]] | None = [[]] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
        dist.gather_object(mine, everyone, dst=0, group=group)
        return None if everyone is None else [part for parts in everyone for part in parts]

    def records(
        self, parts: Sequence[Part], *, batch: RolloutBatch, global_step: int, update: int, policy_version: int, objective: str
    ) -> TokenRecords:
        """Put the parts in the order of responses and tokens.

        Args:
            parts: of all ranks.
            batch: that the mini-batch is part of.
            global_step, update: of the mini-batch.
            policy_version: of the weights that met it.
            objective: its name.

        Raises:
            ValueError: a token is missing or came twice.
        """
        recorded = [(number, sample) for number, sample in enumerate(self.samples, start=1) if sample.sample_id in self.groups]
        samples = [sample for _, sample in recorded]
        places_N2, values_NV = (np.concatenate(column) for column in zip(*parts, strict=True))
        order_N = np.lexsort((places_N2[:, 1], places_N2[:, 0]))
        expected_N2 = np.concatenate(
            [
                np.stack([np.full(sample.num_response_tokens, number), sample.loss_mask[1:].nonzero()[:, 0].numpy()], axis=1)
                for number, sample in recorded
            ]
        )
        if not np.array_equal(places_N2[order_N], expected_N2):
            found, expected = len(places_N2), len(expected_N2)
            raise ValueError(f"step {global_step}, update {update}: {found} recorded tokens, expected each of {expected} once")
        seen = {name: values_NV[order_N, column].astype(dtype) for column, (name, dtype) in enumerate(SEEN_DTYPES.items())}
        return TokenRecords(
            global_step=global_step,
            update=update,
            policy_version=policy_version,
            sampled_at_step=batch.sampled_at_step,
            sampled_version=batch.policy_version,
            lag=policy_version - batch.policy_version,
            objective=objective,
            responses=tuple(_response(sample, self.groups[sample.sample_id]) for sample in samples),
            streams={**_sampled(samples), **seen},
        )


def _response(sample: Sample, group: int) -> RecordedResponse:
    return RecordedResponse(
        sample_id=sample.sample_id,
        group=group,
        num_tokens=len(sample.token_ids),
        num_response_tokens=sample.num_response_tokens,
        advantage=sample.advantage,
        reward=sample.reward,
        correct=sample.correct,
        finish_reason=sample.finish_reason,
        version_spans=tuple((span.policy_version, span.start, span.end) for span in sample.version_spans),
    )


def _sampled(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    assert all(sample.behaviour_logprobs is not None for sample in samples), "it was trained"
    return {
        "token_ids": torch.cat([sample.token_ids for sample in samples]).numpy(),
        "loss_mask": torch.cat([sample.loss_mask for sample in samples]).numpy().astype(np.uint8),
        "engine_logprobs": torch.cat([sample.engine_logprobs for sample in samples]).numpy(),
        "behaviour_logprobs": torch.cat([sample.behaviour_logprobs for sample in samples if sample.behaviour_logprobs is not None]).numpy(),
    }
