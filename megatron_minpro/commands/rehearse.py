"""`minpro rehearse`: a rank of the cluster run on fake CUDA tensors, on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_minpro.commands.parameters import AsJson, Config, Overrides, takes
from megatron_minpro.option import Option

if TYPE_CHECKING:
    from megatron_minpro.cluster.rehearsing import Verdict
    from megatron_minpro.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearseOptions:
    """What `minpro rehearse` is asked for."""

    config: Config
    overrides: Overrides = ()
    rank: Annotated[int | None, Option("rehearse this rank; default: the first of every pipeline stage", minimum=0)] = None
    stage: Annotated[int | None, Option("rehearse the first rank of this pipeline stage", minimum=0)] = None
    layers: Annotated[int | None, Option("shorten the model to so many layers", minimum=1)] = None
    micro_batches: Annotated[int | None, Option("of a mini-batch and replica; default: as many as the pipeline has stages", minimum=1)] = (
        None
    )
    lengths: Annotated[
        str | None, Option("tokens of the mini-batch's sequences, as in 22528x4,1000x8; default: as long as they may become")
    ] = None
    dtype: Annotated[str | None, Option("in place of model.dtype")] = None
    recompute: Annotated[str | None, Option("in place of actor.recompute")] = None
    hardware: Annotated[str, Option("a name in configs/hardware, or a .yaml file: how much memory a GPU has")] = "h100"
    model_config: Annotated[Path | None, Option("a Hugging Face config.json; default: model.path's, or shipped sizes")] = None
    as_json: AsJson = False
    out: Annotated[Path | None, Option("a folder for report.md, rehearsal.json and a picture of memory per rank")] = None


@takes(RehearseOptions)
def rehearse(options: RehearseOptions) -> None:
    """Run one rank of the cluster run on fake CUDA tensors: memory, collectives, host waits and errors, without a GPU.

    The code that runs is that of the cluster: build, load, score, update, capture a checkpoint, export. Neither weights nor GPUs are
    needed, only a C++ compiler (g++). All 48 layers of Qwen3-30B-A3B take two minutes of one core and 1 GB.

    \b
    Example:
      minpro rehearse configs/qwen3_30b_a3b.yaml --layers 4
      minpro rehearse configs/qwen3_30b_a3b.yaml --hardware h200 parallel.ep=16 --out rehearsal
      minpro rehearse configs/qwen3_235b_a22b.yaml --stage 0 --lengths 22528x4,1000x8
    """
    rehearse_run(options)


def rehearse_run(options: RehearseOptions) -> None:
    """Raises ValueError for what cannot be rehearsed, RuntimeError for a run that would fail: a fault, or too little memory."""
    from rich.console import Console

    from megatron_minpro.cluster import rehearsing
    from megatron_minpro.config import load_config
    from parallel.planner.hardware import read_hardware
    from parallel.planner.models import find_config, read_config
    from parallel.rehearsal import launch

    assignments = [*options.overrides]
    assignments += [f"{key}={value}" for key, value in (("model.dtype", options.dtype), ("actor.recompute", options.recompute)) if value]
    run = load_config(options.config, assignments)
    machine = read_hardware(options.hardware)
    architecture = None if run.model.warm_up is None else run.model.warm_up.architecture
    model = find_config(run.model.path, architecture=architecture) if options.model_config is None else read_config(options.model_config)
    requests = rehearsing.make_requests(run, model, ranks=_ranks(options, run), lengths=_lengths(options, run), layers=options.layers)
    plan = rehearsing.plan_of(run, model, machine, layers=options.layers)
    with Console(stderr=True).status("starting") as status:
        results = launch.rehearse(requests, progress=lambda phase: status.update(f"rehearsing {phase}"))
    verdicts = [
        rehearsing.Verdict(result=result, limit_bytes=machine.usable_bytes, planned_bytes=plan.memory[result.stage].total)
        for result in results
    ]
    _show(options, verdicts)
    reason = rehearsing.failure(verdicts, plan)
    if reason is not None:
        raise RuntimeError(reason)


def _ranks(options: RehearseOptions, run: RunConfig) -> list[int]:
    from megatron_minpro.cluster.rehearsing import stage_ranks

    ranks = stage_ranks(run.layout)
    if options.rank is not None and options.stage is not None:
        raise ValueError("--rank and --stage: expected one of them")
    if options.rank is not None:
        return [options.rank]
    if options.stage is None:
        return ranks
    if options.stage >= len(ranks):
        raise ValueError(f"--stage: {options.stage}, expected less than parallel.pp = {len(ranks)}")
    return [ranks[options.stage]]


def _lengths(options: RehearseOptions, run: RunConfig) -> tuple[int, ...]:
    from megatron_minpro.cluster.rehearsing import fullest_lengths, read_lengths

    if options.lengths is None:
        return fullest_lengths(run, micro_batches=options.micro_batches or run.layout.pp)
    if options.micro_batches is not None:
        raise ValueError("--micro-batches follows from --lengths; expected one of them")
    return read_lengths(options.lengths)


def _show(options: RehearseOptions, verdicts: list[Verdict]) -> None:
    from rich.console import Console

    from megatron_minpro.cluster import rehearsal_report

    if options.out is not None:
        rehearsal_report.write(options.out, verdicts)
    if options.as_json:
        typer.echo(json.dumps(rehearsal_report.as_json(verdicts), indent=2))
        return
    Console(highlight=False).print(rehearsal_report.describe(verdicts))
    if options.out is not None:
        typer.echo(f"written to {options.out}: report.md, rehearsal.json, rank_*.png")
