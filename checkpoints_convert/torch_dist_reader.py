"""Megatron torch_dist checkpoints, read box by box with memory for one box; no Megatron, no process group."""

from __future__ import annotations

import io
import math
import os
import resource
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from checkpoints_convert.copying import bytes_of
from checkpoints_convert.safetensors_format import TensorSpec
from checkpoints_convert.torch_dist_metadata import Chunk, SavedTensor, Shape, read_metadata
from checkpoints_convert.torch_record import payload_offset

_LONGEST_TRANSFER = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
_SPARE_FILES = 512  # what a process may have open beside a checkpoint


class TorchDistReader:
    """The tensors of a torch_dist checkpoint, under their saved keys, without the optimizer's; checked when opened, read on demand.

        with TorchDistReader(directory) as reader:
            for key in reader.names:
                tensor = reader.read(key)

    Opening reads `.metadata` only; errors are `torch_dist_metadata.read_metadata`'s. Several threads may read at once.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._tensors = read_metadata(self.directory)
        self._descriptors: dict[str, int] = {}
        self._payloads: dict[tuple[Chunk, torch.dtype], int | None] = {}  # torch_record.payload_offset of each record that was read
        try:
            names = sorted({chunk.file_name for tensor in self._tensors.values() for chunk in tensor.chunks})
            _allow_open_files(len(names))
            for name in names:
                self._descriptors[name] = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """All keys of tensors, in the order of the metadata."""
        return tuple(self._tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(self.directory / name for name in self._descriptors)

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def spec(self, name: str) -> TensorSpec:
        """Key, shape and dtype."""
        tensor = self._tensor(name)
        return TensorSpec(name, tensor.shape, tensor.dtype)

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU. Raises ValueError as `read_box`."""
        shape = self._tensor(name).shape
        return self.read_box(name, (0,) * len(shape), shape)

    def read_box(self, name: str, start: Shape, shape: Shape) -> Tensor:
        """Elements start to start + shape (exclusive) of a tensor, on the CPU, in memory of their own.

        Raises ValueError, naming file and tensor, for an unknown name, a box that leaves the tensor, and a record that is damaged or
        not the tensor that the metadata announces.
        """
        tensor = self._tensor(name)
        axes = len(tensor.shape)
        if (len(start), len(shape)) != (axes, axes) or any(
            not 0 <= first <= first + length <= size for first, length, size in zip(start, shape, tensor.shape, strict=True)
        ):
            raise ValueError(f"{self.directory}: box {start} {shape} of {name!r} asked for; expected one inside its shape {tensor.shape}")
        box = torch.empty(shape, dtype=tensor.dtype)
        if box.numel() == 0:
            return box
        for chunk in tensor.overlapping(start, shape):
            first = tuple(max(a, b) for a, b in zip(start, chunk.start, strict=True))
            end = tuple(min(a + n, b + m) for a, n, b, m in zip(start, shape, chunk.start, chunk.shape, strict=True))
            inside = tuple(slice(a - b, c - b) for a, b, c in zip(first, chunk.start, end, strict=True))
            if tuple(c - a for a, c in zip(first, end, strict=True)) == shape:
                self._read_part(tensor, chunk, inside, box)
            else:
                part = torch.empty(tuple(c - a for a, c in zip(first, end, strict=True)), dtype=tensor.dtype)
                self._read_part(tensor, chunk, inside, part)
                box[tuple(slice(a - b, c - b) for a, b, c in zip(first, start, end, strict=True))] = part
        return box

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _tensor(self, name: str) -> SavedTensor:
        if name not in self._tensors:
            raise ValueError(f"{self.directory}: has no tensor {name!r}; expected one of its {len(self._tensors)} keys")
        return self._tensors[name]

    def _read_part(self, tensor: SavedTensor, chunk: Chunk, inside: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out`, contiguous, with the elements `inside` of one chunk."""
        begin = self._payload_offset(tensor, chunk)
        if begin is None:  # not stored as plain bytes of this very shape: torch's own reader decides
            out.copy_(self._load_record(tensor, chunk)[inside])
            return
        run = _contiguous_run(chunk.shape, inside)
        if run is not None:
            self._fill(out, tensor, chunk, begin + run * tensor.dtype.itemsize)
            return
        whole = torch.empty(chunk.shape, dtype=tensor.dtype)
        self._fill(whole, tensor, chunk, begin)
        out.copy_(whole[inside])

    def _payload_offset(self, tensor: SavedTensor, chunk: Chunk) -> int | None:
        """Looked for once: a large chunk is read in many blocks of rows."""
        key = (chunk, tensor.dtype)
        if key not in self._payloads:
            descriptor = self._descriptors[chunk.file_name]
            self._payloads[key] = payload_offset(descriptor, chunk.offset, chunk.length, chunk.shape, tensor.dtype)
        return self._payloads[key]

    def _fill(self, out: Tensor, tensor: SavedTensor, chunk: Chunk, offset: int) -> None:
        remaining = bytes_of(out)
        while remaining:
            count = os.preadv(self._descriptors[chunk.file_name], [remaining[:_LONGEST_TRANSFER]], offset)
            if count == 0:
                raise ValueError(
                    f"{self.directory / chunk.file_name}: ends inside tensor {tensor.key!r}; expected {len(remaining)} more bytes"
                )
            remaining, offset = remaining[count:], offset + count

    def _load_record(self, tensor: SavedTensor, chunk: Chunk) -> Tensor:
        path = self.directory / chunk.file_name
        record = os.pread(self._descriptors[chunk.file_name], chunk.length, chunk.offset)
        try:
            found = torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive shows in many ways
            raise ValueError(
                f"{path}: the record of {tensor.key!r} at byte {chunk.offset} is damaged ({' '.join(str(error).split())[:200]})"
            ) from error
        if not isinstance(found, Tensor) or tuple(found.shape) != chunk.shape or found.dtype != tensor.dtype:
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{path}: the record of {tensor.key!r} is {what}; expected {tensor.dtype} {chunk.shape}")
        return found


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit, often 1,024, where so many more files would pass it: a run writes two files a rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))


def _contiguous_run(shape: Shape, inside: tuple[slice, ...]) -> int | None:
    """Index of the first element of a sub-box when its elements are neighbours in memory, else None."""
    axis = 0
    while axis < len(shape) and inside[axis].stop - inside[axis].start == 1:
        axis += 1
    if any(part.start != 0 or part.stop != size for part, size in zip(inside[axis + 1 :], shape[axis + 1 :], strict=True)):
        return None
    return sum(part.start * math.prod(shape[position + 1 :]) for position, part in enumerate(inside))
