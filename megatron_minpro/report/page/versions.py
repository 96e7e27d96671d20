"""Versions of the program and of what it computes with, where the page is written."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("megatron-minpro", "torch", "megatron-core", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Name -> version, Python's among them. A package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
