"""Core attention for packed sequences, where TransformerEngine is absent.

Tokens arrive packed, [T, heads, head_size]; each sequence attends to itself only. Sequences are laid side by side in a
[sequences, longest] grid so that torch's causal kernel does the work, and nothing of size T x T exists. Under context
parallelism keys and values are gathered over the ranks of the group (backward: reduce-scatter) and masked by position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.mcore import PackedSeqParams, TransformerConfig, parallel_state
from parallel.sequence_shard import SequenceShard


@dataclass(frozen=True)
class _Grid:
    """Where packed tokens lie in a [sequences, width] grid: flat slot of every token, and position of every slot (-1: empty)."""

    slot_T: Tensor
    position_SW: Tensor

    @classmethod
    def of(cls, sequence_id_T: Tensor, position_T: Tensor, num_sequences: int) -> _Grid:
        # Tokens of one sequence may come in several pieces (zigzag): number them in order of arrival.
        order = torch.argsort(sequence_id_T, stable=True)
        counts = torch.bincount(sequence_id_T, minlength=num_sequences)
        starts = torch.cumsum(counts, 0) - counts
        column_T = torch.empty_like(sequence_id_T)
        column_T[order] = torch.arange(len(order), device=order.device) - starts[sequence_id_T[order]]
        width = int(counts.max())
        slot_T = sequence_id_T * width + column_T
        position_SW = torch.full((num_sequences * width,), -1, device=slot_T.device, dtype=position_T.dtype)
        position_SW[slot_T] = position_T
        return cls(slot_T=slot_T, position_SW=position_SW.view(num_sequences, width))

    def spread(self, x_THD: Tensor) -> Tensor:
        """[T, heads, size] -> [sequences, heads, width, size]; empty slots are zero."""
        num_sequences, width = self.position_SW.shape
        flat = x_THD.new_zeros((num_sequences * width, *x_THD.shape[1:])).index_copy(0, self.slot_T, x_THD)
        return flat.view(num_sequences, width, *x_THD.shape[1:]).transpose(1, 2)

    def collect(self, x_SHWD: Tensor) -> Tensor:
        """Inverse of spread."""
        return x_SHWD.transpose(1, 2).flatten(0, 1).index_select(0, self.slot_T)


@dataclass
class ShardedPackedSeqParams(PackedSeqParams):
    """Megatron's packed-sequence record, plus the shard it was made from. Grids are built once and shared by all layers."""

    shard: SequenceShard | None = None
    _grids: tuple[_Grid, _Grid] | None = field(default=None, repr=False)

    @classmethod
    def from_shard(cls, shard: SequenceShard) -> ShardedPackedSeqParams:
        return cls(
            qkv_format="thd",
            cu_seqlens_q=shard.cu_seqlens,
            cu_seqlens_kv=shard.cu_seqlens,
            cu_seqlens_q_padded=shard.cu_seqlens,
            cu_seqlens_kv_padded=shard.cu_seqlens,
            max_seqlen_q=shard.max_seqlen,
            max_seqlen_kv=shard.max_seqlen,
            shard=shard,
        )

    def grids(self) -> tuple[_Grid, _Grid]:
        """Grid of this rank's queries, grid of all ranks' keys (the same one without context parallelism)."""
        if self._grids is None:
            shard = self.shard
            assert shard is not None
            queries = _Grid.of(shard.sequence_id_T, shard.position_T, shard.num_sequences)
            keys = queries
            if shard.cp_size > 1:
                ranks = [
                    SequenceShard.zigzag(shard.padded_lengths, rank, shard.cp_size, None, device=shard.device)
                    for rank in range(shard.cp_size)
                ]
                keys = _Grid.of(
                    torch.cat([other.sequence_id_T for other in ranks]),
                    torch.cat([other.position_T for other in ranks]),
                    shard.num_sequences,
                )
            self._grids = (queries, keys)
        return self._grids


class _GatherOverContext(torch.autograd.Function):
    """[T_local, ...] -> [cp * T_local, ...] in rank order; backward reduce-scatters the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty((group.size() * x.size(0), *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        local = grad.new_empty((grad.size(0) // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None


class PackedAttention(torch.nn.Module):
    """Drop-in `core_attention`: causal self-attention of packed sequences, grouped queries, context parallel."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.cp_group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: ShardedPackedSeqParams | None = None, **__: Any
    ) -> Tensor:
        """query [T, heads, size], key and value [T, key-value heads, size] -> [T, 1, heads * size]."""
        assert isinstance(packed_seq_params, ShardedPackedSeqParams), "this project trains packed sequences only"
        # Megatron hands [T, 1, heads, size] or [T, heads, size] depending on whether rotary embedding ran on packed data.
        query, key, value = (x.squeeze(1) if x.dim() == 4 else x for x in (query, key, value))
        query_grid, key_grid = packed_seq_params.grids()
        if self.cp_group.size() > 1:
            gathered = _GatherOverContext.apply(torch.cat([key, value], dim=-1), self.cp_group)
            key, value = gathered.split([key.size(-1), value.size(-1)], dim=-1)
            allowed = query_grid.position_SW[:, :, None] >= key_grid.position_SW[:, None, :]
            allowed &= key_grid.position_SW[:, None, :] >= 0
            # An empty query slot must attend to something, or softmax gives NaN that backward would spread.
            mask = (allowed | (query_grid.position_SW < 0)[:, :, None])[:, None]
        else:
            mask = None  # one rank holds positions 0, 1, 2, ... in order, empty slots last: plain causal order
        out = F.scaled_dot_product_attention(
            query_grid.spread(query),
            key_grid.spread(key),
            key_grid.spread(value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return query_grid.collect(out).reshape(query.size(0), 1, -1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No parameters."""
        return {}
