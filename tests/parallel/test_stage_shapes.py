"""Shapes that stages expect of each other, against the order of Megatron-Core's own schedule table. On gloo ranks: test_actor.py."""

from __future__ import annotations

import pytest

from parallel.layout import ParallelLayout
from parallel.mcore import P2PCommunicator
from parallel.stage_shapes import arrivals, known_shapes


@pytest.mark.parametrize(("pp", "chunks", "groups"), [(2, 2, 3), (4, 2, 2), (2, 3, 1)])
def test_interleaved_arrivals_follow_megatrons_table(pp: int, chunks: int, groups: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    shapes = [[number, 1, 8] for number in range(groups * pp)]
    table = get_schedule_table(len(shapes), chunks, pp)
    all_chunks = [shapes[micro_batch] for micro_batch, _ in table]
    assert arrivals(shapes, pp=pp, chunks=chunks, begins_here=False) == all_chunks
    assert arrivals(shapes, pp=pp, chunks=chunks, begins_here=True) == [shapes[micro_batch] for micro_batch, chunk in table if chunk > 0]


def exchange(*, recv_prev: bool, recv_next: bool) -> tuple[list[int], list[int]]:
    found: tuple[list[int], list[int]] = P2PCommunicator._communicate_shapes(None, None, None, recv_prev, recv_next)
    return found


def test_a_middle_stage_expects_its_own_parts_in_both_directions() -> None:
    layout = ParallelLayout(world_size=6, pp=3, tp=2, sequence_parallel=True)
    former = P2PCommunicator._communicate_shapes
    with known_shapes([12, 8], layout, stage=1, hidden_size=5, forward_only=False):
        assert exchange(recv_prev=True, recv_next=False) == ([6, 1, 5], [0, 0, 0])  # sequence parallel: half of the tokens
        assert exchange(recv_prev=True, recv_next=True) == ([4, 1, 5], [6, 1, 5])
        assert exchange(recv_prev=False, recv_next=True) == ([0, 0, 0], [4, 1, 5])
    assert P2PCommunicator._communicate_shapes is former


def test_a_pass_that_ends_early_is_noticed() -> None:
    layout = ParallelLayout(world_size=2, pp=2)
    expected = known_shapes([12, 8], layout, stage=1, hidden_size=5, forward_only=True)
    with pytest.raises(AssertionError, match=r"^1 tensors of other stages were expected"), expected:
        exchange(recv_prev=True, recv_next=False)
    with known_shapes([12, 8], layout, stage=0, hidden_size=5, forward_only=True):
        pass  # the first stage receives nothing in forward
