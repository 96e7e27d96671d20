"""The configurations that come with the project: `configs/` in the repository, `parallel/configs/` in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(*parts: str) -> Path:
    """The folder with the shipped run configurations, or one below it, such as `shipped_folder("hardware")`."""
    installed = _PACKAGE / "configs"
    return (installed if installed.is_dir() else _PACKAGE.parent / "configs").joinpath(*parts)
