"""`minpro study --slurm`: a shell script that submits one job for each cell that is left, as slurm/qwen3_30b_a3b.sbatch runs it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_minpro.cluster import slurm
from megatron_minpro.cluster.planned_stop import planned_stop
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.costs import plan_of
from megatron_minpro.study.running import write_config
from parallel.planner.hardware import Hardware


def submission(cells: Sequence[Cell], folder: Path, *, machine: Hardware, gpus_per_node: int, jobs: int | None) -> str:
    """Write the cells' configurations into the study's folder; returns the script.

    Args:
        cells: to be run.
        folder: of the study.
        machine: the cluster's GPUs.
        gpus_per_node: GPUs of a node.
        jobs: jobs that run at the same time; None: as many as Slurm likes.

    Raises:
        ValueError: ranks and servers do not fill whole nodes.
    """
    lines = ["set -euo pipefail"]
    for number, cell in enumerate(cells):
        config = cell.config
        split = slurm.split_nodes(config, gpus_per_node=gpus_per_node)
        stop = planned_stop(plan_of(config, machine, mean_tokens=None))
        options = ["--parsable", f"--job-name={shlex.quote(cell.name)}"]
        if jobs is not None and number >= jobs:
            options.append(f'--dependency="afterany:$job{number - jobs}"')
        path = write_config(config, folder)
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        lines.append(f"job{number}=$({slurm.sbatch_command(path, [], config.run_dir, split, stop, options=options)})")
    return "\n".join(lines)
