"""Whether TransformerEngine imports. A package that is installed but does not import is treated as absent, by Megatron-Core too.

Its extension for torch is compiled on installation. Built against another torch, or without its libraries, it is found and cannot be
used. Megatron-Core asks in many places, some of which look for the outer package only, and would use half of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass

from parallel.hidden_packages import hide

MODULE = "transformer_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineImport:
    """What came of `import transformer_engine.pytorch`. version: None when it is not installed. error: None when it imports."""

    version: str | None
    error: str | None

    @property
    def usable_version(self) -> str | None:
        return self.version if self.error is None else None

    def describe(self) -> str:
        """One line for people."""
        if self.version is None:
            return "TransformerEngine absent"
        if self.error is None:
            return f"TransformerEngine {self.version}"
        remedy = "build it for this torch (make transformer-engine) or remove it (make without-transformer-engine)"
        return f"TransformerEngine {self.version} is installed but does not import ({self.error}): {remedy}"


@functools.cache
def import_engine() -> EngineImport:
    """Import it once. When that fails, later imports of it fail as if it were not installed."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        return EngineImport(version=None, error=None)
    if spec.origin is None:  # folders without a module: what pip leaves when it removes the package
        hide(MODULE)
        return EngineImport(version=None, error=None)
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    try:
        importlib.import_module(f"{MODULE}.pytorch")
    except Exception as error:  # seen: ImportError (another torch), OSError, FileNotFoundError (libraries), RuntimeError (its own checks)
        hide(MODULE)
        return EngineImport(version=version, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return EngineImport(version=version, error=None)
