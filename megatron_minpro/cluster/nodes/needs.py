"""What a run needs of its nodes beside GPUs: room for its checkpoints on disk, and for one that is being written in host memory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_minpro.cluster.planning import shape_of
from megatron_minpro.config import RunConfig
from parallel.planner.shape import ModelShape

GIB = 2**30
_SLACK = GIB  # of logs, responses, metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes. checkpoint: one of them. num_checkpoints: that must still find room. host: memory of a trainer node beside the processes."""

    checkpoint: int
    num_checkpoints: int
    host: int

    @property
    def disk(self) -> int:
        return self.checkpoint * self.num_checkpoints + _SLACK

    @property
    def disk_text(self) -> str:
        size, each = f"{self.disk / GIB:.1f} GiB", f"{self.checkpoint / GIB:.1f} GiB"
        return f"{size} for logs and {self.num_checkpoints} more checkpoints of {each} (checkpoint.keep + 1 in all)"


def needs_of(config: RunConfig, *, trainers: int) -> Needs:
    """
    Args:
        config: the run.
        trainers: nodes that train.

    Raises:
        ValueError: the model's sizes are not known here.
    """
    shape = shape_of(config)
    checkpoint = checkpoint_bytes(shape, dtype=config.model.dtype)
    present = len([path for path in (config.run_dir / "checkpoints").glob("step_*") if path.is_dir()])
    kept = weight_bytes(shape, dtype=config.model.dtype) // trainers if _keeps_on_host(config) else 0
    return Needs(
        checkpoint=checkpoint,
        num_checkpoints=max(1, config.checkpoint.keep + 1 - present),
        host=checkpoint // trainers + kept,
    )


def weight_bytes(shape: ModelShape, *, dtype: str) -> int:
    """Of the model's parameters."""
    return shape.total_parameters * (4 if dtype == "float32" else 2)


def checkpoint_bytes(shape: ModelShape, *, dtype: str) -> int:
    """Of a checkpoint's tensors: the parameters, and the optimizer's own copy of them in fp32 with two moments."""
    return weight_bytes(shape, dtype=dtype) + shape.total_parameters * (4 + 8)


def _keeps_on_host(config: RunConfig) -> bool:
    return config.effective_schedule == "overlapped" and config.actor.kept_weights == "pinned_host"
