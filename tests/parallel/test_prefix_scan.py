"""Segmented scans against a plain loop over tokens: one rank, cp 2, 4 and 8 by the pure functions, cp 2 and 4 on gloo processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.prefix_scan import (
    PrefixDecayedSum,
    PrefixMin,
    PrefixMoment,
    PrefixSum,
    SequenceSum,
    fold,
    gather_summaries,
    in_sequence_order,
    local_scan,
    scan,
)
from parallel.sequence_shard import SequenceShard
from tests.rank_pool import RankPool

PREFIX = ("min", "sum", "exclusive_sum", "moment", "decayed_sum")
CALLS = (*PREFIX, "sequence_sum")
DECAY = 0.9


def requests_for(x_T: Tensor, mask_T: Tensor) -> list:
    return [
        PrefixMin(x_T, mask_T),
        PrefixSum(x_T, mask_T),
        PrefixSum(x_T, mask_T, exclusive=True),
        PrefixMoment(x_T, mask_T),
        PrefixDecayedSum(x_T, mask_T, decay=DECAY),
        SequenceSum(x_T, mask_T),
    ]


def reference(x: list[float], mask: list[bool]) -> dict[str, list[float] | float]:
    """One sequence, token by token, in Python's float64."""
    prefix_min, inclusive, exclusive, moment, decayed, seen = [], [], [], [], [], []
    y = products = 0.0
    for value, kept in zip(x, mask, strict=True):
        prefix_min.append(min(seen) if seen else 0.0)
        exclusive.append(math.fsum(seen))
        moment.append(products)
        if kept:
            products += len(seen) * value
            y = DECAY * y + value
            seen.append(value)
        decayed.append(y)
        inclusive.append(math.fsum(seen))
    return {
        "min": prefix_min,
        "sum": inclusive,
        "exclusive_sum": exclusive,
        "moment": moment,
        "decayed_sum": decayed,
        "sequence_sum": math.fsum(seen),
    }


def simulated_scan(lengths: list[int], cp_size: int, xs: list[Tensor], masks: list[Tensor]) -> list[list[Tensor]]:
    """What `cp_size` ranks would return, per request: S tensors of the true lengths, or one [S]. No process, no collective."""
    shards = [SequenceShard.zigzag(lengths, rank, cp_size, None) for rank in range(cp_size)]
    requests = [requests_for(shard.local(xs, fill=math.nan), shard.local(masks, fill=False)) for shard in shards]
    local = [local_scan(shard, request) for shard, request in zip(shards, requests, strict=True)]
    summaries = torch.stack([torch.cat([one.summary for one in rank], dim=-1) for rank in local])
    chunks = in_sequence_order(summaries) if cp_size > 1 else summaries[0]
    answers = [fold(shard, request, rank, chunks) for shard, request, rank in zip(shards, requests, local, strict=True)]
    prefix = [shards[0].join([rank[i] for rank in answers]) for i in range(len(PREFIX))]
    for i in range(len(PREFIX), len(CALLS)):
        assert all(torch.equal(rank[i], answers[0][i]) for rank in answers), "per-sequence answers are the same on every rank"
    return [*prefix, *(list(answers[0][i]) for i in range(len(PREFIX), len(CALLS)))]


