"""Rotary embedding and core attention of packed sequences, where TransformerEngine is absent.

Tokens arrive packed, [T, heads, head_size]; each sequence attends to itself only. Under context parallelism keys and values are gathered
over the ranks of the group (backward: reduce-scatter). The product itself is in attention_varlen.py or attention_grid.py;
`capabilities.py` chooses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.capabilities import AttentionProduct
from parallel.layers.attention_grid import GridBlock, attend_in_grids, grid_blocks
from parallel.layers.attention_varlen import VarlenPieces, attend_varlen
from parallel.mcore import PackedSeqParams, TransformerConfig, parallel_state
from parallel.routing_replay import MicroBatchRouting
from parallel.sequence_shard import SequenceShard


@dataclass
class ShardedPackedSeqParams(PackedSeqParams):
    """Megatron's packed-sequence record, plus the shard it was made from. What attention derives of it is shared by all layers."""

    shard: SequenceShard | None = None
    sequence_weights: tuple[float, ...] = ()  # [S], in the router's balance loss; 0 for a sequence of padding
    routing: MicroBatchRouting | None = None  # what the routers replay or record; None: nothing
    _blocks: list[GridBlock] | None = field(default=None, repr=False)
    _pieces: VarlenPieces | None = field(default=None, repr=False)
    _rotation: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def from_shard(
        cls, shard: SequenceShard, *, sequence_weights: tuple[float, ...] = (), routing: MicroBatchRouting | None = None
    ) -> ShardedPackedSeqParams:
        return cls(
            qkv_format="thd",
            cu_seqlens_q=shard.cu_seqlens,
            cu_seqlens_kv=shard.cu_seqlens,
            cu_seqlens_q_padded=shard.cu_seqlens,
            cu_seqlens_kv_padded=shard.cu_seqlens,
            max_seqlen_q=shard.max_seqlen,
            max_seqlen_kv=shard.max_seqlen,
            shard=shard,
            sequence_weights=sequence_weights,
            routing=routing,
        )

    def rotation(self, head_size: int, *, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every local token's angles, [T, 1, head_size / 2] each. Made once and shared by all layers.

        Angle i is position / base^(2i / head_size) (RoFormer, arXiv:2104.09864, eq. 15), taken in fp32.
        """
        if self._rotation is None:
            assert self.shard is not None
            exponents = torch.arange(0, head_size, 2, device=self.shard.device).float() / head_size
            angles = self.shard.position_T[:, None, None].float() * (1.0 / base**exponents)
            self._rotation = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._rotation

    def blocks(self, *, dtype: torch.dtype) -> list[GridBlock]:
        """See `grid_blocks`. Made once: backward keeps the masks, local tokens * sequence length numbers, of every layer."""
        if self._blocks is None:
            assert self.shard is not None
            self._blocks = grid_blocks(self.shard, dtype=dtype)
        return self._blocks

    def pieces(self) -> VarlenPieces:
        """See `VarlenPieces`. Made once and shared by all layers."""
        if self._pieces is None:
            assert self.shard is not None
            self._pieces = VarlenPieces.of(self.shard)
        return self._pieces


class _Rotate(torch.autograd.Function):
    """Turns the pairs (x_i, x_{i + size/2}) of every head by its token's angles; backward turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_THD, cos, sin, sign=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, sign=-1), None, None


def _turn(x_THD: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    turned = torch.empty_like(x_THD)
    first_out, second_out = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin, value=sign)
    return turned


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
    """Drop-in `core_attention`: causal self-attention of packed sequences, grouped queries, context parallel.

    It applies the rotary embedding itself, to the positions that its shard knows: Megatron's runs over every sequence of every layer.
    rotary_base: theta of the model. product: how queries, keys and values become an output.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        rotary_base: float,
        product: AttentionProduct,
        **_: Any,
    ) -> None:
        super().__init__()
        self.rotary_base, self.product = rotary_base, product
        self.cp_group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: ShardedPackedSeqParams | None = None, **__: Any
    ) -> Tensor:
        """query [T, heads, size], key and value [T, key-value heads, size] -> [T, 1, heads * size]."""
        assert isinstance(packed_seq_params, ShardedPackedSeqParams), "this project trains packed sequences only"
        # Megatron hands [T, 1, heads, size] or [T, heads, size], by the kind of packing that it was told.
        query, key, value = (x.squeeze(1) if x.dim() == 4 else x for x in (query, key, value))
        rotation = packed_seq_params.rotation(query.size(-1), base=self.rotary_base, dtype=query.dtype)
        query, key = (_Rotate.apply(x, *rotation) for x in (query, key))
        if self.cp_group.size() > 1:
            gathered = _GatherOverContext.apply(torch.cat([key, value], dim=-1), self.cp_group)
            key, value = gathered.split([key.size(-1), value.size(-1)], dim=-1)
        if self.product == "varlen":
            out = attend_varlen(query, key, value, packed_seq_params.pieces(), scale=self.scale)
        else:
            out = attend_in_grids(query, key, value, packed_seq_params.blocks(dtype=query.dtype), scale=self.scale)
        return out.reshape(query.size(0), 1, -1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No parameters."""
        return {}
