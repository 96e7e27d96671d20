"""Chunks of unequal length laid out in rows of one length, so that running minima of all rows are taken at once.

A row holds tokens of one chunk only; a chunk fills as many rows as it needs and its last one is padded. The row length is at most the mean
chunk length, so there are at most twice as many slots as tokens, however uneven the chunks are.

Shapes: T tokens, R rows of L slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LONGEST_ROW = 512


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """Where every token goes. Index T means `no token`, index R * L means `no slot`."""

    row_length: int  # L
    token_of_slot: Tensor  # int64 [R * L]
    previous_slot_T: Tensor  # int64 [T], slot of the token before this one in its chunk
    chunk_of_row: Tensor  # int64 [R]
    last_row_of_chunk: Tensor  # int64 [number of chunks]


def chunk_rows(chunk_lengths: Sequence[int], *, device: torch.device | str | None) -> ChunkRows:
    """Rows for chunks that lie one behind the other, each of at least one token."""
    lengths = torch.tensor(chunk_lengths, dtype=torch.int64)
    num_tokens = int(lengths.sum())
    row_length = min(_LONGEST_ROW, math.ceil(num_tokens / len(lengths)))
    rows = -(-lengths // row_length)
    last_row = rows.cumsum(0) - 1
    chunk_of_row = torch.arange(len(lengths)).repeat_interleave(rows)

    # Slots of a chunk start at the first slot of its first row, tokens of a chunk at its offset.
    first_slot = (last_row + 1 - rows) * row_length
    starts = lengths.cumsum(0) - lengths
    chunk_T = torch.arange(len(lengths)).repeat_interleave(lengths)
    slot_T = torch.arange(num_tokens) + (first_slot - starts).index_select(0, chunk_T)
    token_of_slot = torch.full((len(chunk_of_row) * row_length,), num_tokens)
    token_of_slot[slot_T] = torch.arange(num_tokens)
    previous_slot_T = slot_T - 1
    previous_slot_T[starts] = len(token_of_slot)
    return ChunkRows(
        row_length=row_length,
        token_of_slot=token_of_slot.to(device),
        previous_slot_T=previous_slot_T.to(device),
        chunk_of_row=chunk_of_row.to(device),
        last_row_of_chunk=last_row.to(device),
    )