def assert_equals_reference(answers: list[list[Tensor]], xs: list[Tensor], masks: list[Tensor]) -> None:
    for s, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        expected = reference(x.double().tolist(), mask.tolist())
        sizes = x.double().abs()[mask]
        moments = float((sizes * torch.arange(len(sizes))).sum())
        for i, name in enumerate(CALLS):
            got, want = answers[i][s].double(), torch.tensor(expected[name], dtype=torch.float64)
            if name == "min":
                assert torch.equal(got, want), f"{name} of sequence {s} must be exact"
            else:
                # A chunk's total is rounded to fp32 once, and the answer once more: 2^-24 of the magnitudes each.
                magnitude = moments if name == "moment" else float(sizes.sum())
                torch.testing.assert_close(got, want, rtol=2**-23, atol=2**-22 * magnitude, msg=lambda m, n=name: f"{n}: {m}")


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(400, 1400)), min_size=1, max_size=6),
    cp_size=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**31),
    kept=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    scale=st.sampled_from([1e-4, 1.0, 200.0]),
)
def test_scan_equals_stepping_token_by_token(lengths: list[int], cp_size: int, seed: int, kept: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    xs = [scale * torch.randn(length, generator=generator) for length in lengths]
    masks = [torch.rand(length, generator=generator) < kept for length in lengths]
    assert_equals_reference(simulated_scan(lengths, cp_size, xs, masks), xs, masks)


@pytest.mark.parametrize("lengths", [[512] * 4, [511, 1, 1, 511, 1024], [100, 2000, 3, 3, 3, 1500], [4096], [1] * 1100, [5, 1, 9000, 7]])
def test_prefix_min_restarts_wherever_chunks_fall_in_its_rows(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Rising values: whatever leaks from an earlier sequence is smaller and shows.
    xs = [10.0 * s + torch.rand(length, generator=generator) for s, length in enumerate(lengths)]
    (prefix_min_T,) = scan(SequenceShard.whole(lengths), [PrefixMin(torch.cat(xs), torch.ones(sum(lengths), dtype=torch.bool))])
    for got, x in zip(prefix_min_T.split(lengths), xs, strict=True):
        assert got[0] == 0.0 and torch.equal(got[1:], x.cummin(0).values[:-1])


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_long_chunks_over_ranks_equal_torch_on_each_sequence(cp_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [9001, 5, 7000, 8192, 6500]
    xs = [torch.randn(length, generator=generator) - 3 * s for s, length in enumerate(lengths)]
    masks = [torch.rand(length, generator=generator) < 0.9 for length in lengths]
    answers = simulated_scan(lengths, cp_size, xs, masks)
    for s, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        seen, zeroed = x.where(mask, math.inf).cummin(0).values, x.double().where(mask, 0.0)
        before = torch.cat([torch.tensor([math.inf]), seen[:-1]])
        assert torch.equal(answers[0][s], before.where(before < math.inf, 0.0))
        sums = (zeroed.cumsum(0), zeroed.cumsum(0) - zeroed, zeroed.sum())
        for i, want in zip((1, 2, 5), sums, strict=True):
            torch.testing.assert_close(answers[i][s].double(), want, rtol=2**-22, atol=2**-22 * float(zeroed.abs().sum()))


def test_golden_prefix_min_restarts_skips_masked_tokens_and_is_not_capped() -> None:
    x_T = torch.tensor([-9.0, 2.0, 3.0, -9.0, 1.0, 5.0, 4.0, -1.0])
    mask_T = torch.tensor([False, True, True, False, True, True, True, True])
    (prefix_min_T,) = scan(SequenceShard.whole([5, 3]), [PrefixMin(x_T, mask_T)])
    assert prefix_min_T.tolist() == [0.0, 0.0, 2.0, 2.0, 2.0, 0.0, 5.0, 4.0]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_what_stands_at_masked_tokens_changes_nothing(garbage: float, cp_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [13, 3, 9]
    xs = [torch.randn(length, generator=generator) for length in lengths]
    masks = [torch.rand(length, generator=generator) < 0.6 for length in lengths]
    clean = simulated_scan(lengths, cp_size, xs, masks)
    dirty = simulated_scan(lengths, cp_size, [x.where(m, garbage) for x, m in zip(xs, masks, strict=True)], masks)
    for a, b in zip(clean, dirty, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_long_packed_row_does_not_cost_the_last_sequence_its_digits() -> None:
    lengths = [60_000, 60_000, 5]
    generator = torch.Generator().manual_seed(0)
    xs = [1.0 + torch.rand(60_000, generator=generator), 1.0 + torch.rand(60_000, generator=generator), 1e-4 * torch.ones(5)]
    shard = SequenceShard.whole(lengths)
    x_T = torch.cat(xs)
    (sum_T,) = scan(shard, [PrefixSum(x_T, torch.ones_like(x_T, dtype=torch.bool))])
    expected = torch.full((5,), float(torch.tensor(1e-4)), dtype=torch.float64).cumsum(0)
    torch.testing.assert_close(sum_T[-5:].double(), expected, rtol=1e-6, atol=0.0)  # an fp32 running sum is 0.01 wrong here


def test_a_decay_of_long_sequences_neither_overflows_nor_leaks() -> None:
    """0.1 ** 20,000 is 0 in float64, so a running sum of x / decay ** t would be infinite."""
    lengths = [20_000, 3]
    x_T = torch.cat([torch.ones(20_000), torch.tensor([1.0, 0.0, 2.0])])
    (y_T,) = scan(SequenceShard.whole(lengths), [PrefixDecayedSum(x_T, torch.ones(20_003, dtype=torch.bool), decay=0.1)])
    assert y_T[19_999] == pytest.approx(1 / 0.9) and y_T[-3:].tolist() == pytest.approx([1.0, 0.1, 2.01])


@pytest.mark.parametrize("cp_size", [1, 4])
def test_a_slow_decay_keeps_its_digits_over_thousands_of_tokens(cp_size: int) -> None:
    """y of ones tends to 1 / (1 - decay), here 100,000; a decay rounded to fp32 is 0.002 % off after 3,000 tokens."""
    shards = [SequenceShard.zigzag([3000], rank, cp_size, None) for rank in range(cp_size)]
    requests = [[PrefixDecayedSum(x_T, x_T == 1, decay=0.99999)] for x_T in (shard.local([torch.ones(3000)], fill=0.0) for shard in shards)]
    local = [local_scan(shard, request) for shard, request in zip(shards, requests, strict=True)]
    summaries = torch.stack([one.summary for (one,) in local])
    chunks = in_sequence_order(summaries) if cp_size > 1 else summaries[0]
    answers = [fold(shard, request, one, chunks)[0] for shard, request, one in zip(shards, requests, local, strict=True)]
    expected = (1 - 0.99999 ** torch.arange(1, 3001, dtype=torch.float64)) / (1 - 0.99999)
    # The chunks' totals and the answer are rounded to fp32.
    torch.testing.assert_close(shards[0].join(answers)[0].double(), expected, rtol=2**-22, atol=0)


def test_infinity_at_an_unmasked_token_stays_in_its_sequence() -> None:
    x_T = torch.tensor([math.inf, 1.0, 2.0, 3.0])
    ones_T = torch.ones(4, dtype=torch.bool)
    (total_S,) = scan(SequenceShard.whole([2, 2]), [SequenceSum(x_T, ones_T)])
    assert total_S.tolist() == [math.inf, 5.0]


def test_the_local_scan_orders_every_kind_of_float() -> None:
    tiny = torch.finfo(torch.float32).tiny
    x_T = torch.tensor([3e38, 1.0, tiny / 4, 0.0, -0.0, -tiny / 4, -tiny, -1.0, -3e38, -1.0])
    (prefix_min_T,) = scan(SequenceShard.whole([10]), [PrefixMin(x_T, torch.ones(10, dtype=torch.bool))])
    assert torch.equal(prefix_min_T[1:], x_T.cummin(0).values[:-1])


def test_one_rank_enters_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a collective at cp_size = 1")

    for name in ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "barrier"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    shard = SequenceShard.zigzag([3, 2], 0, 1, None)
    x_T = torch.randn(5, requires_grad=True)
    (prefix_min_T, *_rest) = scan(shard, requests_for(x_T, torch.ones(5, dtype=torch.bool)))
    (prefix_min_T * x_T).sum().backward()
    assert torch.equal(x_T.grad, prefix_min_T)


def test_results_carry_no_gradient_and_no_request_costs_nothing() -> None:
    shard = SequenceShard.whole([3])
    x_T, mask_T = torch.zeros(3, requires_grad=True), torch.ones(3, dtype=torch.bool)
    assert not any(answer.requires_grad for answer in scan(shard, requests_for(x_T, mask_T)))
    assert scan(SequenceShard.zigzag([3], 0, 2, None), []) == []


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("x_T", "mask_T", "message"),
    [
        (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bool), r"request 0 \(PrefixMin\): x_T must be torch.float32"),
        (torch.zeros(4), torch.ones(3, dtype=torch.bool), r"x_T must be torch.float32 of shape \(3,\), got torch.float32 of shape \(4,\)"),
        (torch.zeros(3), torch.ones(3), "mask_T must be torch.bool"),
    ],
)
def test_bad_requests_are_refused_before_the_collective(x_T: Tensor, mask_T: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan(SequenceShard.whole([3]), [PrefixMin(x_T, mask_T)])


def test_a_shard_cut_without_a_group_cannot_scan() -> None:
    shard = SequenceShard.zigzag([4], 0, 2, None)
    with pytest.raises(ValueError, match="has no process group"):
        gather_summaries(shard, torch.zeros(2, 1, 1))


@pytest.mark.ranks
def test_gloo_ranks_agree_with_the_reference_and_spend_one_collective(ranks: RankPool, tmp_path: Path) -> None:
    """cp 2 (two groups) and cp 4 in one launch of four processes, with short, all-masked and one-token sequences.

    Only the first 8th of each sequence is trained on, so that at cp 4 three ranks hold no trained token, and take part.
    """
    generator = torch.Generator().manual_seed(3)
    lengths = [37, 1, 6, 18, 2, 64]
    xs = [torch.randn(length, generator=generator) for length in lengths]
    masks = [torch.arange(length) < -(-length // 8) for length in lengths]
    masks[3] = torch.zeros(18, dtype=torch.bool)
    torch.save({"lengths": lengths, "xs": xs, "masks": masks}, tmp_path / "input.pt")
    ranks.run(Path(__file__).with_name("scan_ranks.py"), tmp_path, world_size=4)
    for cp_size, idle in ((2, [1, 3]), (4, [1, 2, 3])):
        for rank in range(4):
            out = torch.load(tmp_path / f"cp{cp_size}_rank{rank}.pt", weights_only=True)
            assert out["collectives_of_scan"] == ["all_gather_into_tensor"] and out["collectives_of_backward"] == []
            assert (out["trained_tokens"] == 0) == (rank in idle)
            assert out["numbers_sent"] == 2 * len(lengths) * 9, "chunks x sequences x columns"
            assert_equals_reference(out["answers"], xs, masks)
