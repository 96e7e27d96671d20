"""The layout of Hugging Face safetensors folders: headers, the index, and how tensors are dealt out to files.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, padded with spaces to a multiple
of 8, then the tensors' bytes without gaps, widest dtype first and names sorted within a dtype, as the safetensors library writes it.
Source: https://github.com/huggingface/safetensors (Format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

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


class TensorSpec(NamedTuple):
    """What a tensor will be, before it is there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """How safetensors spells a dtype: BF16."""
    return _DTYPE_NAMES[dtype]


def dtype_from_name(name: str) -> torch.dtype:
    """Inverse of `dtype_name`. Raises ValueError for an unknown name."""
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {list(_DTYPES)}")
    return _DTYPES[name]


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


def index_content(shards: Mapping[str, Sequence[TensorSpec]], *, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The model.safetensors.index.json of a plan, as transformers writes it: names sorted. metadata: default total_size in bytes."""
    if metadata is None:
        metadata = {"total_size": sum(spec.num_bytes for group in shards.values() for spec in group)}
    index = {"metadata": metadata, "weight_map": {spec.name: file_name for file_name, group in shards.items() for spec in group}}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def file_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size in bytes of the file that holds these tensors."""
    return len(header(specs)) + sum(spec.num_bytes for spec in specs)


def file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: (-_DTYPE_RANK[spec.dtype], spec.name))


def header(specs: Sequence[TensorSpec]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in file_order(specs):
        end = offset + spec.num_bytes
        content[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Index(NamedTuple):
    """What an index file says."""

    weight_map: dict[str, str]  # tensor name -> file name
    total_size: int | None  # bytes of all tensors; None where it is not said


def read_index(index: Path) -> Index:
    """Raises ValueError naming the file for anything but a map of tensor names to .safetensors files beside it."""
    content = _parse_object(index.read_bytes(), index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is missing or empty; expected an object of tensor name to file name")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name != os.path.basename(file_name) or not file_name.endswith(".safetensors"):
            raise ValueError(f"{index}: places tensor {name!r} in {file_name!r}; expected the name of a .safetensors file beside the index")
    metadata = content.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(weight_map, int(total_size) if isinstance(total_size, (int, float)) else None)


def read_header(path: Path, descriptor: int) -> list[tuple[TensorSpec, int]]:
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
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
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
    except (ValueError, RecursionError) as error:  # malformed, a name twice, numbers too long, brackets too deep
        raise ValueError(f"{path}: header or index is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}; expected an object")
    return content
