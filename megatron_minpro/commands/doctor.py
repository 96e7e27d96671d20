"""`minpro doctor`: of this machine, of a configuration on it, and of all machines of a job together."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from megatron_minpro.commands.parameters import AsJson, Overrides, takes
from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What `minpro doctor` is asked for."""

    config: Annotated[
        Path | None, Option("a run's YAML file, or the name of a shipped one: are its model, prompts and keys here?", argument=True)
    ] = None
    overrides: Overrides = ()
    as_json: AsJson = False
    peers: Annotated[str, Option("host names of a job's nodes, trainers first; run the same command on each")] = ""
    trainers: Annotated[int, Option("how many of the peers train; the others serve")] = 1
    gpus: Annotated[int, Option("GPUs that each peer must have")] = 8
    port: Annotated[int, Option("a free port of the first peer")] = 29400
    node: Annotated[str, Option("this machine's name among the peers; default: Slurm's, or the host name")] = ""
    timeout_s: Annotated[float, Option("how long to wait for the others")] = 120.0


@takes(DoctorOptions)
def doctor(options: DoctorOptions) -> None:
    """Say what is installed, what will be used and what is missing. Exit code 1 when a run could not start.

    The trainer's and the servers' environments stand side by side: what each of them imports and loads. Where there are GPUs both need the
    same torch, CUDA and NCCL.

    With --peers the nodes of a job compare what they have, try every GPU and every connection, add up numbers over all trainer ranks and
    broadcast from the first of them to the servers' GPUs.

    \b
    Example:
      minpro doctor
      minpro doctor configs/tiny_moe_cpu.yaml --json
      srun minpro doctor runs/qwen3_30b_a3b/config.yaml --peers n0,n1,n2,n3 --trainers 2 --gpus 8
    """
    if options.peers:
        _examine_nodes(options)
    else:
        _examine_this_machine(options)


def _examine_nodes(options: DoctorOptions) -> None:
    if options.config is None:
        raise ValueError("--peers: the nodes look at a run together, expected its CONFIG as well")
    from megatron_minpro.cluster.nodes.check import check_cluster
    from megatron_minpro.cluster.nodes.membership import Membership
    from megatron_minpro.config import load_config

    membership = Membership(
        node=options.node or os.environ.get("SLURMD_NODENAME", os.uname().nodename),
        nodes=tuple(options.peers.split(",")),
        trainers=options.trainers,
        port=options.port,
        gpus_per_node=options.gpus,
        timeout_s=options.timeout_s,
    )
    check_cluster(load_config(options.config, options.overrides), membership, announce=typer.echo)


def _examine_this_machine(options: DoctorOptions) -> None:
    from megatron_minpro.cluster import facts

    found = facts.examine()
    if options.config is not None:
        from megatron_minpro.cluster.checks import examine_config
        from megatron_minpro.config import load_config

        found = replace(found, findings=(*found.findings, *examine_config(load_config(options.config, options.overrides))))
    if options.as_json:
        typer.echo(json.dumps(facts.as_json(found), indent=2))
    else:
        from rich.console import Console

        Console(highlight=False).print(facts.as_table(found.findings), "", facts.side_by_side(found.installations))
    if found.missing:
        raise RuntimeError(f"missing: {', '.join(found.missing)}")
