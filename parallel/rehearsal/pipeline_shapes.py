"""Shapes that a pipeline stage is told by its neighbours, put in place of what the fake exchange of shapes brought.

Stages work on the same micro-batches, so what arrives has the shape of this rank's own part of the micro-batch that is due. Forward
and backward of the plain schedule take them in order; the interleaved schedule takes pp of them through one model chunk after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from parallel.layout import ParallelLayout

Shape = list[int]


class PipelineShapes:
    """What this rank expects from its neighbours during one pass over the micro-batches."""

    def __init__(self) -> None:
        self._forward: Iterator[Shape] = iter(())
        self._backward: Iterator[Shape] = iter(())

    def expect(self, tokens: Sequence[int], layout: ParallelLayout, *, stage: int, hidden_size: int) -> None:
        """A pass begins over micro-batches of so many local tokens."""
        rows = [count // (layout.tp if layout.sequence_parallel else 1) for count in tokens]
        shapes = [[count, 1, hidden_size] for count in rows]
        self._forward = iter(arrivals(shapes, pp=layout.pp, chunks=layout.vpp or 1, is_source=stage == 0))
        self._backward = iter(arrivals(shapes, pp=layout.pp, chunks=layout.vpp or 1, is_source=stage == layout.pp - 1))

    def install(self) -> None:
        """Answer for the rest of the process."""
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        exchange = P2PCommunicator._communicate_shapes
        expected = self

        def communicate(self: Any, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
            previous, following = exchange(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next)
            return (next(expected._forward) if recv_prev else previous), (next(expected._backward) if recv_next else following)

        P2PCommunicator._communicate_shapes = communicate


def arrivals(shapes: Sequence[Shape], *, pp: int, chunks: int, is_source: bool) -> list[Shape]:
    """Shapes in the order in which they arrive. is_source: this rank begins the first of its chunks itself and receives nothing for it."""
    per_group = chunks - 1 if is_source else chunks
    if chunks == 1:
        return list(shapes) * per_group
    groups = [shapes[start : start + pp] for start in range(0, len(shapes), pp)]
    return [shape for group in groups for _ in range(per_group) for shape in group]
