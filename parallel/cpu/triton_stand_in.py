"""What `import triton` means to megatron.core on a CPU: enough to define its kernels, nothing to run them.

From 0.18 on Megatron-Core imports triton unconditionally for kernels that only CUDA tensors reach (see `import_hook.py`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

language = types.SimpleNamespace(constexpr=int)  # kernels name it in annotations


def jit(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, which cannot be launched as `kernel[grid](...)`: TypeError."""
    return kernel
