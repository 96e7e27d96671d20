"""Expert loads against sums by hand."""

from __future__ import annotations

import pytest
import torch

from parallel.expert_load import dispatched, load_of, record_routing
from parallel.layout import ParallelLayout


def routed(*counts: list[int]) -> list[tuple[int, torch.Tensor]]:
    return [(layer, torch.tensor(each)) for layer, each in enumerate(counts, start=1)]


def test_tokens_of_ranks_that_share_experts_meet() -> None:
    """Four ranks, ep 2: ranks 0 and 1 share one copy of the experts, 2 and 3 the other."""
    by_rank = {0: routed([1, 2, 3, 4]), 1: routed([10, 0, 0, 0]), 2: routed([5, 5, 5, 5]), 3: routed([0, 0, 0, 7])}
    found = dispatched(by_rank, ParallelLayout(world_size=4, ep=2))
    assert [each.tolist() for each in found] == [[11, 2, 3, 4], [5, 5, 5, 12]]


def test_pipeline_stages_dispatch_their_own_layers() -> None:
    """Two stages of two ranks: a stage's layers meet within the stage."""
    by_rank = {
        0: [(1, torch.tensor([1, 0]))],
        1: [(1, torch.tensor([0, 2]))],
        2: [(2, torch.tensor([3, 0]))],
        3: [(2, torch.tensor([0, 4]))],
    }
    found = dispatched(by_rank, ParallelLayout(world_size=4, pp=2, ep=2))
    assert [each.tolist() for each in found] == [[1, 2], [3, 4]]


def test_the_load_by_hand() -> None:
    """Two dispatches over four experts, two ranks: the busiest rank has 30 of 40 and 10 of 20, the mean 20 and 10."""
    load = load_of([torch.tensor([20, 10, 5, 5]), torch.tensor([4, 6, 5, 5])], ep=2)
    assert (load.expert_max, load.expert_mean) == (20, 60 / 8)
    assert load.rank_imbalance == pytest.approx((30 + 10) / (20 + 10))
    assert load_of([torch.tensor([20, 10, 5, 5])], ep=4).rank_imbalance == pytest.approx(2.0)
    assert load_of([torch.tensor([20, 10, 5, 5])], ep=1).rank_imbalance == 1.0


def test_only_routers_are_listened_to_and_only_inside() -> None:
    with record_routing() as found:
        torch.nn.Linear(2, 2)(torch.zeros(1, 2))
    assert found == []
