"""The routing-imbalance study on counts made by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_minpro.cluster.planning import plain_work
from megatron_minpro.scaling.routing import counts_of_sequence, dispatch_tokens, gather, routing_costs
from megatron_minpro.scaling.study import make_cases
from parallel.layout import ParallelLayout
from parallel.planner.hardware import read_hardware
from parallel.planner.models import FOLDER, read_shape
from tests.megatron_minpro.scaling.test_rows import TRAINING


def test_a_texts_choices_are_added_over_ranks_and_replicas_taken_out() -> None:
    """Two replicas of two context-parallel ranks work on the same text."""
    halves = [[(2, torch.tensor([1, 0])), (1, torch.tensor([0, 3]))], [(2, torch.tensor([1, 1])), (1, torch.tensor([4, 0]))]]
    assert counts_of_sequence([*halves, *halves], copies=2).tolist() == [[4, 3], [2, 1]]


def test_texts_fill_dispatches_and_the_rest_is_left_out() -> None:
    counts_NLE = torch.arange(5).view(5, 1, 1)
    assert [each.item() for each in gather(counts_NLE, [10, 10, 10, 10, 10], tokens=25)] == [0 + 1, 2 + 3]
    assert [each.item() for each in gather(counts_NLE, [10, 10, 10, 10, 10], tokens=100)] == [10]  # fewer than one dispatch: what there is
    assert [each.item() for each in gather(counts_NLE, [30, 30, 30, 30, 30], tokens=25)] == [0, 1, 2, 3]  # a long one stands alone


def test_micro_batches_of_all_replicas_that_share_experts_meet() -> None:
    assert dispatch_tokens(ParallelLayout(world_size=8, ep=8), 100) == 800
    assert dispatch_tokens(ParallelLayout(world_size=8, ep=8, cp=4), 100) == 200
    assert dispatch_tokens(ParallelLayout(world_size=8, ep=2, cp=4), 100) == 100


def test_an_uneven_checkpoint_costs_time_where_experts_are_spread() -> None:
    """One layer whose first half of experts gets three quarters of the choices: 1.5 at ep 2, nothing at ep 1."""
    shape = read_shape(FOLDER / "qwen3_30b_a3b.json")
    counts_NLE = torch.cat([torch.full((2, 1, 64), 3), torch.full((2, 1, 64), 1)], dim=2)
    cases = make_cases(ParallelLayout(world_size=1), shape, ep_sizes=(1, 2, 3), world_sizes=(), scalings=("strong",), sequences=16)
    costs = routing_costs(counts_NLE, [32, 32], cases, shape, TRAINING, read_hardware("h100"), plain_work(16, 4096, 1))
    assert [cost.ep for cost in costs] == [1, 2]  # 3 does not divide the experts
    assert [cost.rank_imbalance for cost in costs] == pytest.approx([1.0, 1.5])
    assert costs[0].slowdown == 1.0
    assert costs[1].slowdown > 1.05
    assert costs[1].dispatch_tokens == 64  # (3 + 1) x 64 choices of 8 each, twice
