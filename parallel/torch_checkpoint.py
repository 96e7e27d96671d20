"""The one door to torch.distributed.checkpoint: every name this project uses of it, imported without torch's symbolic shapes."""

from __future__ import annotations

import torch.fx.experimental  # noqa: F401  the package of the module that is deferred

from rollout.deferred_module import defer

# torch.distributed.tensor, which checkpoints import, imports them, and with them sympy: a fifth of what a rank imports. They describe
# tensors whose shape is a symbol, which only torch.compile makes.
defer(
    "torch.fx.experimental.symbolic_shapes",
    functions=("guard_or_false", "guard_or_true", "statically_known_true"),
    exceptions=("GuardOnDataDependentSymNode",),
)

from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlanner, save
from torch.distributed.checkpoint.filesystem import FileSystem

__all__ = ["CheckpointException", "FileSystem", "FileSystemWriter", "SavePlanner", "save"]
