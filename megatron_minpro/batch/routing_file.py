"""The experts that a batch's tokens visited, in one file of the run folder (batch_file.py).

    RUN/routing/step_000012.rows    for each response its rows [layers, L - 1, k] (parallel/expert_rows.py), one response after the other

Bytes of one response lie together and, inside, those of one layer: a pipeline stage reads and writes one run of bytes for each response.
Rows that the trainer records have their places before they are written (RowWriter). Rows of servers get theirs in the order in which they
arrive (RoutingAppender).
"""

from __future__ import annotations

import math
import os
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
from megatron_minpro.batch.batch_file import AppendedFile, create, mapped, write_at
from megatron_minpro.batch.folders import ROUTING_FOLDER
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
    def path(self) -> str:
        """In the run folder."""
        return f"{ROUTING_FOLDER}/{self.name}"

    @property
    def dtype(self) -> torch.dtype:
        return row_dtype(self.num_experts)

    def create(self, folder: Path) -> None:
        """See batch_file.create. Rows that nobody writes are zeros, which no reader accepts."""
        create(folder / self.name, self.num_bytes)

    def rows(self, folder: Path, lengths: Sequence[int]) -> list[Tensor]:
        """Each response's rows, as views of the mapped file: nothing is read yet.

        Args:
            folder: holds the file.
            lengths: positions of each response, L - 1.

        Raises:
            ValueError: the file has another size.
        """
        bytes_of_file = mapped(folder / self.name, self.num_bytes, holds=f"the chosen experts of {len(lengths)} responses")
        found = []
        for offset, length in zip(self.offsets, lengths, strict=True):
            shape = (self.num_layers, length, self.experts_per_token)
            if offset is None:
                found.append(missing_rows(*shape, num_experts=self.num_experts))
            else:
                num_bytes = shape[0] * shape[1] * shape[2] * self.dtype.itemsize
                found.append(bytes_of_file[offset : offset + num_bytes].view(self.dtype).view(shape))
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
        """Make the file. step: global step that samples the batch."""
        self._file = RoutingFile.of(architecture, step=step, lengths=())
        self._appended = AppendedFile(folder / self._file.name)

    def keep(self, ids: bytes, *, num_inputs: int) -> int:
        """See RouteSink. Gives the place of the rows in the file. Raises OSError where the disk is full."""
        shape = (num_inputs, self._file.num_layers, self._file.experts_per_token)
        if len(ids) != 4 * math.prod(shape):
            raise ValueError(
                f"{len(ids):,} bytes of experts, expected {4 * math.prod(shape):,}: {shape[0]} tokens x {shape[1]} layers x {shape[2]} "
                "experts of 4 bytes"
            )
        return self._appended.append(rows_of(np.frombuffer(ids, dtype="<i4").reshape(shape), num_experts=self._file.num_experts))

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
            rows[:, done:end] = self._appended.read(place, (file.num_layers, end, file.experts_per_token), file.dtype)[:, done:]
            done = end
        return self._appended.append(rows)

    def close(self, offsets: Sequence[int | None]) -> RoutingFile:
        """The complete file; from now on nothing is written into it. offsets: of the batch's responses."""
        return replace(self._file, offsets=tuple(offsets), num_bytes=self._appended.close())


def file_name(step: int) -> str:
    """Of the batch that was sampled in a global step."""
    return f"step_{step:06d}.rows"
