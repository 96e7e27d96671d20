"""`minpro train`: the command line of megatron_minpro.run.launcher."""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_minpro.commands.parameters import Config, Overrides, takes
from megatron_minpro.option import Option

if TYPE_CHECKING:
    from megatron_minpro.config import RunConfig


def _read_attempt(text: str) -> tuple[str, int]:
    job, _, number = text.rpartition(".")
    if not (job and number.isdecimal()):
        raise ValueError(f"--attempt {text!r}: expected JOB.REQUEUES, as in 4711.0 for the first start of job 4711")
    return job, int(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What `minpro train` is asked for."""

    config: Config
    overrides: Overrides = ()
    dry_run: Annotated[bool, Option("check everything, show what would start, start nothing")] = False
    prepare: Annotated[
        bool, Option("check, write the resolved configuration into the run folder, start nothing: a job script's first step")
    ] = False
    attempt: Annotated[
        tuple[str, int] | None,
        Option(
            "with --prepare: JOB.REQUEUES, kept in RUN/attempts.jsonl with the checkpoint that it begins with",
            given=str,
            read=_read_attempt,
            metavar="JOB.REQUEUES",
        ),
    ] = None
    resume: Annotated[
        Literal["auto", "never", "must"],
        Option("auto: continue the newest checkpoint, if any; never: refuse a used folder; must: refuse a new one"),
    ] = "auto"
    slurm: Annotated[bool, Option("with --dry-run: the sbatch command, its nodes, and whether it fits")] = False
    hardware: Annotated[str, Option("with --slurm: the cluster's GPUs, a name in configs/hardware or a .yaml file")] = "h100"
    gpus_per_node: Annotated[int, Option("with --slurm", minimum=1)] = 8


@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a policy: base model, rollout servers, trainer ranks, evaluation, plots.

    \b
    Example:
      minpro train configs/tiny_moe_cpu.yaml
      minpro train configs/tiny_moe_cpu.yaml objective.name=cispo staleness=4 name=cispo_n4
      minpro train configs/qwen3_30b_a3b.yaml --dry-run
      minpro train configs/qwen3_30b_a3b.yaml --dry-run --slurm --hardware h200 parallel.ep=16
    """
    from megatron_minpro.config import load_config

    if options.attempt is not None and not options.prepare:
        raise ValueError("--attempt: expected --prepare beside it; other starts are not kept")
    config = load_config(options.config, options.overrides)
    if options.slurm:
        _show_job(options, config)
    elif options.dry_run:
        from rich.console import Console

        from megatron_minpro.run.dry_run import describe

        with Console(stderr=True).status("checking model, prompts and machine"):
            shown = describe(config, resume=options.resume)
        Console(highlight=False).print(shown)
    elif options.prepare:
        from rich.console import Console

        from megatron_minpro.run.preflight import measured_stop, prepare

        with Console(stderr=True).status("checking model and prompts"):
            run_dir = prepare(config, attempt=options.attempt)
        if (warning := measured_stop(config)) is not None:
            typer.echo(f"minpro: {warning}", err=True)
        typer.echo(run_dir)
    else:
        _train(options, config)


def _show_job(options: TrainOptions, config: RunConfig) -> None:
    if not options.dry_run:
        raise ValueError("--slurm: expected --dry-run beside it; the job itself is started by the sbatch command that it prints")
    from rich.console import Console

    from megatron_minpro.cluster import slurm
    from megatron_minpro.run.preflight import check_job

    check_job(config)
    command, shown = slurm.describe(
        options.config, options.overrides, config, hardware=options.hardware, gpus_per_node=options.gpus_per_node
    )
    typer.echo(command)
    Console(highlight=False).print(shown)


def _train(options: TrainOptions, config: RunConfig) -> None:
    """Raises ValueError for wrong input and RuntimeError, naming the logs, for what fails while it runs."""
    from megatron_minpro.run import launcher

    try:
        launcher.run(config, resume=options.resume)
    except ValueError:
        raise
    except launcher.Interrupted as interruption:
        typer.echo(f"minpro: {interruption}", err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        logs = config.run_dir / "logs"
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            logs.mkdir(parents=True, exist_ok=True)
            (logs / "launcher_traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise RuntimeError(f"{str(error) or type(error).__name__} (logs: {logs})") from error
