"""Reads the pickle in a torch_dist checkpoint's `.metadata` without letting it run anything.

torch reads that file with plain pickle; here only the classes that such a file is made of may be named.
"""

from __future__ import annotations

import enum
import pickle
from pathlib import Path
from typing import Any

_CLASSES = {
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
DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    AttributeError,
    TypeError,
    KeyError,
    IndexError,
    ImportError,
    MemoryError,
    RecursionError,
    RuntimeError,
    OverflowError,
    pickle.UnpicklingError,
)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member_of_enum
        # Exact names only: a dotted one would reach whatever a listed module imports itself.
        if name in _CLASSES.get(module, set()):
            return super().find_class(module, name)
        raise ValueError(f"refers to {module}.{name}, which no checkpoint needs")


def _member_of_enum(owner: Any, name: str) -> Any:
    """Python 3.11 pickles enum members through getattr; only that use is let through."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)):
        raise ValueError(f"takes attribute {name!r} of {owner!r}, which no checkpoint needs")
    return owner[name]


def read_metadata_pickle(path: Path) -> Any:
    """The object in a `.metadata` file. Raises ValueError naming the file when it is missing, damaged, or names anything else."""
    if not path.is_file():  # opening a FIFO would wait for a writer
        raise ValueError(f"{path}: no such file; expected the metadata of a checkpoint")
    try:
        with path.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except DAMAGE as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint ({error})") from error


def check_metadata(path: Path) -> None:
    """Raises ValueError naming the file when it is missing, damaged, or a pickle that would import anything a checkpoint does not need."""
    read_metadata_pickle(path)
