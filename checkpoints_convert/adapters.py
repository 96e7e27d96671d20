"""Adapters beside a model's weights: no code here reads them, so a folder with an adapter is an error."""

from __future__ import annotations

from pathlib import Path

_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def refuse_adapter(folder: Path) -> None:
    """Raises ValueError for a model folder that holds an adapter: its weights would be read without it."""
    for name in _FILES:
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name}: an adapter, which is not read; expected a folder of whole weights (merge the adapter or remove it)"
            )
