"""Attention without masks against the grids, every context-parallel rank in turn; and the operator that CUDA gets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.layers.attention_grid import attend_in_grids, grid_blocks
from parallel.layers.attention_varlen import CAUSAL, VarlenPieces, attend_varlen, reference_varlen_attn
from parallel.sequence_shard import SequenceShard

HEADS, GROUPS, SIZE = 4, 2, 8
LENGTHS = (37, 8, 64, 1, 20)
SCALE = SIZE**-0.5


def shards(cp_size: int) -> list[SequenceShard]:
    return [SequenceShard.zigzag(LENGTHS, rank, cp_size, None) for rank in range(cp_size)]


def random_qkv(ranks: list[SequenceShard]) -> list[Tensor]:
    """Queries, keys and values of all ranks, in rank order."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(shard.num_local_tokens for shard in ranks)
    return [torch.randn(num_tokens, heads, SIZE, generator=generator).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_output_and_gradients_equal_the_grids(cp_size: int) -> None:
    ranks = shards(cp_size)
    found = []
    for varlen in (False, True):
        query, key, value = qkv = random_qkv(ranks)
        parts = query.split([shard.num_local_tokens for shard in ranks])
        if varlen:
            outs = [attend_varlen(q, key, value, VarlenPieces.of(shard), scale=SCALE) for q, shard in zip(parts, ranks, strict=True)]
        else:
            blocks = [grid_blocks(shard, dtype=torch.float32) for shard in ranks]
            outs = [attend_in_grids(q, key, value, block, scale=SCALE) for q, block in zip(parts, blocks, strict=True)]
        kept = ~torch.cat([shard.padding_T for shard in ranks])
        out = torch.cat(outs)[kept]
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append([out, *(x.grad for x in qkv)])
    for expected, actual in zip(*found, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_reference_aligns_causal_order_at_the_last_key_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths_q, lengths_k = [3, 5], [7, 5]
    q, k, v = (torch.randn(n, HEADS, SIZE, generator=generator) for n in (8, 12, 12))
    offsets = [torch.tensor([0, first, first + second], dtype=torch.int32) for first, second in (lengths_q, lengths_k)]
    out = reference_varlen_attn(q, k, v, *offsets, 5, 7, scale=SCALE, window_size=CAUSAL, enable_gqa=False)
    for piece, q1, k1, v1 in zip(out.split(lengths_q), q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        bias = causal_lower_right(len(q1), len(k1))
        heads_first = [x.transpose(0, 1)[None] for x in (q1, k1, v1)]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=bias, scale=SCALE)
        torch.testing.assert_close(piece, expected[0].transpose(0, 1))


class Operators(TorchDispatchMode):
    """Names of the operators that ran inside the block, and the largest number of elements that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func.overloadpacket))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("cp_size", [1, 4])
def test_cuda_tensors_get_variable_length_flash_attention_and_no_mask(cp_size: int) -> None:
    shard = SequenceShard.zigzag((4096, 4096), 1 % cp_size, cp_size, None)
    pieces = VarlenPieces.of(shard)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Operators() as operators:  # no driver, so no backward here
        planned = {f.name: x for f in dataclasses.fields(pieces) if isinstance(x := getattr(pieces, f.name), Tensor)}
        moved = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in planned.items()}
        pieces = dataclasses.replace(pieces, **moved)
        num_keys = cp_size * shard.num_local_tokens
        query, key, value = (
            torch.empty(tokens, heads, SIZE, dtype=torch.bfloat16, device="cuda")
            for tokens, heads in ((shard.num_local_tokens, HEADS), (num_keys, GROUPS), (num_keys, GROUPS))
        )
        out = attend_varlen(query, key, value, pieces, scale=SCALE)
        assert out.shape == query.shape
    assert "torch_attn._varlen_attn" in operators.names
    assert not any("scaled_dot_product" in name for name in operators.names)
    assert operators.largest <= num_keys * HEADS * SIZE
