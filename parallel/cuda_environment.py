"""Environment variables that CUDA, torch and TransformerEngine read when a trainer rank first uses the device.

A variable that the user has set stays as it is. Other processes of the run (servers, graders) must not inherit ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from parallel.layout import ParallelLayout

_set_here: dict[str, str] = {}  # of this process: what `enter` set


def cuda_environment(layout: ParallelLayout, *, deterministic: bool) -> dict[str, str]:
    """Name -> value.

    Args:
        layout: of the run.
        deterministic: results must repeat: cuBLAS then needs workspaces of its own, and TransformerEngine must choose its kernels.
    """
    # Packed micro-batches differ in length: without it freed blocks of one length are of no use for another.
    found = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if layout.tp > 1 or layout.cp > 1:
        # Kernels start in the order of their calls, so a collective is under way before the product that hides it.
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if deterministic:
        found |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    return found


def enter(layout: ParallelLayout, *, deterministic: bool) -> None:
    """Set what is not set. Call it before anything imports Megatron-Core, which asks CUDA for its devices. Arguments as above."""
    for name, value in cuda_environment(layout, deterministic=deterministic).items():
        if name not in os.environ:
            os.environ[name] = _set_here[name] = value


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for another process: without what `enter` set here."""
    return {name: value for name, value in environment.items() if _set_here.get(name) != value}
