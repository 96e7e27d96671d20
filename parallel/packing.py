"""From sequences to packed micro-batches: which rank trains what, in how many pieces, and what a rank holds of it.

Labels are shifted before anything is sharded: a sequence of L tokens is fed as its first L-1 tokens and labelled with its last L-1.
Every per-token stream lives on these L-1 logit positions.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from checkpoints_convert.mapping import Architecture
from parallel.layers.attention import ShardedPackedSeqParams
from parallel.layout import ParallelLayout
from parallel.routing_replay import RoutingPass
from parallel.sequence_shard import SequenceShard
from parallel.token_sequence import TokenSequence
from parallel.top_tokens import PackedTopTokens, TopTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """This rank's part of some packed sequences. T: local tokens, padding included."""

    indices: tuple[int, ...]  # which sequences of the mini-batch, in packing order; a sequence of padding may follow them
    shard: SequenceShard
    packed_seq_params: ShardedPackedSeqParams
    token_ids_T: Int64[Tensor, " T"]
    labels_T: Int64[Tensor, " T"]
    loss_mask_T: Bool[Tensor, " T"]
    streams: Mapping[str, Float32[Tensor, " T"]]
    top: PackedTopTokens | None = None  # read by the last stage's loss alone


def check_sequences(sequences: Sequence[TokenSequence], *, vocab_size: int) -> None:
    """Refuse what would go wrong on some rank only, or nowhere visibly. Every rank holds all sequences, so all refuse together.

    Raises ValueError naming the sequence, by its index: no sequence at all, streams that others have and it lacks, a token outside the
    vocabulary, a NaN or infinity in a stream where loss_mask is True, another number of top tokens.
    """
    if not sequences:
        raise ValueError("sequences: none, expected at least one")
    names = sorted(sequences[0].streams)
    for index, sequence in enumerate(sequences):
        if sorted(sequence.streams) != names:
            raise ValueError(f"sequence {index}: streams {sorted(sequence.streams)}, expected {names} as in sequence 0")
        if (top_k := _top_k(sequence)) != _top_k(sequences[0]):
            raise ValueError(f"sequence {index}: {top_k} top tokens, expected {_top_k(sequences[0])} as in sequence 0")
        lowest, highest = (int(x) for x in sequence.token_ids.aminmax())
        if lowest < 0 or highest >= vocab_size:
            outside = lowest if lowest < 0 else highest
            raise ValueError(f"sequence {index}: token_ids holds {outside}, expected 0 to {vocab_size - 1}")
        for name, stream in sequence.streams.items():
            wrong = sequence.loss_mask & ~stream.isfinite()
            if wrong.any():
                at = int(wrong.nonzero()[0, 0])
                raise ValueError(f"sequence {index}: {name} is {float(stream[at])} at position {at}, where loss_mask is True")


def _top_k(sequence: TokenSequence) -> int:
    return 0 if sequence.top is None else sequence.top.top_k


def break_even_tokens(architecture: Architecture) -> float:
    """Length at which causal attention costs as many multiplications as everything else of the model together.

    Per token and layer a forward pass multiplies each active weight once, and attention heads * head_dim * length times (scores and
    values, half of the square each). The output layer counts 4/3: its logits are computed again in backward (`logprobs.py`).
    """
    a = architecture
    attention = a.hidden_size * a.head_dim * (2 * a.num_attention_heads + 2 * a.num_key_value_heads)
    if a.num_experts is None:
        mlp = 3 * a.hidden_size * a.intermediate_size
    else:
        assert a.num_experts_per_tok is not None and a.moe_intermediate_size is not None
        mlp = a.hidden_size * (a.num_experts + 3 * a.num_experts_per_tok * a.moe_intermediate_size)
    head = 4 / 3 * a.hidden_size * a.vocab_size / a.num_hidden_layers
    return (attention + mlp + head) / (a.num_attention_heads * a.head_dim)


def compute_cost(length: int, *, break_even: float) -> float:
    """Relative cost of a sequence of `length` positions: linear in it, plus attention's square. See `break_even_tokens`."""
    return length * (1 + length / break_even)


