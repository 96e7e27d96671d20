"""The process of one cell: `python -m megatron_minpro.study.child CONFIG {train|base_model}`, or a fork of a process that has imported it.

It calls the launcher of `minpro train`, and ends as that command does: 0 done, 1 failed or interrupted, 2 the input is wrong; a failure is
one line.
"""

from __future__ import annotations

import gc
import importlib
import sys
import traceback
from pathlib import Path
from typing import Literal

from megatron_minpro.config import load_config
from megatron_minpro.run import launcher
from megatron_minpro.working_folder import child_environment
from rollout.processes import ManagedProcess, fork, spawn

Task = Literal["train", "base_model"]
ERROR = "minpro: error: "
_NEEDED = ("megatron_minpro.run.worker", "megatron_minpro.report.plots")


def preload() -> None:
    """Import what a run needs into this process, so that `start` may fork it. Not where CUDA is."""
    import torch

    gc.disable()
    for name in _NEEDED:
        importlib.import_module(name)
    gc.freeze()  # children share these pages as long as no collection touches them
    gc.enable()
    torch.set_num_threads(1)  # a pool of threads would not exist in a fork


def start(path: Path, task: Task, *, log_path: Path, preloaded: bool) -> ManagedProcess:
    """Begin the task on a resolved configuration.

    Args:
        path: of the configuration.
        task: train a run, or make its base model alone.
        log_path: of what it prints.
        preloaded: fork this process, which has called `preload`.
    """
    name = f"{path.stem} ({task})"
    if preloaded:
        return fork(lambda: sys.exit(run(path, task, preloaded=True)), log_path=log_path, name=name)
    command = [sys.executable, "-m", __name__, str(path), task]
    return spawn(command, log_path=log_path, env=child_environment(), name=name)


def run(path: Path, task: Task, *, preloaded: bool = False) -> int:
    """Do the task in this process; returns its exit code."""
    try:
        config = load_config(path)
        if task == "base_model":
            launcher.make_base_model(config, preloaded=preloaded)
        else:
            launcher.run(config, resume="auto", preloaded=preloaded)
    except launcher.Interrupted as interruption:
        print(f"minpro: {interruption}", file=sys.stderr)
        return 1
    except ValueError as error:
        return _fail(error, code=2)
    except Exception as error:
        traceback.print_exc()
        return _fail(error, code=1)
    return 0


def _fail(error: Exception, *, code: int) -> int:
    print(f"{ERROR}{' '.join((str(error) or type(error).__name__).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2]))  # type: ignore[arg-type]
