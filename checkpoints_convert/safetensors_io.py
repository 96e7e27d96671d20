"""Hugging Face safetensors folders, read and written one tensor at a time with memory for one tensor.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, padded with spaces to a multiple
of 8, then the tensors' bytes without gaps, widest dtype first and names sorted within a dtype, as the safetensors library writes it.
Source: https://github.com/huggingface/safetensors (Format). Bytes are read with pread and written with pwrite: no mapping, so
resident memory stays flat and a file that shrinks under us is an error rather than a SIGBUS.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints_convert.atomic_directory import new_directory

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# In the order in which safetensors lays tensors out: last first.
_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_NAMES)}

_LONGEST_HEADER = 100_000_000  # the library's own limit
_LONGEST_TRANSFER = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


class TensorSpec(NamedTuple):
    """What a tensor will be, before it is there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
    which tensor is where.
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
            near = difflib.get_close_matches(name, self._locations, n=3)
            raise ValueError(f"{self.directory}: tensor {name!r} is missing; nearest names: {near}")
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
            raise ValueError(f"{self.directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; expected a folder with safetensors weights")

    def _open_shards(self, index: Path) -> None:
        weight_map = _read_weight_map(index)
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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.append(descriptor)
        for spec, offset in _read_header(path, descriptor):
            if spec.name in self._locations:
                raise ValueError(
                    f"{path}: holds tensor {spec.name!r}, which {self._locations[spec.name].path.name} holds too; expected one"
                )
            self._locations[spec.name] = _Location(path, descriptor, offset, spec)

    def _fill(self, tensor: Tensor, location: _Location, offset: int) -> None:
        if not self._descriptors:
            raise ValueError(f"{self.directory}: is closed; expected an open reader to read {location.spec.name!r}")
        remaining = _bytes_of(tensor)
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


def plan_shards(specs: Iterable[tuple[str, Sequence[int], torch.dtype]], *, max_shard_bytes: int) -> dict[str, tuple[TensorSpec, ...]]:
    """File name -> its tensors: greedy in the given order, no shard above max_shard_bytes, a larger tensor alone in its own shard.

    The rule and the names are huggingface_hub's (split_state_dict_into_shards). Raises ValueError for no tensors, a repeated name, a
    dtype that safetensors files cannot hold, or a limit below 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    groups: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    current_bytes = 0
    seen: set[str] = set()
    for name, shape, dtype in specs:
        spec = TensorSpec(name, tuple(shape), dtype)
        if name in seen or name == "__metadata__":
            raise ValueError(f"tensor {name!r} is listed twice or reserved; expected each name once")
        if dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: dtype is {dtype}; expected one of {list(_DTYPES)}")
        seen.add(name)
        if spec.num_bytes > max_shard_bytes:
            groups.append([spec])
            continue
        if current and current_bytes + spec.num_bytes > max_shard_bytes:
            groups.append(current)
            current, current_bytes = [], 0
        current.append(spec)
        current_bytes += spec.num_bytes
    if current:
        groups.append(current)
    if not groups:
        raise ValueError("no tensors to write; expected at least one")
    if len(groups) == 1:
        return {SINGLE_FILE: tuple(groups[0])}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": tuple(group) for number, group in enumerate(groups, start=1)}


def index_content(shards: Mapping[str, Sequence[TensorSpec]]) -> bytes:
    """The model.safetensors.index.json of a plan, as transformers writes it: total_size in bytes, names sorted."""
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for group in shards.values() for spec in group)},
        "weight_map": {spec.name: file_name for file_name, group in shards.items() for spec in group},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def file_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size in bytes of the file that holds these tensors."""
    return len(_header(specs)) + sum(spec.num_bytes for spec in specs)


