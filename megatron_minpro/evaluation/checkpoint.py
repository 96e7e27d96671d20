"""The checkpoint to be evaluated: a Hugging Face folder, or one of Megatron's, converted once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints_convert.checkpoint_location import CheckpointLocation, locate_checkpoint
from checkpoints_convert.hf_config import read_config
from checkpoints_convert.other_formats import found_instead

_CONVERSION_THREADS = 4
_SAY_EVERY_S = 10.0


def find_checkpoint(path: Path, *, config: Path | None) -> CheckpointLocation:
    """Where its weights and its config lie; see locate_checkpoint. Raises ValueError unless it can be evaluated."""
    location = locate_checkpoint(path, config=config)
    megatron = is_megatron(location.weights)
    if not megatron and config is not None:
        raise ValueError(f"--config {config}: {path} is not a Megatron checkpoint; leave --config out")
    if not (location.model / "config.json").is_file():
        expected = "--config FOLDER, the model folder that it was trained from" if megatron else "a Hugging Face or a Megatron checkpoint"
        raise ValueError(f"{location.model}: holds no config.json, expected {expected}{found_instead(location.model)}")
    return location


def is_megatron(weights: Path) -> bool:
    """Whether the folder holds Megatron's torch_dist format."""
    return (weights / ".metadata").is_file()


def hugging_face_folder(location: CheckpointLocation, *, converted: Path, announce: Callable[[str], None]) -> Path:
    """The checkpoint itself, or what it was converted into. converted: where that goes; a whole conversion that is there is used."""
    if not is_megatron(location.weights):
        return location.weights
    if not converted.exists():
        from checkpoints_convert.convert import megatron_to_hf  # here: not needed for a Hugging Face folder

        announce(f"converting {location.weights} into {converted}")
        megatron_to_hf(
            location.weights,
            converted,
            workers=_CONVERSION_THREADS,
            config=location.model,
            resume=True,
            progress=_now_and_then(announce),
        )
    return converted


def largest_length(folder: Path) -> int | None:
    """Tokens of prompt and response together that the model was made for; None when its config does not say."""
    limit = read_config(folder).get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def _now_and_then(announce: Callable[[str], None]) -> Callable[[Any], None]:
    said = time.monotonic()

    def report(progress: Any) -> None:
        nonlocal said
        if time.monotonic() - said >= _SAY_EVERY_S:
            said = time.monotonic()
            announce(f"converted {progress.bytes / 1e9:.1f} of {progress.num_bytes / 1e9:.1f} GB")

    return report
