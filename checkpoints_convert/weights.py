"""A checkpoint of either format, read by Hugging Face names."""

from __future__ import annotations

from pathlib import Path

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.megatron_weights import MegatronWeights
from checkpoints_convert.safetensors_io import SafetensorsReader
from checkpoints_convert.torch_dist_metadata import is_torch_dist

Weights = SafetensorsReader | MegatronWeights


def open_weights(directory: str | Path, *, config: str | Path | None = None) -> Weights:
    """A reader with names, spec, read and read_rows; a context manager. config: the folder whose config.json describes a torch_dist
    checkpoint, default the checkpoint itself.

    Raises ValueError, naming file and tensor, for a folder that is neither format, or damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; expected a checkpoint, Hugging Face safetensors or Megatron torch_dist")
    if not is_torch_dist(directory):
        return SafetensorsReader(directory)
    return MegatronWeights(directory, read_architecture(directory if config is None else config))
