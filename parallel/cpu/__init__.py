"""What exists only to run Megatron-Core's CUDA code on a CPU with gloo. `install` is the one entry; the modules are private to it."""

from __future__ import annotations

import torch


def install() -> bool:
    """Prepare Megatron-Core for this machine: call it before the first import of `megatron.core`. Idempotent.

    Returns:
        True when Megatron-Core will run on the CPU; False where CUDA is present and Megatron-Core runs as shipped.

    Raises:
        RuntimeError: megatron.core was imported earlier.
    """
    if torch.cuda.is_available():
        return False
    from parallel.cpu import import_hook

    import_hook.install()
    from parallel.cpu import gloo_collectives  # imports megatron.core

    gloo_collectives.install()
    return True
