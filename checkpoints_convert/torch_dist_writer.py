"""Writes a Megatron torch_dist checkpoint row by row, in any order, from several threads; no Megatron, no process group."""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from checkpoints_convert.copying import bytes_of
from checkpoints_convert.torch_dist_metadata import Chunk, Shape, write_metadata
from checkpoints_convert.torch_record import frame

# A rank that loads reads every chunk it needs a part of, whole.
_LARGEST_CHUNK = 64 << 20
_LARGEST_FILE = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One parameter inside a saved tensor: `saved[index]`, of the shape that remains. Its rows are cut into `row_parts` equal chunks."""

    key: str
    saved_shape: Shape
    dtype: torch.dtype
    index: Shape
    row_parts: int

    @property
    def shape(self) -> Shape:
        return self.saved_shape[len(self.index) :]


@dataclass(slots=True)
class _PlannedPart:
    part: Part
    chunks: list[Chunk] = field(default_factory=list)
    missing_rows: int = 0


def plan_chunks(parts: Iterable[Part]) -> tuple[dict[tuple[str, Shape], list[Chunk]], dict[str, int]]:
    """Where every chunk of every part will lie, in the order of the parts; and the size of each file in bytes."""
    plan: dict[tuple[str, Shape], list[Chunk]] = {}
    files: dict[str, int] = {}
    number, position = 0, 0
    for part in parts:
        if (part.key, part.index) in plan:
            raise ValueError(f"tensor {part.key!r}: part {part.index} is planned twice; expected once")
        chunks = plan[part.key, part.index] = []
        for first, count in _row_ranges(part):
            start = (*part.index, first, *(0 for _ in part.shape[1:]))
            shape = (*(1 for _ in part.index), count, *part.shape[1:])
            before, after = frame(shape, part.dtype)
            length = len(before) + math.prod(shape) * part.dtype.itemsize + len(after)
            if position and position + length > _LARGEST_FILE:
                number, position = number + 1, 0
            name = f"__0_{number}.distcp"
            chunks.append(Chunk(start, shape, name, position, length))
            position += length
            files[name] = position
    return plan, files


def _row_ranges(part: Part) -> list[tuple[int, int]]:
    rows = part.shape[0]
    if rows % part.row_parts:
        raise ValueError(f"tensor {part.key!r}: {rows} rows cannot be cut into {part.row_parts} equal parts")
    row_bytes = math.prod(part.shape[1:]) * part.dtype.itemsize
    most = max(1, _LARGEST_CHUNK // row_bytes)
    length = rows // part.row_parts
    return [(first + done, min(most, length - done)) for first in range(0, rows, length) for done in range(0, length, most)]


class TorchDistWriter:
    """The data files of one plan. `destination` names the checkpoint in errors; `objects` are keys that hold None, not tensors.

        with TorchDistWriter(directory, parts, objects=(), destination=directory) as writer:
            writer.write_rows(key, index, first_row, rows)
            writer.finish()

    directory: exists; with `reopen` it holds the files of an unfinished attempt at the same plan, and `skip` tells what is there.
    """

    def __init__(self, directory: Path, parts: Iterable[Part], *, objects: Iterable[str], destination: Path, reopen: bool = False) -> None:
        parts = list(parts)
        self._directory, self._destination = directory, destination
        self._objects = tuple(objects)
        plan, self._files = plan_chunks(parts)
        self._parts = {(part.key, part.index): _PlannedPart(part, plan[part.key, part.index], part.shape[0]) for part in parts}
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if reopen else os.O_EXCL)
        try:
            for name, size in self._files.items():
                self._descriptors[name] = os.open(directory / name, flags, 0o666)
                os.ftruncate(self._descriptors[name], size)
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        """Size of all data files, records' frames included."""
        return sum(self._files.values())

    def write_rows(self, key: str, index: Shape, first: int, rows: Tensor) -> None:
        """Put rows first, first + 1, ... of the part `index` of a tensor in their place. Each row is to be given once.

        Raises ValueError naming the tensor when it is unknown, its rows are out of range, or shape or dtype differ from the plan.
        """
        planned = self._planned(key, index)
        part = planned.part
        end = first + rows.shape[0]
        if rows.dtype != part.dtype or tuple(rows.shape[1:]) != part.shape[1:] or not 0 <= first <= end <= part.shape[0]:
            raise ValueError(
                f"{self._destination}: rows {first} to {end} of {key!r} {index} are {rows.dtype} {tuple(rows.shape)}; "
                f"expected {part.dtype} and rows of {part.shape}"
            )
        for chunk in planned.chunks:
            chunk_first = chunk.start[len(index)]
            chunk_end = chunk_first + chunk.shape[len(index)]
            low, high = max(first, chunk_first), min(end, chunk_end)
            if low < high:
                self._write(chunk, part, low - chunk_first, rows[low - first : high - first])
        with self._lock:
            planned.missing_rows -= end - first

    def skip(self, key: str, index: Shape) -> None:
        """Count a part as written: an earlier attempt wrote it."""
        planned = self._planned(key, index)
        with self._lock:
            planned.missing_rows -= planned.part.shape[0]

    def sync(self) -> None:
        """Flush what has been written so far to the disk."""
        for descriptor in list(self._descriptors.values()):
            os.fdatasync(descriptor)

    def finish(self) -> None:
        """Write the metadata. Raises ValueError naming the first tensor whose rows were not each given once."""
        for planned in self._parts.values():
            if planned.missing_rows:
                raise ValueError(
                    f"{self._destination}: {planned.missing_rows} rows of {planned.part.key!r} {planned.part.index} too few; "
                    "expected each row once"
                )
        tensors: dict[str, list[_PlannedPart]] = {}
        for planned in self._parts.values():
            tensors.setdefault(planned.part.key, []).append(planned)
        write_metadata(
            self._directory,
            (
                (key, same[0].part.saved_shape, same[0].part.dtype, [chunk for planned in same for chunk in planned.chunks])
                for key, same in tensors.items()
            ),
            self._write_objects(),
        )

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _planned(self, key: str, index: Shape) -> _PlannedPart:
        if (key, index) not in self._parts:
            raise ValueError(f"{self._destination}: {key!r} {index} is not part of this checkpoint")
        return self._parts[key, index]

    def _write(self, chunk: Chunk, part: Part, row: int, rows: Tensor) -> None:
        before, after = frame(chunk.shape, part.dtype)
        data = bytes_of(rows.contiguous())
        offset = chunk.offset + len(before) + row * math.prod(part.shape[1:]) * part.dtype.itemsize
        pieces = [data]
        if row == 0:
            pieces.insert(0, memoryview(before))
            offset -= len(before)
        if row + rows.shape[0] == chunk.shape[len(part.index)]:
            pieces.append(memoryview(after))
        self._write_at(chunk.file_name, offset, pieces, part.key)

    def _write_at(self, file_name: str, offset: int, pieces: Sequence[memoryview], key: str) -> None:
        remaining = list(pieces)
        while remaining:
            try:
                count = os.pwritev(self._descriptors[file_name], remaining, offset)
            except OSError as error:  # it knows no file name; a full disk should say where, and while writing what
                raise OSError(error.errno, f"{error.strerror} while writing {key!r}", str(self._destination / file_name)) from error
            offset += count
            while remaining and count >= len(remaining[0]):
                count -= len(remaining.pop(0))
            if remaining and count:
                remaining[0] = remaining[0][count:]

    def _write_objects(self) -> Mapping[str, Chunk]:
        """Every object is None, so all of them share one record, behind the last tensor."""
        if not self._objects:
            return {}
        buffer = io.BytesIO()
        torch.save([None], buffer)  # Megatron wraps each object in a list
        record = buffer.getvalue()
        name = list(self._files)[-1]
        chunk = Chunk((), (), name, self._files[name], len(record))
        self._write_at(name, chunk.offset, [memoryview(record)], self._objects[0])
        return dict.fromkeys(self._objects, chunk)
