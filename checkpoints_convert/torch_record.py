"""A tensor as torch.save writes it: a zip archive whose entry data/0 is the tensor's bytes, stored, aligned to 64.

Knowing where the bytes lie lets a record be read and written in part, so that memory does not grow with the tensor.
Source: https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/serialization/export_module.cpp and PKWARE's APPNOTE.TXT, 4.3.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

_DTYPES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "IntStorage": torch.int32,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}
_TAIL_BYTES = 2048  # a central directory of torch.save is shorter than this
_CENTRAL, _END = b"PK\x01\x02", b"PK\x05\x06"


class RecordFrame(NamedTuple):
    """What stands before and after a tensor's bytes in its record."""

    before: bytes
    after: bytes


@functools.cache
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> RecordFrame:
    """The frame of a contiguous tensor. Briefly takes twice its memory; made once for each shape and dtype."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(shape, dtype=dtype), buffer)
    record = buffer.getbuffer()
    num_bytes = math.prod(shape) * dtype.itemsize
    start = _find_bytes(lambda size, offset: bytes(record[offset : offset + size]), len(record), shape, dtype)
    assert start is not None, f"torch.save of {dtype} {shape} is laid out in a way that is not known here"
    return RecordFrame(bytes(record[:start]), bytes(record[start + num_bytes :]))


def payload_offset(descriptor: int, offset: int, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Where the bytes of a contiguous tensor begin in a file, given the record's place; None when the record is anything else."""
    found = _find_bytes(lambda size, at: os.pread(descriptor, size, offset + at), length, shape, dtype)
    return None if found is None else offset + found


def _find_bytes(read: Any, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Offset of the tensor's bytes in a record of `length` bytes; read(size, offset) returns a part of it."""
    tail_start = max(0, length - _TAIL_BYTES)
    tail = read(length - tail_start, tail_start)
    end = tail.rfind(_END)
    if end < 0 or end + 22 > len(tail):
        return None
    size, start = struct.unpack_from("<II", tail, end + 12)
    position = start - tail_start
    if position < 0 or position + size > end:
        return None
    entries: dict[bytes, tuple[int, int, int]] = {}
    while tail[position : position + 4] == _CENTRAL and position + 46 <= end:
        (method,) = struct.unpack_from("<H", tail, position + 10)
        stored, full, name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<IIHHH", tail, position + 20)
        (header,) = struct.unpack_from("<I", tail, position + 42)
        name = tail[position + 46 : position + 46 + name_bytes].partition(b"/")[2]
        if stored != full:
            return None
        entries[name] = (method, full, header)
        position += 46 + name_bytes + extra_bytes + comment_bytes
    num_bytes = math.prod(shape) * dtype.itemsize
    if entries.get(b"data/0", (0, 0, 0))[:2] != (0, num_bytes) or b"data.pkl" not in entries or b"byteorder" not in entries:
        return None

    def start_of(name: bytes) -> int | None:
        method, size, header = entries[name]
        fixed = read(30, header)
        if method != 0 or len(fixed) < 30 or fixed[:4] != b"PK\x03\x04":
            return None
        name_bytes, extra_bytes = struct.unpack_from("<HH", fixed, 26)
        begin = header + 30 + name_bytes + extra_bytes
        return begin if begin + size <= length else None

    starts = {name: start_of(name) for name in (b"data.pkl", b"byteorder", b"data/0")}
    if None in starts.values() or read(entries[b"byteorder"][1], starts[b"byteorder"]) != b"little":
        return None
    content = read(entries[b"data.pkl"][1], starts[b"data.pkl"])
    return starts[b"data/0"] if _describes(content, shape, dtype) else None


@functools.lru_cache(maxsize=4096)
def _describes(content: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a record's pickle says: one contiguous tensor of this shape and dtype, which begins where its storage begins."""
    try:
        found = _TensorUnpickler(io.BytesIO(content)).load()
    except Exception:  # whatever a pickle that is not of this kind leads to; torch.load will then judge it
        return False
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    same_strides = isinstance(found, _Rebuilt) and all(
        size == 1 or stride == wanted for size, stride, wanted in zip(shape, found.strides, contiguous, strict=False)
    )
    return same_strides and found[:4] == (dtype, math.prod(shape), 0, shape)


class _Rebuilt(NamedTuple):
    dtype: Any
    num_elements: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Runs nothing: the three names that a tensor's pickle needs are replaced by records of what it says."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _rebuild(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _Rebuilt:
    kind, dtype, key, _, num_elements = storage
    if kind != "storage" or key != "0":
        raise pickle.UnpicklingError(str(storage))
    return _Rebuilt(dtype, num_elements, offset, tuple(shape), tuple(strides))
