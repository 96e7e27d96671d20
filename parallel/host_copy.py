"""Tensors copied from the device to ordinary host memory through a few pinned buffers of fixed size.

A GPU writes pinned memory several times faster than pageable memory, but pinning everything that a checkpoint holds would take that
memory away from the machine. So each buffer is filled by the device while the host empties another one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

_BUFFERS, _BUFFER_BYTES = 4, 32 << 20


class Event(Protocol):
    """Of torch.cuda: a point in the device's work."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def copy_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each tensor on the host, of its own shape and dtype. Waits until all are complete."""
    tensors = [tensor.detach() for tensor in tensors]
    if not any(tensor.is_cuda for tensor in tensors):
        return [tensor.to("cpu", copy=True) for tensor in tensors]
    buffers = [torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)]
    return copy_through(buffers, tensors, new_event=torch.cuda.Event)


def copy_through(buffers: Sequence[Tensor], tensors: Sequence[Tensor], *, new_event: Callable[[], Event]) -> list[Tensor]:
    """The same through given buffers.

    Args:
        buffers: uint8 [bytes] on the host, all of one size.
        tensors: on the device, or anywhere.
        new_event: marks when the device has filled a buffer.
    """
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    free, filling = deque(buffers), deque[tuple[Event, Tensor, Tensor]]()

    def empty_oldest() -> None:
        event, filled, target = filling.popleft()
        event.synchronize()
        target.copy_(filled[: len(target)])
        free.append(filled)

    for source, target in _pieces(tensors, copies, size=len(buffers[0])):
        if not free:
            empty_oldest()
        buffer = free.popleft()
        buffer[: len(source)].copy_(source, non_blocking=True)
        event = new_event()
        event.record()
        filling.append((event, buffer, target))
    while filling:
        empty_oldest()
    return copies


def _pieces(sources: Sequence[Tensor], targets: Sequence[Tensor], *, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes of every source and of its target, at most `size` at a time."""
    for source, target in zip(sources, targets, strict=True):
        if source.numel():
            yield from zip(_bytes(source).split(size), _bytes(target).split(size), strict=True)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
