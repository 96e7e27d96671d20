"""From sequences to packed micro-batches: which rank trains what, in how many pieces, and what a rank holds of it.

A sequence of L tokens is fed as its first L-1 tokens and labelled with its last L-1: labels are shifted before anything is
sharded. Every per-token stream lives on these L-1 logit positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.attention import ShardedPackedSeqParams
from parallel.layout import ParallelLayout
from parallel.sequence_shard import SequenceShard


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One sequence with what the loss needs of it. All streams lie on logit positions: entry p belongs to token p+1."""

    token_ids: Tensor  # int64 [L]
    loss_mask: Tensor  # bool [L-1]
    streams: Mapping[str, Tensor]  # fp32 [L-1] each

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        if length < 2:
            raise ValueError(f"token_ids: a sequence needs at least 2 tokens, this one has {length}")
        for name, stream in {"loss_mask": self.loss_mask, **self.streams}.items():
            if stream.shape != (length - 1,):
                raise ValueError(f"{name}: shape {tuple(stream.shape)}, expected ({length - 1},) for {length} tokens")
        if self.loss_mask.dtype != torch.bool:
            raise ValueError(f"loss_mask: dtype {self.loss_mask.dtype}, expected torch.bool")
        for name, stream in self.streams.items():
            if stream.dtype != torch.float32:
                raise ValueError(f"{name}: dtype {stream.dtype}, expected torch.float32")

    @property
    def num_positions(self) -> int:
        return len(self.token_ids) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """This rank's part of some packed sequences. T: local tokens, padding included."""

    indices: tuple[int, ...]  # which sequences of the mini-batch, in packing order
    shard: SequenceShard
    packed_seq_params: ShardedPackedSeqParams
    token_ids_T: Tensor
    labels_T: Tensor
    loss_mask_T: Tensor
    streams: Mapping[str, Tensor]


def split_over_replicas(lengths: Sequence[int], *, num_replicas: int) -> list[list[int]]:
    """Share sequences among data-parallel replicas so that their compute is even. Deterministic.

    lengths: positions per sequence. The cost of a sequence is taken as its length (matrix products dominate until lengths
    far beyond the hidden size). Longest first onto the least loaded replica (Graham, 1969).
    """
    load = [0] * num_replicas
    replicas: list[list[int]] = [[] for _ in range(num_replicas)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min(range(num_replicas), key=lambda r: (load[r], r))
        replicas[target].append(index)
        load[target] += lengths[index]
    return replicas


def plan_micro_batches(indices: Sequence[int], lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group `indices` so that no group exceeds max_tokens positions. Deterministic; first-fit decreasing (Johnson, 1973).

    Raises ValueError with the index and length of a sequence longer than max_tokens.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if lengths[index] > max_tokens:
            raise ValueError(
                f"actor.max_tokens_per_micro_batch: {max_tokens} is less than sequence {index} with {lengths[index]} positions"
            )
        place = next((g for g, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            groups.append([])
            room.append(max_tokens)
            place = len(groups) - 1
        groups[place].append(index)
        room[place] -= lengths[index]
    return groups


def plan_replicas(lengths: Sequence[int], layout: ParallelLayout, *, max_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of every replica, [dp][micro-batch][index]; all replicas get the same number (some may be empty lists).

    Expert parallelism and pipelines need equal counts on all ranks; the interleaved pipeline needs a multiple of pp.
    max_tokens: positions of one packed micro-batch over all its context-parallel ranks, padding included.
    """
    multiple = layout.sequence_multiple
    padded = [-(-length // multiple) * multiple for length in lengths]
    replicas = split_over_replicas(padded, num_replicas=layout.dp)
    plans = [plan_micro_batches(indices, padded, max_tokens=max_tokens) for indices in replicas]
    count = max(1, *(len(plan) for plan in plans))
    if layout.vpp is not None:
        count = -(-count // layout.pp) * layout.pp
    return [plan + [[] for _ in range(count - len(plan))] for plan in plans]


def build_micro_batch(
    sequences: Sequence[TokenSequence], indices: Sequence[int], layout: ParallelLayout, *, cp_group: dist.ProcessGroup, device: torch.device
) -> MicroBatch:
    """Pack the sequences at `indices` and keep what this context-parallel rank holds of them.

    An empty `indices` gives a micro-batch of padding alone, so that this rank can take part in collectives.
    """
    chosen = [sequences[i] for i in indices] or [_padding_like(sequences[0])]
    lengths = [sequence.num_positions for sequence in chosen]
    shard = SequenceShard.zigzag(lengths, cp_group.rank(), layout.cp, cp_group, multiple_of=layout.sequence_multiple, device=device)
    streams = {name: shard.local([sequence.streams[name].to(device) for sequence in chosen], fill=0.0) for name in chosen[0].streams}
    return MicroBatch(
        indices=tuple(indices),
        shard=shard,
        packed_seq_params=ShardedPackedSeqParams.from_shard(shard),
        token_ids_T=shard.local([sequence.token_ids[:-1].to(device) for sequence in chosen], fill=0),
        labels_T=shard.local([sequence.token_ids[1:].to(device) for sequence in chosen], fill=0),
        loss_mask_T=shard.local([sequence.loss_mask.to(device) for sequence in chosen], fill=False),
        streams=streams,
    )


def _padding_like(sequence: TokenSequence) -> TokenSequence:
    return TokenSequence(
        token_ids=torch.zeros(2, dtype=torch.int64),
        loss_mask=torch.zeros(1, dtype=torch.bool),
        streams={name: torch.zeros(1) for name in sequence.streams},
    )
