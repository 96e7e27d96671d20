"""Attention of packed sequences without any mask: torch's variable-length flash attention on CUDA (compute capability 8.0, 16-bit heads).

A zigzag chunk of a sequence attends to that sequence's beginning, up to the chunk's own end. So every local chunk is a piece of its own
whose keys are a prefix, and the kernel's causal order, aligned at the last key (bottom right), is the right one. On a CPU a reference
with the same signature runs, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.sequence_shard import SequenceShard

CAUSAL = (-1, 0)  # keys to the left without end, none to the right


@dataclass(frozen=True)
class VarlenPieces:
    """One piece for every local chunk, in the order of the local tokens.

    cu_queries, cu_keys: int32 offsets of the pieces. key_index: which of the gathered keys, in rank order, the pieces read one after the
    other; None where these are all keys in their order.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    key_index: Tensor | None

    @classmethod
    def of(cls, shard: SequenceShard) -> VarlenPieces:
        """Planned on the host, where all lengths are known: nothing waits for the device."""
        chunk_lengths = [length // shard.num_chunks for length in shard.padded_lengths for _ in shard.chunk_indices]
        prefixes = [length // shard.num_chunks * (chunk + 1) for length in shard.padded_lengths for chunk in shard.chunk_indices]
        return cls(
            cu_queries=_offsets(chunk_lengths, shard.device),
            cu_keys=_offsets(prefixes, shard.device),
            longest_query=max(chunk_lengths),
            longest_key=max(prefixes),
            key_index=None if shard.cp_size == 1 else _key_index(shard).to(shard.device, non_blocking=True),
        )


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _key_index(shard: SequenceShard) -> Tensor:
    """Chunk j of a sequence lies on rank j, or on rank 2 * cp - 1 - j as its second chunk there."""
    local_tokens = sum(shard.padded_lengths) // shard.cp_size
    found, start = [], 0
    for length in shard.padded_lengths:
        chunk_length = length // shard.num_chunks
        chunks = [
            torch.arange(chunk_length) + rank * local_tokens + start + second * chunk_length
            for rank, second in [*((rank, 0) for rank in range(shard.cp_size)), *((rank, 1) for rank in reversed(range(shard.cp_size)))]
        ]
        found += [each for last in shard.chunk_indices for each in chunks[: last + 1]]
        start += 2 * chunk_length
    return torch.cat(found)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, pieces: VarlenPieces, *, scale: float) -> Tensor:
    """Causal attention inside every sequence: query [T, heads, size], keys and values of all ranks in rank order -> [T, heads, size].

    A key that two chunks of this rank read gets two gradients, whose sum does not depend on their order.
    """
    if pieces.key_index is not None:
        key, value = (x.index_select(0, pieces.key_index) for x in (key, value))
    out = _operator(query)(
        query,
        key,
        value,
        pieces.cu_queries,
        pieces.cu_keys,
        pieces.longest_query,
        pieces.longest_key,
        scale=scale,
        window_size=CAUSAL,
        enable_gqa=query.size(1) != key.size(1),
    )
    assert isinstance(out, Tensor)
    return out


def _operator(query: Tensor) -> Callable[..., Any]:
    if not query.is_cuda:
        return reference_varlen_attn
    from torch.nn.attention.varlen import varlen_attn  # imports torch.compile, 0.3 s that a process on a CPU does without

    return varlen_attn


def reference_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `varlen_attn` computes on CUDA, on any device: one piece at a time, with a mask of one piece's queries and keys."""
    assert window_size == CAUSAL, window_size
    lengths_q, lengths_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    pieces = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    return torch.cat([_attend(q, k, v, scale=scale, enable_gqa=enable_gqa) for q, k, v in pieces])


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, enable_gqa: bool) -> Tensor:
    """One piece, [tokens, heads, size]: the last query sees all keys, each one before it one key less."""
    hidden = len(key) - len(query)
    mask = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(hidden) if hidden else None
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1)
