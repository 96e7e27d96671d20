"""What a conversion would write, and about how long it would take; nothing is written that stays."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from checkpoints_convert.conversion_plan import check_dtype, plan_hugging_face_files, torch_dist_parts
from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.hf_config import Architecture, read_architecture
from checkpoints_convert.manifest import read_manifest
from checkpoints_convert.mapping import check_hf_tensors, hf_shapes
from checkpoints_convert.megatron_weights import MegatronWeights
from checkpoints_convert.safetensors_format import INDEX_FILE, file_bytes, read_index
from checkpoints_convert.safetensors_io import SafetensorsReader
from checkpoints_convert.torch_dist_writer import plan_chunks

_SAMPLE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """files: weights file -> its bytes. num_bytes: of the tensors. estimate_s: seconds, at the speed measured where it would be written."""

    num_tensors: int
    num_parameters: int
    num_bytes: int
    files: Mapping[str, int]
    gb_per_s: float
    estimate_s: float


def preview_hf_to_megatron(source: str | Path, destination: str | Path) -> Preview:
    """Of convert.hf_to_megatron. The source may be without its weights files: config.json and the index then tell everything.

    Raises ValueError, naming file and tensor, for names, shapes or a total size that are not those of config.json's model.
    """
    source = Path(source)
    architecture = read_architecture(source)
    dtypes = _dtypes(source, architecture)
    files = plan_chunks(torch_dist_parts(architecture, dtypes, source=source))[1]
    return _preview(architecture, dtypes, files, Path(destination))


def preview_megatron_to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    config: str | Path | None = None,
    max_shard_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> Preview:
    """Of convert.megatron_to_hf. Errors as there."""
    source = Path(source)
    architecture = read_architecture(source if config is None else config)
    with MegatronWeights(source, architecture) as weights:
        dtypes = {name: weights.dtype(name) if dtype is None else dtype for name in weights.names}
    for name, each in dtypes.items():
        check_dtype(name, each, source=source)
    planned = plan_hugging_face_files(architecture, dtypes, origin=read_manifest(source), max_shard_bytes=max_shard_bytes)
    files = {name: file_bytes(specs) for name, specs in planned.shards.items()}
    return _preview(architecture, dtypes, files, Path(destination))


def _dtypes(source: Path, architecture: Architecture) -> dict[str, torch.dtype]:
    """Dtype of every tensor: from the weights where they are, else from config.json, checked against the index."""
    index = source / INDEX_FILE
    if not index.is_file() or any((source / name).exists() for name in set(read_index(index).weight_map.values())):
        with SafetensorsReader(source) as reader:
            check_hf_tensors(architecture, {name: reader.shape(name) for name in reader.names}, source=source)
            return {name: reader.dtype(name) for name in reader.names}
    shapes = hf_shapes(architecture)
    content = read_index(index)
    check_hf_tensors(architecture, {name: shapes.get(name, ()) for name in content.weight_map}, source=index)
    if architecture.dtype is None:
        raise ValueError(f"{source / 'config.json'}: names no dtype; expected torch_dtype or dtype, as the weights files are absent")
    num_bytes = _total(architecture, dict.fromkeys(shapes, DTYPES[architecture.dtype]))
    if content.total_size != num_bytes:
        raise ValueError(f"{index}: total_size is {content.total_size}; expected {num_bytes} from config.json")
    return dict.fromkeys(shapes, DTYPES[architecture.dtype])


def _total(architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> int:
    return sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in hf_shapes(architecture).items())


def _preview(architecture: Architecture, dtypes: Mapping[str, torch.dtype], files: Mapping[str, int], destination: Path) -> Preview:
    shapes = hf_shapes(architecture)
    num_bytes = _total(architecture, dtypes)
    speed = _bytes_per_second(destination)
    return Preview(
        num_tensors=len(shapes),
        num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        num_bytes=num_bytes,
        files=files,
        gb_per_s=speed / 1e9,
        estimate_s=num_bytes / speed,
    )


def _bytes_per_second(destination: Path) -> float:
    """Of hashing, writing and flushing a sample in the folder that is to hold the destination."""
    folder = Path(os.path.abspath(destination)).parent
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; expected the folder in which {destination.name} is to be written")
    block = os.urandom(8 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        digest = xxhash.xxh3_128()
        for _ in range(_SAMPLE_BYTES // len(block)):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _SAMPLE_BYTES / (time.perf_counter() - started)
