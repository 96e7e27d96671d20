"""Hugging Face safetensors folders, read and written one tensor, or a few of its rows, at a time with memory for that much.

Bytes are read with pread and written with pwrite: no mapping, so resident memory stays flat and a file that shrinks under us is an
error rather than a SIGBUS. The layout of the files is in safetensors_format.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints_convert.atomic_directory import new_directory
from checkpoints_convert.copying import bytes_of
from checkpoints_convert.nearest_name import did_you_mean
from checkpoints_convert.other_formats import found_instead
from checkpoints_convert.safetensors_format import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorSpec,
    file_order,
    header,
    index_content,
    plan_shards,
    read_header,
    read_index,
)

# Computed from the configuration, and stored by some older tools: no part of the model.
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_LONGEST_TRANSFER = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


class _Location(NamedTuple):
    path: Path
    descriptor: int
    offset: int  # bytes from the start of the file
    spec: TensorSpec


class SafetensorsReader:
    """The tensors of a Hugging Face folder (one model.safetensors, or shards with an index), checked when opened, read on demand.

        with SafetensorsReader(directory) as reader:
            for name in reader.names:
                tensor = reader.read(name)

    Opening reads the headers only and raises ValueError, naming file and tensor, for: no weights or both kinds of weights, a file
    that is truncated or too long, a malformed header, an index that names an absent file, or that disagrees with the files about
    which tensor is where. Buffers of the rotary embedding are left out: they are no weights.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._locations: dict[str, _Location] = {}
        self._descriptors: list[int] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names; file by file, inside a file in the order of its bytes."""
        return tuple(self._locations)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._location(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        return self._location(name).spec.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._location(name).spec.dtype

    def spec(self, name: str) -> TensorSpec:
        """Name, shape and dtype."""
        return self._location(name).spec

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, in memory of its own. Raises ValueError for an unknown name or a file that has shrunk since."""
        location = self._location(name)
        tensor = torch.empty(location.spec.shape, dtype=location.spec.dtype)
        self._fill(tensor, location, location.offset)
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows start to end - 1 along dim 0, on the CPU, in memory of their own; errors as `read`, and for rows that do not exist."""
        location = self._location(name)
        shape = location.spec.shape
        if not shape or not 0 <= start <= end <= shape[0]:
            raise ValueError(f"{location.path}: rows {start} to {end} of {name} asked for; expected rows inside its shape {shape}")
        rows = torch.empty((end - start, *shape[1:]), dtype=location.spec.dtype)
        row_bytes = location.spec.num_bytes // shape[0] if shape[0] else 0
        self._fill(rows, location, location.offset + start * row_bytes)
        return rows

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _location(self, name: str) -> _Location:
        if name not in self._locations:
            raise ValueError(f"{self.directory}: tensor {name!r} is missing; {did_you_mean(name, self._locations)}")
        return self._locations[name]

    def _open(self) -> None:
        if not self.directory.is_dir():
            raise ValueError(f"{self.directory}: no such directory; expected a Hugging Face model folder")
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if single.exists() and index.exists():
            raise ValueError(f"{self.directory}: holds both {SINGLE_FILE} and {INDEX_FILE}; expected one of them")
        if single.exists():
            self._open_file(single)
        elif index.exists():
            self._open_shards(index)
        else:
            raise ValueError(
                f"{self.directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; expected a folder with safetensors weights"
                f"{found_instead(self.directory)}"
            )
        for name in [name for name in self._locations if name.endswith(_BUFFERS)]:
            del self._locations[name]

    def _open_shards(self, index: Path) -> None:
        weight_map = read_index(index).weight_map
        for file_name in sorted(set(weight_map.values())):
            path = self.directory / file_name
            if not path.is_file():
                missing = sum(owner == file_name for owner in weight_map.values())
                raise ValueError(f"{index}: places {missing} tensors in {file_name}, which is absent; expected the file {path}")
            self._open_file(path)
        for name, file_name in weight_map.items():
            if name not in self._locations:
                raise ValueError(f"{index}: places tensor {name!r} in {file_name}; expected it in that file's header, where it is missing")
        for name, location in self._locations.items():
            if weight_map.get(name) != location.path.name:
                raise ValueError(
                    f"{location.path}: holds tensor {name!r}; expected the index to place it here, it says {weight_map.get(name)}"
                )

    def _open_file(self, path: Path) -> None:
        if not path.is_file():  # opening a FIFO would wait for a writer
            raise ValueError(f"{path}: is not a regular file; expected safetensors weights")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.append(descriptor)
        for spec, offset in read_header(path, descriptor):
            if spec.name in self._locations:
                raise ValueError(
                    f"{path}: holds tensor {spec.name!r}, which {self._locations[spec.name].path.name} holds too; expected one"
                )
            self._locations[spec.name] = _Location(path, descriptor, offset, spec)

    def _fill(self, tensor: Tensor, location: _Location, offset: int) -> None:
        if not self._descriptors:
            raise ValueError(f"{self.directory}: is closed; expected an open reader to read {location.spec.name!r}")
        remaining = bytes_of(tensor)
        while remaining:
            count = os.preadv(location.descriptor, [remaining[:_LONGEST_TRANSFER]], offset)
            if count == 0:
                raise ValueError(f"{location.path}: ends inside tensor {location.spec.name!r}; expected {len(remaining)} more bytes")
            remaining, offset = remaining[count:], offset + count


def write_checkpoint(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    specs: Iterable[tuple[str, Sequence[int], torch.dtype]],
    max_shard_bytes: int,
    extra_files: Mapping[str, bytes],
    replace: bool = False,
) -> None:
    """Write a Hugging Face folder: the tensors (in any order), the index if there is more than one shard, and `extra_files`.

    specs: name, shape and dtype of every tensor, in the order in which shards are filled (see `plan_shards`).
    tensors: each of them once. One is held at a time; it may be non-contiguous or on an accelerator.
    extra_files: file name -> content, for example config.json and the tokenizer's files.

    The directory appears whole or not at all (`atomic_directory.new_directory`); an existing one is replaced only with `replace`.
    Raises ValueError naming the tensor for one that is unknown, repeated, missing at the end, or of another shape or dtype.
    """
    destination = Path(directory)
    for name in extra_files:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{destination}: extra file {name!r}; expected a plain file name")
    shards = plan_shards(specs, max_shard_bytes=max_shard_bytes)
    if any(name in (*shards, INDEX_FILE) for name in extra_files):
        raise ValueError(f"{destination}: extra files {sorted(extra_files)}; expected none with the name of a weights file")
    with new_directory(destination, replace=replace) as temporary:
        with SafetensorsWriter(temporary, shards, destination=destination) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
            writer.check_complete()
        if list(shards) != [SINGLE_FILE]:
            (temporary / INDEX_FILE).write_bytes(index_content(shards))
        for name, content in extra_files.items():
            (temporary / name).write_bytes(content)


class SafetensorsWriter:
    """The weights files of one plan, filled tensor by tensor in any order. `destination` names the checkpoint in errors.

    Several threads may write at once, each its own tensors. With `reopen` the directory holds the files of an unfinished attempt at
    the same plan, and `skip` tells what is there.
    """

    def __init__(self, directory: Path, shards: Mapping[str, Sequence[TensorSpec]], *, destination: Path, reopen: bool = False) -> None:
        self._destination = destination
        self._pending: dict[str, _Location] = {}
        self._missing_rows: dict[str, int] = {}  # of tensors that are written in part
        self._written: set[str] = set()
        self._descriptors: list[int] = []
        try:
            for file_name, specs in shards.items():
                self._create(directory / file_name, specs, reopen=reopen)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place. Raises ValueError when it is unknown, repeated, or of another shape or dtype."""
        location = self._place(name)
        if tuple(tensor.shape) != location.spec.shape or tensor.dtype != location.spec.dtype:
            raise ValueError(
                f"{self._destination}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"expected {location.spec.dtype} {location.spec.shape}"
            )
        _write_all(location, bytes_of(tensor.detach().cpu().contiguous()), location.offset)
        self._done(name)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Put rows start, start + 1, ... of one tensor in their place; each row once, one thread per tensor. Errors as `write`."""
        location = self._place(name)
        shape = location.spec.shape
        if rows.dtype != location.spec.dtype or rows.shape[1:] != shape[1:] or not 0 <= start <= start + rows.shape[0] <= shape[0]:
            raise ValueError(
                f"{self._destination}: rows from {start} of tensor {name!r} are {rows.dtype} {tuple(rows.shape)}; "
                f"expected {location.spec.dtype} and rows of {shape}"
            )
        _write_all(location, bytes_of(rows.detach().cpu().contiguous()), location.offset + start * (location.spec.num_bytes // shape[0]))
        self._missing_rows[name] = self._missing_rows.get(name, shape[0]) - rows.shape[0]
        if self._missing_rows[name] == 0:
            self._done(name)

    def skip(self, name: str) -> None:
        """Count a tensor as written: an earlier attempt wrote it."""
        self._place(name)
        self._done(name)

    def sync(self) -> None:
        """Flush what has been written so far to the disk."""
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)

    def check_complete(self) -> None:
        """Raises ValueError naming the tensors that were never written."""
        if self._pending:
            raise ValueError(f"{self._destination}: {len(self._pending)} tensors were never given, the first: {list(self._pending)[:5]}")

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _place(self, name: str) -> _Location:
        if name in self._written:
            raise ValueError(f"{self._destination}: tensor {name!r} was given twice; expected each tensor once")
        if name not in self._pending:
            raise ValueError(f"{self._destination}: tensor {name!r} is not part of this checkpoint; {did_you_mean(name, self._pending)}")
        return self._pending[name]

    def _done(self, name: str) -> None:
        del self._pending[name]
        self._written.add(name)

    def _create(self, path: Path, specs: Sequence[TensorSpec], *, reopen: bool) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (0 if reopen else os.O_EXCL) | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        content = header(specs)
        _write_all(_Location(path, descriptor, 0, TensorSpec("header", (len(content),), torch.uint8)), memoryview(content), 0)
        offset = len(content)
        for spec in file_order(specs):
            self._pending[spec.name] = _Location(path, descriptor, offset, spec)
            offset += spec.num_bytes
        os.truncate(path, offset)


def _write_all(location: _Location, remaining: memoryview, offset: int) -> None:
    while remaining:
        try:
            count = os.pwrite(location.descriptor, remaining[:_LONGEST_TRANSFER], offset)
        except OSError as error:  # pwrite knows no file name; a full disk should say where, and while writing what
            raise OSError(error.errno, f"{error.strerror} while writing {location.spec.name!r}", str(location.path)) from error
        remaining, offset = remaining[count:], offset + count
