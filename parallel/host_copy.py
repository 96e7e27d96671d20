"""Tensors copied from the device to ordinary host memory through a few pinned buffers of fixed size.

A GPU writes pinned memory several times faster than pageable memory, but pinning everything that a checkpoint holds would take that
memory away from the machine. So each buffer is filled by the device while the host empties another one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    copy_into(zip(copies, tensors, strict=True), from_cuda=any(tensor.is_cuda for tensor in tensors))
    return copies


def copy_into(pairs: Iterable[tuple[Tensor, Tensor]], *, from_cuda: bool) -> None:
    """Copy each tensor into its target on the host. Returns when all copies are complete.

    Args:
        pairs: (target, source): the target contiguous and on the host, the source of the same shape and dtype. Taken one at a time, so
            that a temporary source can be freed after its copy.
        from_cuda: whether any source lies on a GPU.
    """
    if from_cuda:
        buffers = [torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)]
        copy_through(buffers, pairs, new_event=torch.cuda.Event)
        return
    for target, tensor in pairs:
        target.copy_(tensor.detach())


def copy_through(buffers: Sequence[Tensor], pairs: Iterable[tuple[Tensor, Tensor]], *, new_event: Callable[[], Event]) -> None:
    """As `copy_into` for a GPU, through the given buffers.

    Args:
        buffers: uint8 [bytes] on the host, all of one size.
        pairs: as in `copy_into`.
        new_event: marks when the device has filled a buffer.
    """
    free, filling = deque(buffers), deque[tuple[Event, Tensor, Tensor]]()

    def empty_oldest() -> None:
        event, filled, target = filling.popleft()
        event.synchronize()
        target.copy_(filled[: len(target)])
        free.append(filled)

    for target, source in _pieces(pairs, size=len(buffers[0])):
        if not free:
            empty_oldest()
        buffer = free.popleft()
        buffer[: len(source)].copy_(source, non_blocking=True)
        event = new_event()
        event.record()
        filling.append((event, buffer, target))
    while filling:
        empty_oldest()


def _pieces(pairs: Iterable[tuple[Tensor, Tensor]], *, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes of every target and of its source, at most `size` at a time."""
    for target, source in pairs:
        if source.numel():
            yield from zip(_bytes(target).split(size), _bytes(source.detach()).split(size), strict=True)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
