"""A run's configuration by path or by shipped name: `runs/mine.yaml`, or `tiny_moe_cpu`."""

from __future__ import annotations

from pathlib import Path

from megatron_minpro.config.settings import ConfigError
from megatron_minpro.registry import nearest
from parallel.shipped import shipped_folder

_SUFFIXES = (".yaml", ".yml")


def find_config(name: str | Path) -> Path:
    """The file that `name` means. What lies in the working folder never changes the meaning of a shipped name.

    Args:
        name: a path, or the name of a shipped configuration, which has neither folder nor suffix.

    Raises:
        ConfigError: no shipped configuration has the name; or the file does not exist, and a shipped one is called so.
    """
    path = Path(name)
    shipped = sorted(file.stem for file in shipped_folder().glob("*.yaml"))
    if path.suffix in _SUFFIXES and path.stem in shipped and not path.exists():
        raise ConfigError(f"{path}: does not exist; did you mean the shipped configuration {path.stem}?")
    if path.suffix in _SUFFIXES or len(path.parts) != 1:
        return path
    if path.name not in shipped:
        raise ConfigError(f"{path}: no shipped configuration has this name; {nearest(path.name, shipped)}; a file's name ends in .yaml")
    found = shipped_folder() / f"{path.name}.yaml"
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found
