"""What a torch_dist checkpoint says it holds: tensors, the chunks they are cut into, and the record of a file that keeps each chunk.

A folder of Megatron-Core's torch_dist format (PyTorch's distributed checkpoint) holds `.metadata` (a pickle), `__<rank>_<n>.distcp`
(concatenated records), `common.pt` (whatever is no tensor) and `metadata.json` (names and versions of the two formats).
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_convert.atomic_directory import write_file
from checkpoints_convert.checkpoint_pickle import DAMAGE, read_metadata_pickle

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
COMMON_FILE = "common.pt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
_MOST_CELLS = 10_000_000

Shape = tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a saved tensor and the record that keeps it: bytes offset to offset + length of a file in the folder."""

    start: Shape
    shape: Shape
    file_name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of a checkpoint. The chunks tile it: every element lies in exactly one (checked when it was made)."""

    key: str
    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    _edges: tuple[tuple[int, ...], ...]  # per axis, where chunks begin
    _cells: Mapping[Shape, int]  # cell of the grid of all edges -> index of its chunk

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def overlapping(self, start: Shape, shape: Shape) -> Iterator[Chunk]:
        """The chunks that share elements with a box inside the tensor, each once."""
        spans = (
            range(_cell_of(edges, first), _cell_of(edges, first + length - 1) + 1)
            for edges, first, length in zip(self._edges, start, shape, strict=True)
        )
        for index in sorted({self._cells[cell] for cell in itertools.product(*spans)}):
            yield self.chunks[index]


def is_optimizer_key(key: str) -> bool:
    """True for the optimizer's part of a checkpoint."""
    return key.startswith(_OPTIMIZER_PREFIXES)


def is_torch_dist(directory: Path) -> bool:
    """True when the folder looks like a torch_dist checkpoint; whether it is a good one only reading tells."""
    return (directory / METADATA_FILE).is_file()


def read_metadata(directory: Path, *, optimizer: bool = False) -> dict[str, SavedTensor]:
    """The tensors of a checkpoint by key, in the order of the file; the optimizer's only with `optimizer`. Nothing is imported by name.

    Raises ValueError, naming file and tensor, for a folder of another format, metadata that is damaged or names anything but what
    checkpoints are made of, chunks that do not tile their tensor, and a data file that is absent or too short.
    """
    if not any((directory / name).exists() for name in (METADATA_FILE, FORMAT_FILE)):
        raise ValueError(f"{directory}: holds neither {METADATA_FILE} nor {FORMAT_FILE}; expected a Megatron torch_dist checkpoint")
    _check_format(directory / FORMAT_FILE)
    path = directory / METADATA_FILE
    metadata = read_metadata_pickle(path)
    try:
        places = {(index.fqn, tuple(index.offset)): info for index, info in metadata.storage_data.items() if index.offset is not None}
        tensors = {}
        for key, entry in metadata.state_dict_metadata.items():
            if hasattr(entry, "chunks") and (optimizer or not is_optimizer_key(key)):
                tensors[key] = _saved_tensor(key, entry, places)
    except DAMAGE as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint ({' '.join(str(error).split())})") from error
    _check_files(directory, tensors.values())
    return tensors


def write_metadata(
    directory: Path, tensors: Iterable[tuple[str, Shape, torch.dtype, Sequence[Chunk]]], objects: Mapping[str, Chunk]
) -> None:
    """Write `.metadata`, `metadata.json` and `common.pt`. objects: keys that are no tensors, with the record of each."""
    from torch.distributed.checkpoint import metadata as torch_metadata  # here: half a second, and only the writer needs it
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, shape, dtype, chunks in tensors:
        boxes = [torch_metadata.ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape)) for chunk in chunks]
        entries[key] = torch_metadata.TensorStorageMetadata(torch_metadata.TensorProperties(dtype=dtype), torch.Size(shape), boxes)
        for chunk in chunks:
            places[torch_metadata.MetadataIndex(key, chunk.start)] = _StorageInfo(chunk.file_name, chunk.offset, chunk.length)
    for key, chunk in objects.items():
        entries[key] = torch_metadata.BytesStorageMetadata()
        places[torch_metadata.MetadataIndex(key)] = _StorageInfo(chunk.file_name, chunk.offset, chunk.length)
    metadata = torch_metadata.Metadata(entries, storage_data=places, storage_meta=torch_metadata.StorageMeta())
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, common)
    write_file(directory / METADATA_FILE, pickle.dumps(metadata))
    write_file(directory / FORMAT_FILE, json.dumps(FORMAT).encode())
    write_file(directory / COMMON_FILE, common.getvalue())


