"""The experts that a batch's tokens visited, in one file of the run folder. They are far larger than all other streams together.

    RUN/routing/step_000012.rows    for each response its rows [layers, L - 1, k] (parallel/expert_rows.py), one response after the other

Bytes of one response lie together and, inside, those of one layer: a pipeline stage reads and writes one run of bytes for each response.
Rows are never sent between ranks and never held as Python numbers. Each rank maps the file and reads the rows of what it trains. It writes
with `pwrite` and not through a map, so that nodes that share a file system write bytes and not pages.

Rows that the trainer records have their places before they are written (RowWriter). Rows of servers get theirs in the order in which they
arrive (RoutingAppender): the file then also holds what nobody trains, such as groups that dynamic sampling drops.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints_convert.hf_config import Architecture
from parallel.expert_rows import missing_rows, row_dtype, rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFile:
    """Where the rows of a batch lie. Knows the file's name, not its folder: a run folder may be moved."""

    name: str
    num_layers: int
    num_experts: int
    experts_per_token: int
    offsets: tuple[int | None, ...]  # of each response's rows, in bytes; None: its rows are missing
    num_bytes: int  # of the whole file

    @classmethod
    def of(cls, architecture: Architecture, *, step: int, lengths: Sequence[int]) -> RoutingFile:
        """A file with room for all rows of a batch.

        Args:
            architecture: of the model.
            step: global step that sampled the batch.
            lengths: positions of each response with its prompt, L - 1.
        """
        assert architecture.num_experts is not None and architecture.num_experts_per_tok is not None
        a_position = architecture.num_hidden_layers * architecture.num_experts_per_tok * row_dtype(architecture.num_experts).itemsize
        ends = list(accumulate((length * a_position for length in lengths), initial=0))
        return cls(
            name=file_name(step),
            num_layers=architecture.num_hidden_layers,
            num_experts=architecture.num_experts,
            experts_per_token=architecture.num_experts_per_tok,
            offsets=tuple(ends[:-1]),
            num_bytes=ends[-1],
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RoutingFile:
        """The counterpart of dataclasses.asdict, after a journey as JSON."""
        return cls(**{**record, "offsets": tuple(record["offsets"])})

    @property
    def dtype(self) -> torch.dtype:
        return row_dtype(self.num_experts)

    def create(self, folder: Path) -> None:
        """An empty file of full size; one of an earlier attempt goes. Rows that nobody writes are zeros, which no reader accepts."""
        folder.mkdir(exist_ok=True)
        (folder / self.name).unlink(missing_ok=True)  # a checkpoint may hold the same file under another name
        with open(folder / self.name, "xb") as file:
            file.truncate(self.num_bytes)

    def rows(self, folder: Path, lengths: Sequence[int]) -> list[Tensor]:
        """Each response's rows, as views of the mapped file: nothing is read yet.

        Args:
            folder: holds the file.
            lengths: positions of each response, L - 1.

        Raises:
            ValueError: the file has another size.
        """
        path, size = folder / self.name, (folder / self.name).stat().st_size
        if size != self.num_bytes:
            raise ValueError(f"{path}: has {size:,} bytes, expected {self.num_bytes:,}, the chosen experts of {len(lengths)} responses")
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        found = []
        for offset, length in zip(self.offsets, lengths, strict=True):
            shape = (self.num_layers, length, self.experts_per_token)
            if offset is None:
                found.append(missing_rows(*shape, num_experts=self.num_experts))
            else:
                num_bytes = shape[0] * shape[1] * shape[2] * self.dtype.itemsize
                found.append(mapped[offset : offset + num_bytes].view(self.dtype).view(shape))
        return found

    @contextmanager
    def writer(self, folder: Path, lengths: Sequence[int]) -> Iterator[RowWriter]:
        """Writes rows into the file that `create` made. Other ranks may do the same: the file is complete when all have left the block."""
        descriptor = os.open(folder / self.name, os.O_WRONLY)
        try:
            yield RowWriter(descriptor, self, lengths)
        finally:
            os.close(descriptor)


class RowWriter:
    """The `parallel.routing_replay.RowSink` of a file."""

    def __init__(self, descriptor: int, file: RoutingFile, lengths: Sequence[int]) -> None:
        self._descriptor = descriptor
        self._file = file
        self._lengths = lengths

    def write(self, index: int, layer: int, position: int, rows: Tensor) -> None:
        """See RowSink. Raises OSError where the disk is full."""
        offset, a_row = self._file.offsets[index], self._file.experts_per_token * self._file.dtype.itemsize
        assert offset is not None and rows.dtype == self._file.dtype
        place = offset + (layer * self._lengths[index] + position) * a_row
        write_at(self._descriptor, rows, place)


class RoutingAppender:
    """Rows of answers in the order in which they arrive, from several threads. The `rollout.records.RouteSink` of a batch."""

    def __init__(self, folder: Path, architecture: Architecture, *, step: int) -> None:
        """Make the file, see RoutingFile.create. step: global step that samples the batch."""
        self._file = RoutingFile.of(architecture, step=step, lengths=())
        self._file.create(folder)
        self._descriptor: int | None = os.open(folder / self._file.name, os.O_RDWR)
        self._num_bytes = 0
        self._lock = threading.Lock()

    def keep(self, ids: bytes, *, num_inputs: int) -> int:
        """See RouteSink. Gives the place of the rows in the file. Raises OSError where the disk is full."""
        shape = (num_inputs, self._file.num_layers, self._file.experts_per_token)
        if len(ids) != 4 * math.prod(shape):
            raise ValueError(
                f"{len(ids):,} bytes of experts, expected {4 * math.prod(shape):,}: {shape[0]} tokens x {shape[1]} layers x {shape[2]} "
                "experts of 4 bytes"
            )
        return self._append(rows_of(np.frombuffer(ids, dtype="<i4").reshape(shape), num_experts=self._file.num_experts))

    def joined(self, answers: Sequence[tuple[int, int]], *, num_inputs: int) -> int:
        """The place of one response's rows. Each token has the experts that it visited first; those after the last answer have none.

        Args:
            answers: place and number of inputs of each of its answers. An answer's inputs begin with those of the answer before.
            num_inputs: of the response, L - 1.
        """
        if len(answers) == 1 and answers[0][1] == num_inputs:
            return answers[0][0]
        file = self._file
        rows = missing_rows(file.num_layers, num_inputs, file.experts_per_token, num_experts=file.num_experts).clone()
        done = 0
        for place, end in answers:
            rows[:, done:end] = self._read(place, end)[:, done:]
            done = end
        return self._append(rows)

    def close(self, offsets: Sequence[int | None]) -> RoutingFile:
        """The complete file; from now on nothing is written into it. offsets: of the batch's responses."""
        with self._lock:
            assert self._descriptor is not None
            os.close(self._descriptor)
            self._descriptor = None
        return replace(self._file, offsets=tuple(offsets), num_bytes=self._num_bytes)

    def _append(self, rows: Tensor) -> int:
        with self._lock:
            if self._descriptor is None:
                raise ValueError(f"{self._file.name}: experts of an answer that nobody waits for any more")
            place = self._num_bytes
            write_at(self._descriptor, rows, place)
            self._num_bytes += rows.nbytes
        return place

    def _read(self, place: int, num_inputs: int) -> Tensor:
        assert self._descriptor is not None
        shape = (self._file.num_layers, num_inputs, self._file.experts_per_token)
        read = bytearray(os.pread(self._descriptor, math.prod(shape) * self._file.dtype.itemsize, place))
        return torch.frombuffer(read, dtype=self._file.dtype).view(shape)


def write_at(descriptor: int, tensor: Tensor, place: int) -> None:
    """All bytes of a CPU tensor into an open file. Raises OSError where the disk is full."""
    left = memoryview(tensor.contiguous().view(torch.uint8).view(-1).numpy().data)
    while left:
        written = os.pwrite(descriptor, left, place)
        left, place = left[written:], place + written


def file_name(step: int) -> str:
    """Of the batch that was sampled in a global step."""
    return f"step_{step:06d}.rows"
