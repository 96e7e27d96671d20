"""One trainer rank: `torchrun ... -m megatron_minpro.run.rank RUN_DIR {train|warm_up}`. Started by the launcher or by a Slurm script;
on one machine without CUDA by forked_ranks.py.

It sets what CUDA reads at its first use. The import of Megatron-Core is such a use, so the rank itself (worker.py) is imported afterwards.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.tracking.run_files import CONFIG_FILE
from parallel import cuda_environment
from rollout import nccl_variables


def set_environment(config: RunConfig) -> None:
    """Set what CUDA and NCCL read, where it is not set."""
    cuda_environment.enter(config.layout, deterministic=config.debug.deterministic)
    nccl_variables.agree(os.environ)


def prepare(arguments: list[str]) -> Callable[[], None]:
    """Import everything; what is left to do for a rank that knows its number.

    Args:
        arguments: RUN_DIR and the task.
    """
    set_environment(load_config(Path(arguments[0]) / CONFIG_FILE, []))
    gc.disable()  # nothing that is imported becomes garbage, and looking for some takes a fifth of the imports' time
    worker = importlib.import_module("megatron_minpro.run.worker")
    gc.freeze()  # nor need later collections look at it
    gc.enable()
    return partial(worker.main, arguments)


def main(arguments: list[str]) -> None:
    """Entry point of a rank of its own process."""
    prepare(arguments)()


if __name__ == "__main__":
    main(sys.argv[1:])
