"""`minpro doctor`: of this machine, of a configuration on it, and of all machines of a job together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    config: Annotated[Path | None, typer.Argument(help="a run's YAML file: are its model, prompts and keys here?")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="settings that differ from the file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
    peers: Annotated[str, typer.Option(help="host names of a job's nodes, trainers first; run the same command on each")] = "",
    trainers: Annotated[int, typer.Option(help="how many of the peers train; the others serve")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs that each peer must have")] = 8,
    port: Annotated[int, typer.Option(help="a free port of the first peer")] = 29400,
    node: Annotated[str, typer.Option(help="this machine's name among the peers; default: Slurm's, or the host name")] = "",
    timeout_s: Annotated[float, typer.Option(help="how long to wait for the others")] = 120.0,
) -> None:
    """Say what is installed, what will be used and what is missing. Exit code 1 when a run could not start.

    With --peers the nodes of a job compare GPUs, packages, clocks, disk and paths, and add up a number over the trainers' network.

    \b
    Example:
      minpro doctor
      minpro doctor configs/tiny_moe_cpu.yaml --json
      srun minpro doctor runs/qwen3_30b_a3b/config.yaml --peers n0,n1,n2,n3 --trainers 2 --gpus 8
    """
    from megatron_minpro.cluster import facts
    from megatron_minpro.config import load_config

    if config is not None and peers:
        from megatron_minpro.cluster.nodes import Membership, check_cluster

        membership = Membership(
            node=node or os.environ.get("SLURMD_NODENAME", os.uname().nodename),
            nodes=tuple(peers.split(",")),
            trainers=trainers,
            port=port,
            gpus_per_node=gpus,
            timeout_s=timeout_s,
        )
        check_cluster(load_config(config, overrides or []), membership, announce=typer.echo)
        return
    if peers:
        raise ValueError("--peers: the nodes look at a run together, expected its CONFIG as well")
    findings = facts.examine()
    if config is not None:
        from megatron_minpro.cluster.checks import examine_config

        findings += examine_config(load_config(config, overrides or []))
    if as_json:
        typer.echo(json.dumps(facts.as_json(findings), indent=2))
    else:
        from rich.console import Console

        Console(highlight=False).print(facts.as_table(findings))
    if not facts.can_train(findings):
        missing = ", ".join(finding.subject for finding in findings if finding.verdict == "missing")
        raise RuntimeError(f"missing: {missing}")
