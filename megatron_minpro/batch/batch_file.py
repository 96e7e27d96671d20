"""One file of the run folder for what is far larger than all other streams of a batch together, a few hundred bytes a token.

Such streams are never sent between ranks and never held as Python numbers. Each rank maps the file and reads what it trains. Writers use
`pwrite` and not a map, so that nodes that share a file system write bytes and not pages.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch import Tensor


def create(path: Path, num_bytes: int) -> None:
    """An empty file of full size, and the folder around it. A file of an earlier attempt goes: a checkpoint may hold it by another name."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        file.truncate(num_bytes)


def mapped(path: Path, num_bytes: int, *, holds: str) -> Tensor:
    """The file as uint8 [num_bytes]; nothing is read yet. holds: what is in it. Raises ValueError, which says so, for another size."""
    size = path.stat().st_size
    if size != num_bytes:
        raise ValueError(f"{path}: has {size:,} bytes, expected {num_bytes:,}, {holds}")
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def write_at(descriptor: int, tensor: Tensor, place: int) -> None:
    """All bytes of a CPU tensor into an open file. Raises OSError where the disk is full."""
    left = memoryview(tensor.contiguous().view(torch.uint8).view(-1).numpy().data)
    while left:
        written = os.pwrite(descriptor, left, place)
        left, place = left[written:], place + written


class AppendedFile:
    """A file that several threads append to. It also holds what nobody trains, such as groups that dynamic sampling drops."""

    def __init__(self, path: Path) -> None:
        """Make the file, see `create`."""
        create(path, 0)
        self._name = path.name
        self._descriptor: int | None = os.open(path, os.O_RDWR)
        self._num_bytes = 0
        self._lock = threading.Lock()

    def append(self, *tensors: Tensor) -> int:
        """Their bytes, one after the other; the place of the first one. Raises OSError where the disk is full, ValueError once closed."""
        with self._lock:
            if self._descriptor is None:
                raise ValueError(f"{self._name}: rows of an answer that nobody waits for any more")
            first = place = self._num_bytes
            for tensor in tensors:
                write_at(self._descriptor, tensor, place)
                place += tensor.nbytes
            self._num_bytes = place
        return first

    def read(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What was appended there."""
        assert self._descriptor is not None
        size = torch.Size(shape).numel() * dtype.itemsize
        return torch.frombuffer(bytearray(os.pread(self._descriptor, size, place)), dtype=dtype).view(shape)

    def close(self) -> int:
        """From now on nothing is appended. Gives the bytes of the whole file."""
        with self._lock:
            assert self._descriptor is not None
            os.close(self._descriptor)
            self._descriptor = None
        return self._num_bytes
