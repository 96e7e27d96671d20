"""Time limits of what is asked of the servers, as a run's configuration gives them: seconds that follow from the bytes of its model."""

from __future__ import annotations

from pathlib import Path

from megatron_minpro.config import RunConfig
from rollout.weights.time_limits import WeightTimeLimits


def weight_limits(config: RunConfig) -> WeightTimeLimits:
    """Of the steps of a weight update."""
    rollout = config.rollout
    return WeightTimeLimits(
        control_s=rollout.control_timeout_s, step_s=rollout.weight_sync_timeout_s, bytes_per_s=1e9 * rollout.weight_sync_gb_per_s
    )


def progress_timeout_s(config: RunConfig) -> float:
    """How long a server's computing process may be silent. More than the longest step of a weight update, in which it answers nothing."""
    rollout = config.rollout
    loading_s = 0.0 if rollout.weight_sync == "collective" else weight_bytes(config) / (1e9 * rollout.weight_sync_gb_per_s)
    return rollout.progress_timeout_s + loading_s


def hang_is_over_s(config: RunConfig) -> float:
    """From a server's hang until it answers again: it is noticed, and the server is started again."""
    return progress_timeout_s(config) + config.rollout.start_timeout_s


def weight_bytes(config: RunConfig) -> int:
    """Of the model's files; 0 before they are made."""
    return sum(path.stat().st_size for path in Path(config.model.path).glob("*.safetensors"))
