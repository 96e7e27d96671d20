"""The one door to torch.distributed.checkpoint: every name this project uses of it, imported without torch's symbolic shapes."""

from __future__ import annotations

from rollout.deferred_module import defer_symbolic_shapes

defer_symbolic_shapes()

from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlanner, save
from torch.distributed.checkpoint.filesystem import FileSystem

__all__ = ["CheckpointException", "FileSystem", "FileSystemWriter", "SavePlanner", "save"]
