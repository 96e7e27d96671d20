"""Packing: which replica and micro-batch every sequence lands in, and what of it a rank holds, against counts done by hand."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_convert.hf_config import Architecture
from parallel.layout import ParallelLayout
from parallel.packing import (
    TokenSequence,
    break_even_tokens,
    build_micro_batch,
    check_sequences,
    common_sizes,
    compute_cost,
    plan_micro_batches,
    plan_replicas,
    split_over_replicas,
)
from parallel.sequence_shard import SequenceShard

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 60), max_size=30)
LINEAR = float("inf")  # no attention to speak of


def sequence(length: int, start: int = 0) -> TokenSequence:
    """Token ids start, start+1, ...; entry p of the stream is 1000 + start + p; every third position is not trained."""
    positions = torch.arange(start, start + length - 1)
    return TokenSequence(
        token_ids=torch.arange(start, start + length), loss_mask=positions % 3 != 0, streams={"advantages": 1000.0 + positions}
    )


# -- TokenSequence ------------------------------------------------------------------------------------------------------


def test_a_sequence_has_one_position_less_than_tokens() -> None:
    assert sequence(5).num_positions == 4


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"token_ids": torch.arange(1), "loss_mask": torch.ones(0, dtype=torch.bool)},
            "token_ids: a sequence needs at least 2 tokens, this one has 1",
        ),
        ({"token_ids": torch.arange(4).int()}, "token_ids: torch.int32 (4,), expected torch.int64 and one axis"),
        ({"token_ids": torch.arange(4)[None]}, "token_ids: torch.int64 (1, 4), expected torch.int64 and one axis"),
        ({"loss_mask": torch.ones(4, dtype=torch.bool)}, "loss_mask: shape (4,), expected (3,) for 4 tokens"),
        ({"loss_mask": torch.ones(3)}, "loss_mask: dtype torch.float32, expected torch.bool"),
        ({"streams": {"advantages": torch.ones(2)}}, "advantages: shape (2,), expected (3,) for 4 tokens"),
        ({"streams": {"advantages": torch.ones(3, 1)}}, "advantages: shape (3, 1), expected (3,) for 4 tokens"),
        ({"streams": {"advantages": torch.ones(3).double()}}, "advantages: dtype torch.float64, expected torch.float32"),
        ({"streams": {"behaviour_logprobs": torch.ones(3).bfloat16()}}, "behaviour_logprobs: dtype torch.bfloat16, expected torch.float32"),
    ],
)
def test_a_malformed_sequence_is_refused_by_name(changed: dict, message: str) -> None:
    good = {"token_ids": torch.arange(4), "loss_mask": torch.ones(3, dtype=torch.bool), "streams": {"advantages": torch.ones(3)}}
    TokenSequence(**good)
    with pytest.raises(ValueError) as refusal:
        TokenSequence(**{**good, **changed})
    assert str(refusal.value) == message


def with_stream(value: float, *, at: int) -> TokenSequence:
    """A good sequence of 6 tokens, trained at positions 1, 2 and 4, but for one value of its stream."""
    good = sequence(6)
    stream = good.streams["advantages"].clone()
    stream[at] = value
    return TokenSequence(token_ids=good.token_ids, loss_mask=good.loss_mask, streams={"advantages": stream})


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "sequences: none, expected at least one"),
        ([sequence(3), sequence(11)], "sequence 1: token_ids holds 10, expected 0 to 9"),
        ([sequence(3, start=-1)], "sequence 0: token_ids holds -1, expected 0 to 9"),
        (
            [sequence(3), TokenSequence(token_ids=torch.arange(3), loss_mask=torch.ones(2, dtype=torch.bool), streams={})],
            "sequence 1: streams [], expected ['advantages'] as in sequence 0",
        ),
        ([with_stream(float("nan"), at=4)], "sequence 0: advantages is nan at position 4, where loss_mask is True"),
        ([sequence(3), with_stream(float("-inf"), at=1)], "sequence 1: advantages is -inf at position 1, where loss_mask is True"),
    ],
)
def test_sequences_that_would_go_wrong_on_some_rank_only_are_refused(sequences: list[TokenSequence], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_sequences(sequences, vocab_size=10)
    assert str(refusal.value) == message


def test_what_lies_where_nothing_is_trained_is_nobodys_business() -> None:
    check_sequences([sequence(10), with_stream(float("nan"), at=3)], vocab_size=10)


# -- plans --------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, num_replicas=st.integers(1, 7))
def test_every_sequence_goes_to_one_replica_and_loads_are_even(lengths: list[int], num_replicas: int) -> None:
    replicas = split_over_replicas(lengths, num_replicas=num_replicas)
    assert len(replicas) == num_replicas
    assert sorted(index for replica in replicas for index in replica) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in replica) for replica in replicas]
    # The last sequence a replica got found it the least loaded one.
    assert all(load - lengths[replica[-1]] <= min(loads) for load, replica in zip(loads, replicas, strict=True) if replica)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7), num_replicas=st.integers(1, 3), break_even=st.sampled_from([LINEAR, 20.0])
)
def test_the_slowest_replica_is_within_a_third_of_the_best_split(lengths: list[int], num_replicas: int, break_even: float) -> None:
    costs = [compute_cost(length, break_even=break_even) for length in lengths]
    best = min(
        max(sum(cost for cost, r in zip(costs, split, strict=True) if r == replica) for replica in range(num_replicas))
        for split in itertools.product(range(num_replicas), repeat=len(lengths))
    )
    found = max(sum(costs[index] for index in replica) for replica in split_over_replicas(costs, num_replicas=num_replicas))
    assert found <= best * (4 / 3 - 1 / (3 * num_replicas)) * (1 + 1e-9)


def test_replicas_are_balanced_by_compute_and_not_by_tokens() -> None:
    lengths = [100, *[10] * 60]

    def sequences_of(break_even: float) -> list[int]:
        plans = plan_replicas(lengths, ParallelLayout(world_size=2), max_tokens=100, break_even=break_even)
        return [sum(len(group) for group in plan) for plan in plans]

    # At ten times the break-even length a sequence costs 11 times its length, at that length twice: 1100 + 3 * 20 against 57 * 20.
    assert sequences_of(10.0) == [1 + 3, 57]
    # By tokens: 100 + 25 * 10 against 35 * 10.
    assert sequences_of(LINEAR) == [1 + 25, 35]


def test_the_most_expensive_micro_batches_of_all_replicas_run_side_by_side() -> None:
    # Equal tokens, unequal squares: one sequence of 40 costs 40 + 160, four of 10 cost 40 + 40.
    lengths = [40, 10, 10, 10, 10, 40, 10, 10, 10, 10]
    for plan in plan_replicas(lengths, ParallelLayout(world_size=2), max_tokens=40, break_even=10.0):
        assert [len(group) for group in plan] == [1, 4]


def test_the_break_even_length_by_hand() -> None:
    small = Architecture(
        model_type="qwen3_moe",
        vocab_size=90,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=3,
        intermediate_size=7,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=5,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype=None,
    )
    # Projections 4*6 + 2*4*3 + 6*4 = 72, router 4*8 = 32, experts 2*3*4*5 = 120, head 4/3*4*90/2 = 240; attention 6 per position.
    assert break_even_tokens(small) == pytest.approx((72 + 32 + 120 + 240) / 6)
    dense = dataclasses.replace(
        small, model_type="qwen3", num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=None
    )
    assert break_even_tokens(dense) == pytest.approx((72 + 3 * 4 * 7 + 240) / 6)


def test_longest_sequences_are_shared_out_first() -> None:
    # 9 | 8 | then 5 onto the 8, 4 onto the 9, 2 onto either 13: the first.
    assert split_over_replicas([4, 9, 5, 8, 2], num_replicas=2) == [[1, 0, 4], [3, 2]]


def test_first_fit_decreasing_by_hand() -> None:
    # Sorted: 7, 6, 4, 3, 3, 2 into bins of 10: 7+3, 6+4, 3+2.
    lengths = [3, 6, 2, 7, 4, 3]
    assert plan_micro_batches(range(6), lengths, max_tokens=10) == [[3, 0], [1, 4], [5, 2]]
    assert plan_micro_batches([2, 4, 5], lengths, max_tokens=10) == [[4, 5, 2]]
    assert plan_micro_batches([], lengths, max_tokens=10) == []


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, spare=st.integers(0, 60))
def test_no_micro_batch_exceeds_its_budget_and_no_two_would_fit_into_one(lengths: list[int], spare: int) -> None:
    budget = max(lengths, default=1) + spare
    groups = plan_micro_batches(range(len(lengths)), lengths, max_tokens=budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in group) for group in groups]
    assert all(load <= budget for load in loads)
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[i + 1 :])


@given(st.lists(st.integers(1, 60), max_size=70), st.integers(0, 90))
def test_micro_batches_are_those_of_first_fit_by_a_plain_loop(lengths: list[int], spare: int) -> None:
    max_tokens = max(lengths, default=1) + spare
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        with_room = [group for group in groups if sum(lengths[i] for i in group) + lengths[index] <= max_tokens]
        if with_room:
            with_room[0].append(index)
        else:
            groups.append([index])
    assert plan_micro_batches(range(len(lengths)), lengths, max_tokens=max_tokens) == groups


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 7))
def test_the_least_loaded_replica_gets_the_next_sequence(costs: list[int], num_replicas: int) -> None:
    replicas: list[list[int]] = [[] for _ in range(num_replicas)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        min(replicas, key=lambda replica: sum(costs[i] for i in replica)).append(index)
    assert split_over_replicas([float(cost) for cost in costs], num_replicas=num_replicas) == replicas


def test_a_sequence_longer_than_a_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^actor\.max_tokens_per_micro_batch: 10 is less than sequence 1 with 11 positions$"):
        plan_micro_batches([0, 1], [3, 11], max_tokens=10)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    dp=st.integers(1, 4),
    pp_vpp=st.sampled_from([(1, None), (2, None), (2, 2), (3, 2)]),
)
def test_all_replicas_run_equally_many_micro_batches(lengths: list[int], dp: int, pp_vpp: tuple[int, int | None]) -> None:
    pp, vpp = pp_vpp
    plans = plan_replicas(lengths, ParallelLayout(world_size=dp * pp, pp=pp, vpp=vpp), max_tokens=40, break_even=25.0)
    assert len(plans) == dp
    [count] = {len(plan) for plan in plans}
    assert count >= 1
    assert vpp is None or count % pp == 0
    assert sorted(index for plan in plans for group in plan for index in group) == list(range(len(lengths)))


def test_padding_counts_against_the_budget() -> None:
    # Positions 5 and 3 fit into 8, but padded to multiples of 4 (cp 2) they are 8 and 4.
    lengths = [5, 3]
    assert plan_replicas(lengths, ParallelLayout(world_size=1), max_tokens=8, break_even=LINEAR) == [[[0, 1]]]
    layout = ParallelLayout(world_size=2, cp=2)
    assert plan_replicas(lengths, layout, max_tokens=8, break_even=LINEAR) == [[[0], [1]]]
    with pytest.raises(ValueError, match="7 is less than sequence 0 with 8 positions"):
        plan_replicas(lengths, layout, max_tokens=7, break_even=LINEAR)


def test_a_replica_without_sequences_gets_empty_micro_batches() -> None:
    assert plan_replicas([5, 5, 5], ParallelLayout(world_size=4), max_tokens=5, break_even=LINEAR) == [[[0]], [[1]], [[2]], [[]]]


# -- micro-batches ------------------------------------------------------------------------------------------------------


def test_a_micro_batch_holds_shifted_labels_and_aligned_streams(one_rank_group: dist.ProcessGroup) -> None:
    sequences = [sequence(4), sequence(6, start=10), sequence(3, start=50)]
    layout = ParallelLayout(world_size=2, tp=2, sequence_parallel=True)
    batch = build_micro_batch(sequences, [2, 0], layout, cp_group=one_rank_group, device=CPU)
    assert batch.indices == (2, 0)
    # 2 positions, then 3 padded to 4.
    assert batch.token_ids_T.tolist() == [50, 51, 0, 1, 2, 0]
    assert batch.labels_T.tolist() == [51, 52, 1, 2, 3, 0]
    assert batch.loss_mask_T.tolist() == [True, False, False, True, True, False]
    assert batch.streams["advantages"].tolist() == [1050.0, 1051.0, 1000.0, 1001.0, 1002.0, 0.0]
    assert batch.shard.padding_T.tolist() == [False] * 5 + [True]
    assert batch.packed_seq_params.cu_seqlens_q.tolist() == [0, 2, 6]
    assert (batch.packed_seq_params.qkv_format, batch.packed_seq_params.max_seqlen_q) == ("thd", 4)


def test_context_parallel_ranks_hold_zigzag_parts_with_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    # Building exchanges nothing, so each rank's shard is made without a group.
    original = SequenceShard.zigzag
    monkeypatch.setattr(
        SequenceShard, "zigzag", lambda lengths, rank, size, group, **options: original(lengths, rank, size, None, **options)
    )

    @dataclass
    class OneOfTwo:
        number: int

        def rank(self) -> int:
            return self.number

    layout = ParallelLayout(world_size=2, cp=2)
    first, second = (build_micro_batch([sequence(8)], [0], layout, cp_group=OneOfTwo(rank), device=CPU) for rank in (0, 1))
    # 7 positions padded to 8, four chunks of 2: rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2.
    assert first.token_ids_T.tolist() == [0, 1, 6, 0]
    assert first.labels_T.tolist() == [1, 2, 7, 0]
    assert first.loss_mask_T.tolist() == [False, True, False, False]
    assert second.token_ids_T.tolist() == [2, 3, 4, 5]
    assert second.labels_T.tolist() == [3, 4, 5, 6]
    assert second.streams["advantages"].tolist() == [1002.0, 1003.0, 1004.0, 1005.0]


def test_an_empty_micro_batch_is_masked_padding_with_the_same_streams(one_rank_group: dist.ProcessGroup) -> None:
    batch = build_micro_batch([sequence(9)], [], ParallelLayout(world_size=2), cp_group=one_rank_group, device=CPU)
    assert batch.indices == ()
    assert len(batch.token_ids_T) == 1
    assert not batch.loss_mask_T.any()
    assert {name: stream.tolist() for name, stream in batch.streams.items()} == {"advantages": [0.0]}


def test_a_micro_batch_can_be_filled_to_the_size_that_other_replicas_have(one_rank_group: dist.ProcessGroup) -> None:
    layout = ParallelLayout(world_size=2)
    lengths = [4, 2, 3]
    plans = [[[0], [1]], [[2], []]]
    assert common_sizes(plans, lengths, layout) == [4, 2]
    sequences = [sequence(length + 1) for length in lengths]
    for indices, size in (([2], 4), ([], 2), ([1], 2)):
        batch = build_micro_batch(sequences, indices, layout, cp_group=one_rank_group, device=CPU, fill_to=size)
        assert (len(batch.token_ids_T), batch.indices) == (size, tuple(indices))
        trained = sum(int(sequences[index].loss_mask.sum()) for index in indices)
        assert int(batch.loss_mask_T.sum()) == trained
        weights = batch.packed_seq_params.sequence_weights
        assert weights[: len(indices)] == (1 / 3,) * len(indices) and not any(weights[len(indices) :])
