"""What a checkpoint of either format holds, from its headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints_convert.checkpoint_location import trained_model_type
from checkpoints_convert.hf_config import read_config
from checkpoints_convert.manifest import read_manifest
from checkpoints_convert.safetensors_io import SafetensorsReader
from checkpoints_convert.torch_dist_metadata import is_optimizer_key, is_torch_dist, read_metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSummary:
    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    num_chunks: int  # 1 in a Hugging Face checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Parameters are elements of the model's tensors; of a torch_dist checkpoint under all the names they are saved by."""

    format: str  # "huggingface" or "torch_dist"
    model_type: str | None  # None where neither a config.json nor a run's checkpoint names it
    num_tensors: int
    num_parameters: int
    num_bytes: int
    bytes_by_dtype: dict[str, int]
    num_optimizer_tensors: int
    optimizer_bytes: int
    num_files: int
    has_manifest: bool
    tensors: tuple[TensorSummary, ...]


def inspect(directory: str | Path) -> Inspection:
    """Read the headers of a checkpoint. Raises ValueError, naming file and tensor, for a folder that is neither format, or damaged."""
    directory = Path(directory)
    optimizer: list[TensorSummary] = []
    if is_torch_dist(directory):
        saved = read_metadata(directory, optimizer=True).values()
        summaries = [_summary(tensor.key, tensor.shape, tensor.dtype, len(tensor.chunks)) for tensor in saved]
        optimizer = [summary for summary in summaries if is_optimizer_key(summary.name)]
        tensors = [summary for summary in summaries if not is_optimizer_key(summary.name)]
        files = {chunk.file_name for tensor in saved for chunk in tensor.chunks}
    else:
        with SafetensorsReader(directory) as reader:
            tensors = [_summary(name, reader.shape(name), reader.dtype(name), 1) for name in reader.names]
            files = {reader.file(name).name for name in reader.names}
    by_dtype: dict[str, int] = {}
    for tensor in tensors:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.num_bytes
    return Inspection(
        format="torch_dist" if is_torch_dist(directory) else "huggingface",
        model_type=_model_type(directory),
        num_tensors=len(tensors),
        num_parameters=sum(torch.Size(tensor.shape).numel() for tensor in tensors),
        num_bytes=_total(tensors),
        bytes_by_dtype=by_dtype,
        num_optimizer_tensors=len(optimizer),
        optimizer_bytes=_total(optimizer),
        num_files=len(files),
        has_manifest=read_manifest(directory) is not None,
        tensors=tuple(tensors),
    )


def _model_type(directory: Path) -> str | None:
    if (directory / "config.json").is_file():
        return read_config(directory).get("model_type")
    return trained_model_type(directory)


def _summary(name: str, shape: tuple[int, ...], dtype: torch.dtype, num_chunks: int) -> TensorSummary:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return TensorSummary(name=name, shape=shape, dtype=str(dtype).removeprefix("torch."), num_bytes=num_bytes, num_chunks=num_chunks)


def _total(tensors: Iterable[TensorSummary]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
