"""What a run needs of its nodes beside GPUs: room for checkpoints and weights on disk, and for what is kept in host memory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_minpro.cluster.planning import shape_of
from megatron_minpro.config import RunConfig
from parallel.planner.shape import ModelShape

GIB = 2**30
_SLACK = GIB  # of logs, responses, metrics
_VERSIONS = 2  # of the weights: the one that servers have, and the next one


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes.

    checkpoint, weights: one checkpoint, one copy of the model's weights. num_checkpoints, num_copies: of them that must still find room on
    disk. host: memory of a trainer node beside the processes. host_of_first: what the first one needs beyond that.
    """

    checkpoint: int
    num_checkpoints: int
    weights: int
    num_copies: int
    host: int
    host_of_first: int

    @property
    def disk(self) -> int:
        return self.checkpoint * self.num_checkpoints + self.weights * self.num_copies + _SLACK

    @property
    def disk_text(self) -> str:
        checkpoints = f"{self.num_checkpoints} more checkpoints of {_gib(self.checkpoint)} (checkpoint.keep + 1 in all)"
        copies = f"{self.num_copies} x the weights of {_gib(self.weights)} (the exported policy, weight_sync: disk)"
        return f"{_gib(self.disk)} for logs, {checkpoints} and {copies}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def needs_of(config: RunConfig, *, trainers: int) -> Needs:
    """
    Args:
        config: the run.
        trainers: nodes that train.

    Raises:
        ValueError: the model's sizes are not known here.
    """
    shape = shape_of(config)
    checkpoint, weights = checkpoint_bytes(shape, dtype=config.model.dtype), weight_bytes(shape, dtype=config.model.dtype)
    present = len([path for path in (config.run_dir / "checkpoints").glob("step_*") if path.is_dir()])
    sync, rolling = config.rollout.weight_sync, config.rollout.publish == "rolling"
    return Needs(
        checkpoint=checkpoint,
        num_checkpoints=max(1, config.checkpoint.keep + 1 - present),
        weights=weights,
        num_copies=1 + (_VERSIONS if sync == "disk" else 0),
        host=checkpoint // trainers + (weights // trainers if _keeps_on_host(config) else 0),
        host_of_first=_VERSIONS * weights if sync == "collective" and rolling else 0,
    )


def weight_bytes(shape: ModelShape, *, dtype: str) -> int:
    """Of the model's parameters."""
    return shape.total_parameters * (4 if dtype == "float32" else 2)


def checkpoint_bytes(shape: ModelShape, *, dtype: str) -> int:
    """Of a checkpoint's tensors: the parameters, and the optimizer's own copy of them in fp32 with two moments."""
    return weight_bytes(shape, dtype=dtype) + shape.total_parameters * (4 + 8)


def _keeps_on_host(config: RunConfig) -> bool:
    return config.effective_schedule == "overlapped" and config.actor.kept_weights == "pinned_host"
