"""Rotary embedding and core attention of packed sequences, where TransformerEngine is absent.

Tokens arrive packed, [T, heads, head_size]; each sequence attends to itself only. Sequences of similar length are laid side by side
in a [sequences, longest] grid so that torch's causal kernel does the work, and nothing of size T x T exists. Under context
parallelism keys and values are gathered over the ranks of the group (backward: reduce-scatter) and masked by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
class _Block:
    """The sequences of one length class: this rank's queries, all ranks' keys, and who may see whom.

    mask: [sequences, 1, query width, key width], 0 or -inf, added to the scores; None without context parallelism, where one rank holds
    positions 0, 1, 2, ... in order, empty slots last: plain causal order.
    """

    queries: _Grid
    keys: _Grid
    mask: Tensor | None

    @classmethod
    def of(cls, queries: _Grid, keys: _Grid, *, dtype: torch.dtype) -> _Block:
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


@dataclass
class ShardedPackedSeqParams(PackedSeqParams):
    """Megatron's packed-sequence record, plus the shard it was made from. What attention derives of it is shared by all layers."""

    shard: SequenceShard | None = None
    sequence_weights: tuple[float, ...] = ()  # [S], in the router's balance loss; 0 for a sequence of padding
    _blocks: list[_Block] | None = field(default=None, repr=False)
    _rotation: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def from_shard(cls, shard: SequenceShard, *, sequence_weights: tuple[float, ...] = ()) -> ShardedPackedSeqParams:
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

    def blocks(self, *, dtype: torch.dtype) -> list[_Block]:
        """One for each length class. Made once: backward keeps the masks, local tokens * sequence length numbers, of every layer.

        dtype: of the masks, which is the queries'; torch would convert others anew in every layer.
        """
        if self._blocks is None:
            shard = self.shard
            assert shard is not None
            key_ids, key_positions = shard.sequence_id_T, shard.position_T
            if shard.cp_size > 1:
                ranks = [
                    SequenceShard.zigzag(shard.padded_lengths, rank, shard.cp_size, None, device=shard.device)
                    for rank in range(shard.cp_size)
                ]
                key_ids = torch.cat([other.sequence_id_T for other in ranks])
                key_positions = torch.cat([other.position_T for other in ranks])
            self._blocks = []
            for indices in length_classes(shard.padded_lengths):
                sequences = torch.tensor(indices, device=shard.device)
                queries = _Grid.of(shard.sequence_id_T, shard.position_T, sequences)
                if shard.cp_size == 1:
                    self._blocks.append(_Block(queries, queries, None))
                else:
                    self._blocks.append(_Block.of(queries, _Grid.of(key_ids, key_positions, sequences), dtype=dtype))
        return self._blocks


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
    rotary_base: theta of the model.
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
        **_: Any,
    ) -> None:
        super().__init__()
        self.rotary_base = rotary_base
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
        blocks = packed_seq_params.blocks(dtype=query.dtype)
        parts = [self._attend(query, key, value, block) for block in blocks]
        if len(parts) == 1:
            return parts[0].reshape(query.size(0), 1, -1)
        place_T = torch.argsort(torch.cat([block.queries.token_G for block in blocks]))
        return torch.cat(parts).index_select(0, place_T).reshape(query.size(0), 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, block: _Block) -> Tensor:
        out = F.scaled_dot_product_attention(
            block.queries.spread(query),
            block.keys.spread(key),
            block.keys.spread(value),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return block.queries.collect(out)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No parameters."""
        return {}
