"""What a conversion is going to write, known before the first byte."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.manifest import Manifest
from checkpoints_convert.mapping import TIED_COPIES, Shape, Split, hf_shapes, parameters, torch_dist_key
from checkpoints_convert.safetensors_format import TensorSpec, file_bytes, index_content, plan_shards
from checkpoints_convert.torch_dist_writer import Part

DEFAULT_SHARD_BYTES = 4_000_000_000  # that of the published Qwen3 checkpoints


def torch_dist_parts(architecture: Architecture, dtypes: Mapping[str, torch.dtype], *, source: str | Path) -> list[Part]:
    """Every part of the torch_dist checkpoint, in the order in which it is written: each parameter under all its names.

    dtypes: of the Hugging Face tensors. Raises ValueError naming source and tensor when tensors that are saved as one differ in dtype.
    """
    parts: list[Part] = []
    owners: dict[str, str] = {}  # saved key -> the Hugging Face tensor that decided its dtype
    for parameter in parameters(architecture):
        place = torch_dist_key(parameter)
        stacked: Shape = () if parameter.layer is None else (architecture.num_hidden_layers,)
        if parameter.expert is not None and architecture.num_experts is not None:
            stacked = (*stacked, architecture.num_experts)
        for key in place.names:
            owner = owners.setdefault(key, parameter.hf_names[0])
            for name in parameter.hf_names:
                check_dtype(name, dtypes[name], source=source)
                if dtypes[name] != dtypes[owner]:
                    raise ValueError(f"{source}: dtype of {name} is {dtypes[name]}; expected {dtypes[owner]}, as {owner} has")
            parts.append(
                Part(
                    key=key,
                    saved_shape=(*stacked, *parameter.megatron_shape),
                    dtype=dtypes[owner],
                    index=place.index,
                    row_parts=2 if parameter.split is Split.GATED_ROWS else 1,
                )
            )
    return parts


def check_dtype(name: str, dtype: torch.dtype, *, source: str | Path) -> None:
    """Raise ValueError for weights that config.json has no name for: quantized ones, for example."""
    if dtype not in DTYPES.values():
        raise ValueError(f"{source}: dtype of {name} is {dtype}; expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceFiles:
    """The weights files to be written; index: text of the index file, None where there is a single file."""

    shards: Mapping[str, tuple[TensorSpec, ...]]
    index: str | None

    @property
    def num_bytes(self) -> int:
        return sum(file_bytes(specs) for specs in self.shards.values())


def plan_hugging_face_files(
    architecture: Architecture,
    dtypes: Mapping[str, torch.dtype],
    *,
    origin: Manifest | None,
    max_shard_bytes: int | None,
) -> HuggingFaceFiles:
    """Deal tensors out to files, none above max_shard_bytes, as transformers does.

    dtypes: of every tensor of the architecture. origin: the manifest of a checkpoint that was itself made of a Hugging Face folder. Its
    files are kept where no limit is given, or where they obey it: versions of transformers differ in the order of tensors and keep
    different ones together, so only the files themselves tell.
    """
    shapes = hf_shapes(architecture)
    copies = (
        {} if origin is None else {name: shapes[TIED_COPIES[name]] for name in origin.tensors if name in TIED_COPIES and name not in shapes}
    )
    specs = [TensorSpec(name, shape, dtypes[TIED_COPIES[name] if name in copies else name]) for name, shape in (shapes | copies).items()]
    if origin is not None and {record.spec for record in origin.tensors.values()} == set(specs):
        former = origin.shards()
        if max_shard_bytes is None or _obey(list(former.values()), max_shard_bytes):
            return HuggingFaceFiles(shards=former, index=origin.index)
    shards = plan_shards(specs, max_shard_bytes=DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
    totals = {
        "total_parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "total_size": sum(spec.num_bytes for spec in specs),
    }
    return HuggingFaceFiles(shards=shards, index=index_content(shards, metadata=totals).decode() if len(shards) > 1 else None)


def _obey(files: Sequence[Sequence[TensorSpec]], max_shard_bytes: int) -> bool:
    """Whether no file exceeds the limit, unless by a single tensor, and no two neighbours would fit into one."""
    sizes = [sum(spec.num_bytes for spec in specs) for specs in files]
    fits = all(size <= max_shard_bytes or len(specs) == 1 for size, specs in zip(sizes, files, strict=True))
    return fits and all(first + second > max_shard_bytes for first, second in pairwise(sizes))


def fingerprint(direction: str, files: Iterable[Path], options: object) -> str:
    """Names the input of a conversion: two with equal fingerprints write the same bytes to the same places."""
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(set(files))]
    text = json.dumps([direction, found, repr(options), torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()


def check_space(directory: Path, num_bytes: int, *, destination: Path) -> None:
    """Raise OSError when the file system cannot hold num_bytes, counting what an unfinished attempt has in `directory` already."""
    taken = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    free = shutil.disk_usage(directory).free + taken
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes are needed, {free:,} are free", str(destination))
