"""What `minpro train CONFIG --dry-run --slurm` shows: the sbatch command, who gets which node, and whether it fits by the planner."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from megatron_minpro.cluster import planning
from megatron_minpro.cluster.planned_stop import PlannedStop, planned_stop
from megatron_minpro.cluster.training_choice import TrainingChoice
from megatron_minpro.config import RunConfig
from megatron_minpro.config.shipped import find_config
from parallel.planner import view
from parallel.planner.hardware import read_hardware
from parallel.planner.memory import GB
from parallel.planner.plan import Plan, make_plan, remedies

SCRIPT = "slurm/qwen3_30b_a3b.sbatch"
# Its own values, which need not be said.
_USUAL = {"CONFIG": "configs/qwen3_30b_a3b.yaml", "RUN_DIR": "runs/qwen3_30b_a3b", "TRAINER_NODES": "2", "SERVERS_PER_NODE": "4"}
_USUAL_NODES, _USUAL_GPUS = 4, 8
_SET_BY_SCRIPT = ("name", "output_dir", "world_size", "rollout.servers", "rollout.endpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSplit:
    """Whole nodes, the first `trainers` for the ranks."""

    trainers: int
    servers: int
    servers_per_node: int
    gpus_per_node: int

    @property
    def nodes(self) -> int:
        return self.trainers + self.servers


def split_nodes(config: RunConfig, *, gpus_per_node: int) -> NodeSplit:
    """Give ranks and servers whole nodes.

    Raises:
        ValueError: they do not fill nodes evenly; names the key.
    """
    world_size, servers, tp = config.world_size, config.rollout.servers, config.rollout.tp
    if world_size % gpus_per_node:
        raise ValueError(
            f"world_size: {world_size} ranks do not fill nodes of {gpus_per_node} GPUs; expected a multiple of {gpus_per_node}"
        )
    if servers == 0:
        raise ValueError("rollout.servers: 0 with endpoints; expected the number of servers that the job itself starts on its nodes")
    if tp > gpus_per_node:
        raise ValueError(f"rollout.tp: {tp}, expected at most {gpus_per_node}, the GPUs of a node")
    nodes = -(-servers // (gpus_per_node // tp))
    if servers % nodes:
        raise ValueError(f"rollout.servers: {servers} of {tp} GPUs cannot be shared evenly by {nodes} nodes of {gpus_per_node}")
    return NodeSplit(trainers=world_size // gpus_per_node, servers=nodes, servers_per_node=servers // nodes, gpus_per_node=gpus_per_node)


def sbatch_command(
    path: Path, overrides: Sequence[str], run_dir: Path, split: NodeSplit, stop: PlannedStop, *, options: Sequence[str] = ()
) -> str:
    """The command that submits the job.

    Args:
        path: the configuration's file.
        overrides: key=value settings. Those that the script sets from its variables are left out.
        run_dir: the run folder.
        split: who gets which nodes.
        stop: what the job needs between the signal and its time limit.
        options: further ones of sbatch, quoted for a shell.

    Returns:
        One line for a shell.
    """
    variables = {
        "CONFIG": str(path),
        "RUN_DIR": str(run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir),
        "TRAINER_NODES": str(split.trainers),
        "SERVERS_PER_NODE": str(split.servers_per_node),
    }
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if value != _USUAL[name]]
    words += stop.variables
    words += ["sbatch", f"--nodes={split.nodes}"] if split.nodes != _USUAL_NODES else ["sbatch"]
    if split.gpus_per_node != _USUAL_GPUS:
        words.append(f"--gpus-per-node={split.gpus_per_node}")
    words += [*stop.options, *options]
    settings = [shlex.quote(each) for each in overrides if each.partition("=")[0] not in _SET_BY_SCRIPT]
    return " ".join([*words, SCRIPT, *settings])


def describe(path: Path, overrides: Sequence[str], config: RunConfig, *, hardware: str, gpus_per_node: int) -> tuple[str, RenderableType]:
    """What `minpro train --dry-run --slurm` shows.

    Args:
        path: the configuration, a file or a shipped name.
        overrides: key=value settings beside it.
        config: both together, checked.
        hardware: the cluster's GPUs, by name or as a .yaml file.
        gpus_per_node: GPUs of a node.

    Returns:
        The sbatch command, and who gets which node with the plan of memory and time.

    Raises:
        ValueError: ranks and servers do not fill whole nodes, or the hardware cannot hold them.
    """
    path = find_config(path)  # the job script takes a file
    split = split_nodes(config, gpus_per_node=gpus_per_node)
    machine = read_hardware(hardware)
    shape = planning.shape_of(config)
    work = planning.reinforcement_work(config, mean_tokens=None, colocated=False)
    planning.check_length(shape, work)
    plan = make_plan(shape, config.layout, planning.training_of(config, machine, TrainingChoice()), machine, work)
    _refuse_what_does_not_fit(plan)
    stop = planned_stop(plan)
    ranks, servers = config.world_size, config.rollout.servers
    lines = [
        f"nodes 1 to {split.trainers} train: {ranks} ranks, {split.gpus_per_node} a node",
        f"nodes {split.trainers + 1} to {split.nodes} serve: {servers} SGLang servers of {config.rollout.tp} GPUs, "
        f"{split.servers_per_node} a node",
        stop.line(),
        f"before the first submission: {shlex.join(['minpro', 'rehearse', str(path), '--hardware', hardware, *overrides])}",
    ]
    command = sbatch_command(path, overrides, config.run_dir, split, stop)
    return command, Group(*map(Text, lines), view.describe(plan, [], []))


def _refuse_what_does_not_fit(plan: Plan) -> None:
    if plan.fits:
        return
    fullest = plan.fullest
    enough = "; ".join(change for change, other in remedies(plan) if other.fits)
    raise ValueError(
        f"parallel: {view.layout_text(plan.layout)} needs {fullest.total / GB:.1f} GB on a rank, {plan.hardware.name} holds "
        f"{plan.hardware.usable_bytes / GB:.1f} GB; largest part: {fullest.largest} with {fullest.parts()[fullest.largest] / GB:.1f} GB; "
        f"{f'would fit: {enough}' if enough else 'expected more GPUs, or GPUs with more memory'}"
    )
