"""Tensors from one process to another in anonymous shared memory.

The memory has no name, only file descriptors and mappings: when both processes are done with it, or dead, the kernel frees it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64  # a cache line


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one tensor lies in the block."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def share(tensors: Sequence[Tensor]) -> tuple[int, tuple[Place, ...]]:
    """Copy CPU tensors into one block.

    Returns:
        The block's file descriptor, which the caller closes once it is sent, and the tensors' places.
    """
    places, end = [], 0
    for tensor in tensors:
        places.append(Place(offset=end, shape=tuple(tensor.shape), dtype=tensor.dtype))
        end += -(-places[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
    descriptor = os.memfd_create("minpro tensors", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, max(end, 1))
        for view, tensor in zip(_views(descriptor, places), tensors, strict=True):
            view.copy_(tensor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, tuple(places)


def attach(descriptor: int, places: Sequence[Place]) -> list[Tensor]:
    """The tensors of a block that `share` made in another process. They keep the memory alive; the descriptor is closed."""
    try:
        return _views(descriptor, places)
    finally:
        os.close(descriptor)


def _views(descriptor: int, places: Sequence[Place]) -> list[Tensor]:
    block = mmap.mmap(descriptor, 0)  # unmapped when the last view of it is gone
    return [_view(block, place) for place in places]


def _view(block: mmap.mmap, place: Place) -> Tensor:
    if not place.nbytes:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(block, dtype=place.dtype, count=math.prod(place.shape), offset=place.offset).view(place.shape)
