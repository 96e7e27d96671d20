"""The order in which a stage's tensors arrive, against Megatron-Core's schedule written out by hand."""

from __future__ import annotations

from parallel.rehearsal.pipeline_shapes import arrivals

SHAPES = [[tokens, 1, 8] for tokens in (10, 20, 30, 40)]


def numbers(found: list[list[int]]) -> list[int]:
    return [shape[0] // 10 for shape in found]


def test_plain_stages_receive_micro_batches_in_order() -> None:
    assert numbers(arrivals(SHAPES, pp=4, chunks=1, is_source=False)) == [1, 2, 3, 4]
    assert arrivals(SHAPES, pp=4, chunks=1, is_source=True) == []


def test_interleaved_stages_receive_pp_micro_batches_per_chunk() -> None:
    assert numbers(arrivals(SHAPES, pp=2, chunks=2, is_source=False)) == [1, 2, 1, 2, 3, 4, 3, 4]


def test_the_first_chunk_of_an_interleaved_source_receives_nothing() -> None:
    assert numbers(arrivals(SHAPES, pp=2, chunks=3, is_source=True)) == [1, 2, 1, 2, 3, 4, 3, 4]
