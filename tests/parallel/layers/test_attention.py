"""PackedAttention on one rank against a float64 loop over sequences, heads and positions, forward and backward, with rotary embedding."""

from __future__ import annotations

import math
import typing

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.capabilities import AttentionProduct
from parallel.layers import attention as attention_module
from parallel.layers.attention import PackedAttention, ShardedPackedSeqParams
from parallel.mcore import TransformerConfig
from parallel.sequence_shard import SequenceShard

HEADS, GROUPS, SIZE = 6, 2, 4
LENGTHS = (1, 5, 9, 1, 3)
BASE = 100.0
PRODUCTS = typing.get_args(AttentionProduct)


def attention(group: dist.ProcessGroup, *, heads: int = HEADS, groups: int = GROUPS, product: AttentionProduct = "grid") -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * SIZE,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=SIZE,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )

    class Groups:
        cp = group

    return PackedAttention(
        config, layer_number=1, attn_mask_type=None, attention_type="self", pg_collection=Groups(), rotary_base=BASE, product=product
    )


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence [L, heads, size], in float64: token t attends to tokens 0..t; query head h reads key head h // (heads / groups)."""
    query, key = rotated(query), rotated(key)
    per_group = query.shape[1] // key.shape[1]
    rows = []
    for t in range(len(query)):
        heads = []
        for h in range(query.shape[1]):
            g = h // per_group
            scores = torch.stack([query[t, h] @ key[i, g] / math.sqrt(query.shape[2]) for i in range(t + 1)])
            heads.append(scores.softmax(0) @ value[: t + 1, g])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def rotated(x: Tensor) -> Tensor:
    """Pair (i, i + size/2) of token t as a complex number, turned by t / BASE^(2i / size)."""
    half = x.shape[2] // 2
    angles = torch.tensor([[t * BASE ** (-2 * i / x.shape[2]) for i in range(half)] for t in range(len(x))], dtype=torch.float64)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def random_qkv(num_tokens: int, *, heads: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, heads, SIZE), (num_tokens, groups, SIZE), (num_tokens, groups, SIZE)]
    return [(2 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("lengths", "multiple_of"), [(LENGTHS, 1), (LENGTHS, 4), ((5, 5, 5), 1)])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("product", PRODUCTS)
def test_packed_attention_and_its_gradient_equal_a_loop_over_sequences(
    one_rank_group: dist.ProcessGroup, lengths: tuple[int, ...], multiple_of: int, heads: int, groups: int, product: AttentionProduct
) -> None:
    shard = SequenceShard.whole(lengths, multiple_of=multiple_of)
    qkv = random_qkv(shard.num_local_tokens, heads=heads, groups=groups)
    module = attention(one_rank_group, heads=heads, groups=groups, product=product)
    out = module(*qkv, None, packed_seq_params=ShardedPackedSeqParams.from_shard(shard))
    assert out.shape == (shard.num_local_tokens, 1, heads * SIZE)
    assert out.isfinite().all()

    exact = [x.detach().double().requires_grad_() for x in qkv]
    kept = ~shard.padding_T
    expected = torch.cat([reference(*(x[kept][shard.sequence_id_T[kept] == s] for x in exact)) for s in range(len(lengths))])
    torch.testing.assert_close(out[kept, 0].double(), expected, rtol=1e-5, atol=1e-5)

    # The loss never reads padding, so padding must not reach any gradient.
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (out[kept, 0] * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for mine, theirs in zip(qkv, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
        assert (mine.grad[shard.padding_T] == 0).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_token_sees_a_later_one_or_another_sequence(one_rank_group: dist.ProcessGroup, product: AttentionProduct) -> None:
    shard = SequenceShard.whole((4, 3))
    packed = ShardedPackedSeqParams.from_shard(shard)
    module = attention(one_rank_group, product=product)
    query, key, value = (x.detach() for x in random_qkv(7, heads=HEADS, groups=GROUPS))
    before = module(query, key, value, None, packed_seq_params=packed)
    key[2], value[2] = 9.0, -9.0
    after = module(query, key, value, None, packed_seq_params=packed)
    changed = (before != after).any(-1)[:, 0]
    assert changed.tolist() == [False, False, True, True, False, False, False]


class ContextOfTwo:
    """Stands for a context-parallel group of two ranks."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def test_all_layers_keep_one_mask_between_them_under_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module._GatherOverContext, "apply", lambda x, group: torch.cat([x, x]))
    shard = SequenceShard.zigzag((256, 200), 0, 2, None, multiple_of=4)
    packed = ShardedPackedSeqParams.from_shard(shard)
    qkv = random_qkv(shard.num_local_tokens, heads=HEADS, groups=GROUPS)
    kept: dict[int, int] = {}  # bytes by address

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    mask_bytes = 4 * 2 * 128 * 256  # fp32, two sequences, this rank's queries, all keys
    layers = [attention(ContextOfTwo()) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = [layer(*qkv, None, packed_seq_params=packed) for layer in layers]
    assert [size for size in kept.values() if size >= mask_bytes] == [mask_bytes]
    assert all(torch.equal(result, results[0]) for result in results)


def test_other_input_than_packed_sequences_is_refused(one_rank_group: dist.ProcessGroup) -> None:
    with pytest.raises(AssertionError, match="packed sequences only"):
        attention(one_rank_group)(*random_qkv(3, heads=HEADS, groups=GROUPS), None)
