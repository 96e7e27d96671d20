"""Logging and torch, alike in every process of a run."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

import torch

from megatron_minpro.config import RunConfig

_PR_SET_NAME = 15  # prctl(2)


def configure_process(config: RunConfig, *, name: str, log_level: str, device_type: str) -> None:
    """Call once, at the start.

    Args:
        config: of the run.
        name: stands in every line that this process logs, and in the lists of ps and top.
        log_level: debug | info | warning ...
        device_type: where torch computes: cuda | cpu.
    """
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    logging.basicConfig(level=log_level.upper(), format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request otherwise
    if device_type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if config.debug.deterministic and device_type == "cpu":
        # The same switch. torch.use_deterministic_algorithms also tells torch's compiler, which it imports for that: 0.6 s of CPU time in
        # every process. Nothing is compiled on a CPU.
        torch.set_deterministic_debug_mode("error")
    elif config.debug.deterministic:
        torch.use_deterministic_algorithms(True)
