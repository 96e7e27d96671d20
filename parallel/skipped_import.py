"""Let a package that is imported for nothing believe that a module is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def skipped_import(name: str) -> Iterator[None]:
    """Inside the block, importing `name` raises ImportError unless it was imported before; afterwards it can be imported as ever."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # the import system takes it for "not there"
    try:
        yield
    finally:
        del sys.modules[name]