class SafetensorsWriter:
    """The weights files of one plan, filled tensor by tensor in any order. `destination` names the checkpoint in errors."""

    def __init__(self, directory: Path, shards: Mapping[str, Sequence[TensorSpec]], *, destination: Path) -> None:
        self._destination = destination
        self._pending: dict[str, _Location] = {}
        self._written: set[str] = set()
        self._descriptors: list[int] = []
        try:
            for file_name, specs in shards.items():
                self._create(directory / file_name, specs)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place. Raises ValueError when it is unknown, repeated, or of another shape or dtype."""
        if name in self._written:
            raise ValueError(f"{self._destination}: tensor {name!r} was given twice; expected each tensor once")
        if name not in self._pending:
            near = difflib.get_close_matches(name, self._pending, n=3)
            raise ValueError(f"{self._destination}: tensor {name!r} is not part of this checkpoint; nearest names: {near}")
        location = self._pending[name]
        if tuple(tensor.shape) != location.spec.shape or tensor.dtype != location.spec.dtype:
            raise ValueError(
                f"{self._destination}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"expected {location.spec.dtype} {location.spec.shape}"
            )
        _write_all(location, _bytes_of(tensor.detach().cpu().contiguous()), location.offset)
        del self._pending[name]
        self._written.add(name)

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

    def _create(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        header = _header(specs)
        _write_all(_Location(path, descriptor, 0, TensorSpec("header", (len(header),), torch.uint8)), memoryview(header), 0)
        offset = len(header)
        for spec in _file_order(specs):
            self._pending[spec.name] = _Location(path, descriptor, offset, spec)
            offset += spec.num_bytes
        os.truncate(path, offset)


def _file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: (-_DTYPE_RANK[spec.dtype], spec.name))


def _header(specs: Sequence[TensorSpec]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in _file_order(specs):
        end = offset + spec.num_bytes
        content[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_weight_map(index: Path) -> dict[str, str]:
    content = _parse_object(index.read_bytes(), index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is missing or empty; expected an object of tensor name to file name")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name != os.path.basename(file_name) or not file_name.endswith(".safetensors"):
            raise ValueError(f"{index}: places tensor {name!r} in {file_name!r}; expected the name of a .safetensors file beside the index")
    return weight_map


def _read_header(path: Path, descriptor: int) -> list[tuple[TensorSpec, int]]:
    """Specs of a file's tensors with their offsets from the start of the file, in the order of their bytes; everything checked."""
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise ValueError(f"{path}: is {size} bytes long; expected a safetensors file, at least 8 bytes")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > _LONGEST_HEADER or 8 + header_bytes > size:
        raise ValueError(f"{path}: announces a header of {header_bytes} bytes in a file of {size}; truncated, or not a safetensors file")
    content = _parse_object(os.pread(descriptor, header_bytes, 8), path)
    content.pop("__metadata__", None)
    tensors = [(_parse_entry(name, entry, path), entry["data_offsets"]) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: (tensor[1], tensor[0].name))
    result, position = [], 0
    for spec, (start, end) in tensors:
        if start != position or end - start != spec.num_bytes:
            raise ValueError(
                f"{path}: tensor {spec.name!r} lies at bytes {start} to {end}; "
                f"expected {position} to {position + spec.num_bytes} for {spec.dtype} {spec.shape}"
            )
        result.append((spec, 8 + header_bytes + start))
        position = end
    if 8 + header_bytes + position != size:
        state = "truncated" if size < 8 + header_bytes + position else "followed by other bytes"
        raise ValueError(f"{path}: is {size} bytes long, {state}; expected {8 + header_bytes + position} bytes from its header")
    return result


def _parse_entry(name: str, entry: Any, path: Path) -> TensorSpec:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: header entry of {name!r} is malformed; expected dtype, shape and data_offsets")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{path}: tensor {name!r}: dtype is {entry['dtype']!r}; expected one of {list(_DTYPES)}")
    numbers = (entry["shape"], entry["data_offsets"])
    if not all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in numbers) or len(numbers[1]) != 2:
        raise ValueError(f"{path}: header entry of {name!r} is malformed; expected a shape and two byte offsets, all non-negative integers")
    return TensorSpec(name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])


def _parse_object(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            repeated = next(key for i, (key, _) in enumerate(pairs) if key in (earlier for earlier, _ in pairs[:i]))
            raise ValueError(f"{path}: key {repeated!r} appears twice; expected each key once")
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: header or index is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}; expected an object")
    return content


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")


def _write_all(location: _Location, remaining: memoryview, offset: int) -> None:
    while remaining:
        try:
            count = os.pwrite(location.descriptor, remaining[:_LONGEST_TRANSFER], offset)
        except OSError as error:  # pwrite knows no file name; a full disk should say where, and while writing what
            raise OSError(error.errno, f"{error.strerror} while writing {location.spec.name!r}", str(location.path)) from error
        remaining, offset = remaining[count:], offset + count
