"""NCCL's variables on which trainer ranks and servers must agree: they share a communicator (weights/broadcast_group.py).

SGLang sets two of them itself in its servers, where they are not set. A communicator in which some ranks use cuMem buffers or NVLink SHARP
and others do not can hang. So both sides are given the same values. A value that the user has set for the job stays, on both sides.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# What SGLang 0.5.23 would choose (entrypoints/engine.py) for a server on one node without symmetric memory.
AGREED = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def agree(environment: MutableMapping[str, str]) -> None:
    """Set in a process's environment what is not set there."""
    for name, value in AGREED.items():
        environment.setdefault(name, value)
