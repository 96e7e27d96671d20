"""Shapes of what pipeline stages send each other, known before it arrives.

Packed micro-batches differ in length, so Megatron-Core's stages tell each other every shape, and wait for the device to read it. But all
stages work on the same micro-batches: what arrives has the shape of this rank's own part of the micro-batch that is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from parallel.layout import ParallelLayout
from parallel.mcore import P2PCommunicator

Shape = list[int]

_exchange = P2PCommunicator._communicate_shapes
_ABSENT = [0, 0, 0]  # Megatron-Core's word for nothing


@contextmanager
def known_shapes(tokens: Sequence[int], layout: ParallelLayout, *, stage: int, hidden_size: int, forward_only: bool) -> Iterator[None]:
    """Inside the block, one pass over micro-batches, no shape is exchanged.

    Args:
        tokens: this rank's tokens of each micro-batch, in order.
        layout: of the run.
        stage: this rank's.
        hidden_size: of the model.
        forward_only: no gradient comes back.
    """
    shapes = [[count // (layout.tp if layout.sequence_parallel else 1), 1, hidden_size] for count in tokens]
    forward, backward = (
        iter(arrivals(shapes, pp=layout.pp, chunks=layout.vpp or 1, begins_here=stage == source)) for source in (0, layout.pp - 1)
    )

    def look_up(_: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[Shape, Shape]:
        return next(forward) if recv_prev else _ABSENT, next(backward) if recv_next else _ABSENT

    P2PCommunicator._communicate_shapes = look_up
    try:
        yield
        left = [*forward, *(() if forward_only else backward)]
        assert not left, f"{len(left)} tensors of other stages were expected and did not come"
    finally:
        P2PCommunicator._communicate_shapes = _exchange


def arrivals(shapes: Sequence[Shape], *, pp: int, chunks: int, begins_here: bool) -> list[Shape]:
    """Shapes in the order in which they arrive.

    The plain schedule takes micro-batches in order, forward and backward. The interleaved one takes pp of them through one model chunk
    after the other.

    Args:
        shapes: of the micro-batches.
        pp: stages.
        chunks: model chunks of this rank.
        begins_here: forward (or backward) begins on this rank, so for one of its chunks nothing arrives.
    """
    receiving = chunks - 1 if begins_here else chunks
    size = pp if chunks > 1 else len(shapes)
    groups = [shapes[start : start + size] for start in range(0, len(shapes), size)]
    return [shape for group in groups for _ in range(receiving) for shape in group]