def split_over_replicas(costs: Sequence[float], *, num_replicas: int) -> list[list[int]]:
    """Share sequences among data-parallel replicas so that their compute is even. Deterministic.

    costs: one per sequence, in any unit. Most expensive first onto the least loaded replica (Graham, 1969: at most 4/3 of the optimum).
    """
    loads = [(0.0, replica) for replica in range(num_replicas)]  # a heap
    replicas: list[list[int]] = [[] for _ in range(num_replicas)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, target = loads[0]
        replicas[target].append(index)
        heapq.heapreplace(loads, (load + costs[index], target))
    return replicas


def plan_micro_batches(indices: Sequence[int], lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group `indices` so that no group exceeds max_tokens positions. Deterministic; first-fit decreasing (Johnson, 1973).

    The first group with room is found in a tree whose leaves are the groups' rooms and whose nodes hold the larger one below: S sequences
    take S log S steps. Groups that are not begun have all their room, so they are found last.

    Raises ValueError with the index and length of a sequence longer than max_tokens.
    """
    num_leaves = 1 << max(0, len(indices) - 1).bit_length()
    room = [max_tokens] * (2 * num_leaves)  # node i has the children 2 i and 2 i + 1; the leaves come last
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if lengths[index] > max_tokens:
            raise ValueError(
                f"actor.max_tokens_per_micro_batch: {max_tokens} is less than sequence {index} with {lengths[index]} positions"
            )
        node = 1
        while node < num_leaves:
            node = 2 * node + (room[2 * node] < lengths[index])
        if node - num_leaves == len(groups):
            groups.append([])
        groups[node - num_leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return groups


def plan_replicas(lengths: Sequence[int], layout: ParallelLayout, *, max_tokens: int, break_even: float) -> list[list[list[int]]]:
    """Micro-batches of every replica, [dp][micro-batch][index]; all replicas get the same number (some may be empty lists).

    Replicas are balanced by compute, micro-batches filled by tokens. The most expensive micro-batch of each replica comes first: experts
    exchange tokens between replicas in every layer, so the n-th micro-batches of all replicas wait for each other.
    Expert parallelism and pipelines need equal counts on all ranks; the interleaved pipeline needs a multiple of pp.
    max_tokens: positions of one packed micro-batch over all its context-parallel ranks, padding included.
    break_even: see `break_even_tokens`.
    """
    multiple = layout.sequence_multiple
    padded = [-(-length // multiple) * multiple for length in lengths]
    costs = [compute_cost(length, break_even=break_even) for length in padded]
    replicas = split_over_replicas(costs, num_replicas=layout.dp)
    plans = [plan_micro_batches(indices, padded, max_tokens=max_tokens) for indices in replicas]
    for plan in plans:
        plan.sort(key=lambda group: -sum(costs[index] for index in group))
    count = max(1, *(len(plan) for plan in plans))
    if layout.vpp is not None:
        count = -(-count // layout.pp) * layout.pp
    return [plan + [[] for _ in range(count - len(plan))] for plan in plans]


def common_sizes(plans: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], layout: ParallelLayout) -> list[int]:
    """The most positions, padding included, that any replica has in its n-th micro-batch. plans: of `plan_replicas`."""
    multiple = layout.sequence_multiple
    return [
        max(sum(-(-lengths[index] // multiple) * multiple for index in group) for group in groups) for groups in zip(*plans, strict=True)
    ]


def build_micro_batch(
    sequences: Sequence[TokenSequence],
    indices: Sequence[int],
    layout: ParallelLayout,
    *,
    cp_group: dist.ProcessGroup,
    device: torch.device,
    fill_to: int = 0,
    routing: RoutingPass | None = None,
) -> MicroBatch:
    """Pack the sequences at `indices` and keep what this context-parallel rank holds of them. sequences: the whole mini-batch.

    All of it happens on the host and is then sent to the device, without a wait.

    An empty `indices` gives a micro-batch of padding alone, so that this rank can take part in collectives.
    fill_to: add a masked sequence where there are fewer positions than this (over all context-parallel ranks).
    routing: what the pass replays or records of the routers' choices; None: nothing.
    """
    chosen = [sequences[i] for i in indices]
    multiple = layout.sequence_multiple
    missing = fill_to - sum(-(-sequence.num_positions // multiple) * multiple for sequence in chosen)
    if missing > 0 or not chosen:
        chosen.append(_padding_like(sequences[0], num_positions=max(1, missing)))
    lengths = [sequence.num_positions for sequence in chosen]
    shard = SequenceShard.zigzag(lengths, cp_group.rank(), layout.cp, cp_group, multiple_of=multiple)
    streams = {name: shard.local([sequence.streams[name] for sequence in chosen], fill=0.0) for name in chosen[0].streams}
    weights = [1 / len(sequences)] * len(indices) + [0.0] * (len(chosen) - len(indices))
    token_ids_T = shard.local([sequence.token_ids[:-1] for sequence in chosen], fill=0)
    labels_T = shard.local([sequence.token_ids[1:] for sequence in chosen], fill=0)
    loss_mask_T = shard.local([sequence.loss_mask for sequence in chosen], fill=False)
    tops = [sequence.top for sequence in chosen if sequence.top is not None]  # of all sequences or of none
    top = PackedTopTokens.of(tops, [sequence.loss_mask for sequence in chosen], shard, loss_mask_T) if tops else None

    micro_batch_routing = None if routing is None else routing.micro_batch(indices, [sequences[i].experts for i in indices], shard)

    def move(x_T: Tensor) -> Tensor:
        return x_T.to(device, non_blocking=True)

    shard = shard.to(device)
    return MicroBatch(
        indices=tuple(indices),
        shard=shard,
        packed_seq_params=ShardedPackedSeqParams.from_shard(shard, sequence_weights=tuple(weights), routing=micro_batch_routing),
        token_ids_T=move(token_ids_T),
        labels_T=move(labels_T),
        loss_mask_T=move(loss_mask_T),
        streams={name: move(x_T) for name, x_T in streams.items()},
        top=top,
    )


def _padding_like(sequence: TokenSequence, *, num_positions: int) -> TokenSequence:
    return TokenSequence(
        token_ids=torch.zeros(num_positions + 1, dtype=torch.int64),
        loss_mask=torch.zeros(num_positions, dtype=torch.bool),
        streams={name: torch.zeros(num_positions) for name in sequence.streams},
        # Without a row, but as wide: all ranks then report the same metrics.
        top=None if sequence.top is None else TopTokens(ids=sequence.top.ids[:0], logprobs=sequence.top.logprobs[:0]),
    )
