"""Tensors handled by several threads, a few rows at a time, with progress."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20  # fits a core's cache: hashed and written while it is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a conversion or a comparison is. Bytes are those of tensors."""

    tensors: int
    num_tensors: int
    bytes: int
    num_bytes: int


ProgressFunction = Callable[[Progress], None]


class Meter:
    """Adds up what several threads have done and tells `report`, one call at a time."""

    def __init__(self, num_tensors: int, num_bytes: int, report: ProgressFunction | None) -> None:
        self.num_bytes = num_bytes
        self._num_tensors, self._report = num_tensors, report
        self._tensors = self._bytes = 0
        self._lock = threading.Lock()

    def add(self, *, tensors: int = 0, num_bytes: int = 0) -> None:
        with self._lock:
            self._tensors += tensors
            self._bytes += num_bytes
            if self._report is not None:
                self._report(Progress(tensors=self._tensors, num_tensors=self._num_tensors, bytes=self._bytes, num_bytes=self.num_bytes))


def row_blocks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each block; a block is at most 1 MiB, or one row."""
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, num_rows, step):
        yield first, min(step, num_rows - first)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def equal_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous CPU tensors of one shape and dtype hold the same bytes; unlike torch.equal, at the speed of memory."""
    return np.array_equal(np.frombuffer(bytes_of(first), np.uint8), np.frombuffer(bytes_of(second), np.uint8))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Without Python's search for reference cycles. A checkpoint is many small records and no cycle: each search visits them all in vain,
    which takes half the time of converting small tensors."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run_in_threads(work: Callable[[str], None], items: Sequence[str], *, workers: int) -> None:
    """Run work(item) for all items. The first error, in the order of the items, stops the rest and is raised."""
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1")
    pool = ThreadPoolExecutor(workers)
    try:
        for _ in pool.map(work, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
