"""Where every token of packed, zigzag-sharded sequences lies, against layouts written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.sequence_shard import SequenceShard


def shards_of(lengths: list[int], cp_size: int, multiple_of: int = 1) -> list[SequenceShard]:
    return [SequenceShard.zigzag(lengths, rank, cp_size, None, multiple_of=multiple_of) for rank in range(cp_size)]


def test_whole_pads_each_sequence_at_its_end() -> None:
    shard = SequenceShard.whole([3, 1], multiple_of=2)
    assert shard.lengths == (3, 1)
    assert shard.padded_lengths == (4, 2)
    assert shard.sequence_id_T.tolist() == [0, 0, 0, 0, 1, 1]
    assert shard.position_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert shard.padding_T.tolist() == [False, False, False, True, False, True]
    assert shard.cu_seqlens.tolist() == [0, 4, 6] and shard.cu_seqlens.dtype == torch.int32
    assert (shard.num_sequences, shard.num_local_tokens, shard.max_seqlen) == (2, 6, 4)
    assert shard.sequence_id_T.dtype == shard.position_T.dtype == torch.int64


def test_zigzag_gives_rank_r_chunks_r_and_2cp_minus_1_minus_r() -> None:
    first, second = shards_of([7, 4], 2)
    assert first.padded_lengths == (8, 4)
    assert first.position_T.tolist() == [0, 1, 6, 7, 0, 3]
    assert second.position_T.tolist() == [2, 3, 4, 5, 1, 2]
    assert first.sequence_id_T.tolist() == second.sequence_id_T.tolist() == [0, 0, 0, 0, 1, 1]
    assert first.padding_T.tolist() == [False, False, False, True, False, False]
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 8, 12]
    assert first.max_seqlen == 8


def test_padding_is_the_least_common_multiple_of_both_demands() -> None:
    assert SequenceShard.zigzag([1], 0, 2, None, multiple_of=6).padded_lengths == (12,)
    assert SequenceShard.zigzag([1], 0, 4, None, multiple_of=4).padded_lengths == (8,)
    assert SequenceShard.zigzag([5], 0, 1, None).padded_lengths == (5,), "one rank has no chunks to fill"


def test_zigzag_over_four_ranks() -> None:
    positions = [shard.position_T.tolist() for shard in shards_of([16], 4)]
    assert positions == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    cp_size=st.sampled_from([1, 2, 4, 8]),
    multiple_of=st.sampled_from([1, 2, 3]),
)
def test_every_token_is_held_by_exactly_one_rank_and_join_inverts_local(lengths: list[int], cp_size: int, multiple_of: int) -> None:
    shards = shards_of(lengths, cp_size, multiple_of)
    held = sorted(
        (int(s), int(p)) for shard in shards for s, p in zip(shard.sequence_id_T, shard.position_T, strict=True) if p < lengths[int(s)]
    )
    assert held == [(s, p) for s, length in enumerate(lengths) for p in range(length)]
    assert {shard.num_local_tokens for shard in shards} == {shards[0].num_local_tokens}
    values = [torch.arange(length) + 100 * s for s, length in enumerate(lengths)]
    parts = [shard.local(values, fill=-1) for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        assert part[shard.padding_T].eq(-1).all() and part[~shard.padding_T].ge(0).all()
    for joined, value in zip(shards[-1].join(parts), values, strict=True):
        assert joined.tolist() == value.tolist()


def test_local_keeps_the_dtype_and_lets_the_gradient_through() -> None:
    shard = SequenceShard.whole([2, 1], multiple_of=2)
    assert shard.local([torch.tensor([True, True]), torch.tensor([True])], fill=False).tolist() == [True, True, True, False]
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y_T = shard.local([x, torch.tensor([3.0])], fill=float("nan"))
    (y_T[:3] * torch.tensor([5.0, 7.0, 1.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [5.0, 7.0]


def test_assemble_on_one_rank_cuts_to_the_true_lengths_without_gradient() -> None:
    shard = SequenceShard.whole([2, 1], multiple_of=2)
    a, b = shard.assemble(torch.arange(4.0, requires_grad=True))
    assert (a.tolist(), b.tolist(), a.requires_grad) == ([0.0, 1.0], [2.0], False)


def test_per_token_spreads_and_to_moves_every_tensor() -> None:
    shard = SequenceShard.zigzag([3, 2], 1, 2, None)
    assert shard.per_token(torch.tensor([7.0, 9.0])).tolist() == [7.0, 7.0, 9.0, 9.0]
    moved = shard.to("meta")
    assert {t.device.type for t in (moved.sequence_id_T, moved.position_T, moved.padding_T, moved.cu_seqlens, moved.chunk_starts)} == {
        "meta"
    }
    assert moved.lengths == shard.lengths


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SequenceShard.whole([]), "lengths is empty"),
        (lambda: SequenceShard.whole([3, 0]), r"lengths\[1\] is 0"),
        (lambda: SequenceShard.whole([3], multiple_of=0), "multiple_of is 0"),
        (lambda: SequenceShard.zigzag([3], 2, 2, None), "cp_rank=2 is not a rank of cp_size=2"),
        (lambda: SequenceShard.whole([3]).local([torch.zeros(2)], fill=0), r"sequence 0: expected shape \(3,\), got \(2,\)"),
        (lambda: SequenceShard.whole([3]).local([], fill=0), "expected 1 tensors"),
        (lambda: SequenceShard.whole([3]).assemble(torch.zeros(4)), r"expected shape \(3,\), got \(4,\)"),
        (lambda: SequenceShard.zigzag([3], 0, 2, None).assemble(torch.zeros(2)), "has no process group"),
    ],
)
def test_bad_input_is_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
