"""Model and optimizer as a Megatron torch_dist checkpoint that another layout can load."""

from __future__ import annotations

import enum
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.mcore import dist_checkpointing, ensure_metadata_has_dp_cp_group
from parallel.model import HiddenStateModel
from parallel.optimizer import inner_optimizers


def _sharded_state(modules: Sequence[HiddenStateModel], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = ensure_metadata_has_dp_cp_group(
        {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    )
    state: dict[str, Any] = {}
    for index, module in enumerate(modules):
        state["model" if len(modules) == 1 else f"model{index}"] = module.sharded_state_dict(metadata=metadata)
    # Under virtual pipeline stages Megatron's optimizer expects the same keys.
    state["optimizer"] = optimizer.sharded_state_dict(
        state if len(modules) > 1 else state["model"], is_loading=is_loading, metadata=metadata
    )
    return state


# What the pickle in .metadata is made of; torch reads that file without a restriction of its own.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "Path"},
    "builtins": {"list", "dict", "set", "tuple"},
}
_DAMAGE = (OSError, ValueError, EOFError, AttributeError, TypeError, KeyError, IndexError, ImportError, pickle.UnpicklingError)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member_of_enum
        # Exact names only: a dotted one would reach whatever a listed module imports itself.
        if name in _METADATA_CLASSES.get(module, set()):
            return super().find_class(module, name)
        raise ValueError(f"refers to {module}.{name}, which no checkpoint needs")


def _member_of_enum(owner: Any, name: str) -> Any:
    """Python 3.11 pickles enum members through getattr; only that use is let through."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)):
        raise ValueError(f"takes attribute {name!r} of {owner!r}, which no checkpoint needs")
    return owner[name]


def check_metadata(path: Path) -> None:
    """Raises ValueError naming the file when it is missing, damaged, or a pickle that would import anything a checkpoint does not need."""
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except _DAMAGE as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint ({error})") from error


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Every torch.load inside the block refuses pickled code, also where a library asks it not to."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former


def save(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any) -> None:
    """Collective. directory: existing and empty, the same path on all ranks. Durable only once the caller has synced and renamed it."""
    dist_checkpointing.save(_sharded_state(modules, optimizer, is_loading=False), str(directory))


def load(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any) -> None:
    """Collective. Raises ValueError for files that hold anything but a checkpoint, what Megatron raises for a mismatching one."""
    check_metadata(directory / ".metadata")
    with _tensors_only():
        state = dist_checkpointing.load(_sharded_state(modules, optimizer, is_loading=True), str(directory))
    for index, module in enumerate(modules):
        module.load_state_dict(state["model" if len(modules) == 1 else f"model{index}"])
    optimizer.load_state_dict(state["optimizer"])
    for each in inner_optimizers(optimizer):
        for values in each.optimizer.state.values():
            if "step" in values:
                # All parameters would share one counter, and every step would advance it once per parameter.
                values["step"] = values["step"].clone()
    dist.barrier()
