"""Attention of packed sequences in grids: what a CPU computes, and CUDA in fp32, where torch has no variable-length kernel.

Sequences of similar length are laid side by side in a [sequences, longest] grid so that torch's causal kernel does the work, and nothing of
size T x T exists. Under context parallelism the gathered keys are masked by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.sequence_shard import SequenceShard


@dataclass(frozen=True)
class _Grid:
    """Some sequences side by side in a [sequences, width] grid, out of T packed tokens.

    token_G: which packed tokens are in it. slot_G: their flat slots. position_SW: position in every slot, -1 where empty.
    is_view: all packed tokens in their order, no slot empty (sequences of equal length): nothing has to move.
    """

    token_G: Tensor
    slot_G: Tensor
    position_SW: Tensor
    is_view: bool

    @classmethod
    def of(cls, sequence_id_T: Tensor, position_T: Tensor, sequences: Tensor) -> _Grid:
        """The grid of the sequences with the ids in `sequences`, one row each. Tokens keep their order of arrival (zigzag: two pieces)."""
        row_of = torch.full((int(sequences.max()) + 1,), -1, dtype=torch.int64, device=sequence_id_T.device)
        row_of[sequences] = torch.arange(len(sequences), device=sequence_id_T.device)
        in_range_T = sequence_id_T < len(row_of)
        row_T = torch.where(in_range_T, row_of[sequence_id_T.clamp(max=len(row_of) - 1)], -1)
        token_G = (row_T >= 0).nonzero()[:, 0]
        row_G = row_T[token_G]
        order = torch.argsort(row_G, stable=True)
        counts = torch.bincount(row_G, minlength=len(sequences))
        starts = torch.cumsum(counts, 0) - counts
        column_G = torch.empty_like(row_G)
        column_G[order] = torch.arange(len(order), device=order.device) - starts[row_G[order]]
        width = int(counts.max())
        slot_G = row_G * width + column_G
        position_SW = torch.full((len(sequences) * width,), -1, device=slot_G.device, dtype=position_T.dtype)
        position_SW[slot_G] = position_T[token_G]
        is_view = len(slot_G) == len(position_SW) == len(position_T) and bool((slot_G == token_G).all())
        return cls(token_G=token_G, slot_G=slot_G, position_SW=position_SW.view(len(sequences), width), is_view=is_view)

    def to(self, device: torch.device) -> _Grid:
        """The same grid with its tensors on `device`."""
        token_G, slot_G, position_SW = (x.to(device, non_blocking=True) for x in (self.token_G, self.slot_G, self.position_SW))
        return _Grid(token_G, slot_G, position_SW, self.is_view)

    def spread(self, x_THD: Tensor) -> Tensor:
        """[T, heads, size] -> [sequences, heads, width, size]; empty slots are zero."""
        num_sequences, width = self.position_SW.shape
        if self.is_view:
            return x_THD.unflatten(0, (num_sequences, width)).transpose(1, 2)
        chosen = x_THD if len(self.token_G) == len(x_THD) else x_THD.index_select(0, self.token_G)
        flat = x_THD.new_zeros((num_sequences * width, *x_THD.shape[1:])).index_copy(0, self.slot_G, chosen)
        return flat.view(num_sequences, width, *x_THD.shape[1:]).transpose(1, 2)

    def collect(self, x_SHWD: Tensor) -> Tensor:
        """[sequences, heads, width, size] -> the grid's tokens [G, heads, size]."""
        flat = x_SHWD.transpose(1, 2).flatten(0, 1)
        return flat if self.is_view else flat.index_select(0, self.slot_G)


@dataclass(frozen=True)
class GridBlock:
    """The sequences of one length class: this rank's queries, all ranks' keys, and who may see whom.

    mask: [sequences, 1, query width, key width], 0 or -inf, added to the scores; None without context parallelism, where one rank holds
    positions 0, 1, 2, ... in order, empty slots last: plain causal order.
    """

    queries: _Grid
    keys: _Grid
    mask: Tensor | None

    @classmethod
    def of(cls, queries: _Grid, keys: _Grid, *, dtype: torch.dtype) -> GridBlock:
        allowed = queries.position_SW[:, :, None] >= keys.position_SW[:, None, :]
        allowed &= keys.position_SW[:, None, :] >= 0
        # An empty query slot must attend to something, or softmax gives NaN that backward would spread.
        allowed |= (queries.position_SW < 0)[:, :, None]
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)
        return cls(queries, keys, mask[:, None])


def length_classes(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences that share a grid, by index. One class while padding to the longest at most doubles the tokens; else by power of two.

    A response of 20,000 tokens packed with twenty of 1,000 would otherwise cost twenty times its attention.
    """
    if len(lengths) * max(lengths) <= 2 * sum(lengths):
        return [list(range(len(lengths)))]
    classes: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        classes.setdefault((length - 1).bit_length(), []).append(index)
    return [classes[key] for key in sorted(classes)]


def grid_blocks(shard: SequenceShard, *, dtype: torch.dtype) -> list[GridBlock]:
    """One for each length class, of this rank's queries and the keys of all context-parallel ranks in rank order.

    Planned on the host, where all lengths are known: on CUDA nothing waits for the device.
    dtype: of the masks, which is the queries'; torch would convert others anew in every layer.
    """
    ranks = [SequenceShard.zigzag(shard.padded_lengths, rank, shard.cp_size, None) for rank in range(shard.cp_size)]
    mine = ranks[shard.cp_rank]
    key_ids = torch.cat([rank.sequence_id_T for rank in ranks])
    key_positions = torch.cat([rank.position_T for rank in ranks])
    blocks = []
    for indices in length_classes(shard.padded_lengths):
        sequences = torch.tensor(indices)
        queries = _Grid.of(mine.sequence_id_T, mine.position_T, sequences)
        if shard.cp_size == 1:
            queries = queries.to(shard.device)
            blocks.append(GridBlock(queries, queries, None))
        else:
            keys = _Grid.of(key_ids, key_positions, sequences)
            blocks.append(GridBlock.of(queries.to(shard.device), keys.to(shard.device), dtype=dtype))
    return blocks


def attend_in_grids(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[GridBlock], *, scale: float) -> Tensor:
    """Causal attention inside every sequence: query [T, heads, size], keys of all ranks -> [T, heads, size]."""
    parts = [_attend(query, key, value, block, scale) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    place_T = torch.argsort(torch.cat([block.queries.token_G for block in blocks]))
    return torch.cat(parts).index_select(0, place_T)


def _attend(query: Tensor, key: Tensor, value: Tensor, block: GridBlock, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(
        block.queries.spread(query),
        block.keys.spread(key),
        block.keys.spread(value),
        attn_mask=block.mask,
        is_causal=block.mask is None,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return block.queries.collect(out)