def _check_format(path: Path) -> None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected the format's name in a torch_dist checkpoint") from error
    if not isinstance(content, dict) or content.get("sharded_backend") != "torch_dist":
        raise ValueError(f"{path}: says {' '.join(str(content).split())[:200]}; expected sharded_backend to be torch_dist")


def _saved_tensor(key: str, entry: Any, places: Mapping[tuple[str, Shape], Any]) -> SavedTensor:
    shape, dtype = _sizes(entry.size, key), entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"tensor {key!r}: dtype is {dtype!r}")
    chunks = []
    for box in entry.chunks:
        start = _sizes(box.offsets, key)
        if (key, start) not in places:
            raise ValueError(f"tensor {key!r}: the chunk at {start} has no place in any file")
        info = places[key, start]
        name = info.relative_path
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"tensor {key!r}: lies in {name!r}; expected a file of the folder")
        offset, length = _sizes((info.offset, info.length), key)
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"tensor {key!r}: is stored with {info.transform_descriptors}; expected plain bytes")
        chunks.append(Chunk(start, _sizes(box.sizes, key), name, offset, length))
    edges, cells = _tiles(key, shape, chunks)
    return SavedTensor(key, shape, dtype, tuple(chunks), edges, cells)


def _sizes(numbers: Any, key: str) -> Shape:
    result = tuple(numbers)
    if not all(type(number) is int and number >= 0 for number in result):
        raise ValueError(f"tensor {key!r}: sizes or offsets are {result}; expected non-negative integers")
    return result


def _tiles(key: str, shape: Shape, chunks: Sequence[Chunk]) -> tuple[tuple[tuple[int, ...], ...], dict[Shape, int]]:
    """The grid of all chunk edges, and which chunk owns each cell. Raises ValueError unless every cell has exactly one owner."""
    for chunk in chunks:
        if len(chunk.start) != len(shape) or len(chunk.shape) != len(shape):
            raise ValueError(f"tensor {key!r}: chunk {chunk.start} {chunk.shape} has other axes than the tensor's shape {shape}")
        if any(first + length > size or length == 0 for first, length, size in zip(chunk.start, chunk.shape, shape, strict=True)):
            raise ValueError(f"tensor {key!r}: chunk {chunk.start} {chunk.shape} lies outside the tensor's shape {shape}")
    edges = tuple(
        tuple(sorted({chunk.start[axis] for chunk in chunks} | {chunk.start[axis] + chunk.shape[axis] for chunk in chunks} - {size}))
        for axis, size in enumerate(shape)
    )
    if math.prod(len(positions) for positions in edges) > _MOST_CELLS:
        raise ValueError(f"tensor {key!r}: is cut into more than {_MOST_CELLS} pieces")
    cells: dict[Shape, int] = {}
    for index, chunk in enumerate(chunks):
        spans = (
            range(bisect_left(positions, first), bisect_left(positions, first + length))
            for positions, first, length in zip(edges, chunk.start, chunk.shape, strict=True)
        )
        for cell in itertools.product(*spans):
            if cell in cells:
                raise ValueError(f"tensor {key!r}: chunk {chunk.start} overlaps chunk {chunks[cells[cell]].start}")
            cells[cell] = index
    covered = sum(math.prod(chunk.shape) for chunk in chunks)
    if covered != math.prod(shape):
        raise ValueError(f"tensor {key!r}: its chunks hold {covered} elements; expected {math.prod(shape)} for shape {shape}")
    return edges, cells


def _cell_of(edges: tuple[int, ...], position: int) -> int:
    index = bisect_left(edges, position)
    return index if index < len(edges) and edges[index] == position else index - 1


def _check_files(directory: Path, tensors: Iterable[SavedTensor]) -> None:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        for chunk in tensor.chunks:
            if chunk.file_name not in sizes:
                path = directory / chunk.file_name
                if not path.is_file():
                    raise ValueError(f"{path}: is absent; expected it to hold {tensor.key!r}")
                sizes[chunk.file_name] = path.stat().st_size
            if chunk.offset + chunk.length > sizes[chunk.file_name]:
                raise ValueError(
                    f"{directory / chunk.file_name}: is {sizes[chunk.file_name]} bytes long, truncated; expected tensor {tensor.key!r} "
                    f"at bytes {chunk.offset} to {chunk.offset + chunk.length}"
                )
