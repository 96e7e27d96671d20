"""The `minpro` command. Exit codes: 0 done, 1 failed while running, 2 the input is wrong; a failure is one line on stderr.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from megatron_minpro.commands import convert as convert_command
from megatron_minpro.commands import doctor as doctor_command
from megatron_minpro.commands import evaluate as evaluate_command
from megatron_minpro.commands import plan as plan_command
from megatron_minpro.commands import scale as scale_command

app = typer.Typer(
    name="minpro",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Reinforcement-learning post-training of Mixture-of-Experts language models with MinPRO and its rivals.\n\n"
    "Example: minpro train configs/tiny_moe_cpu.yaml",
)

_TYPER_INTERRUPTED = 130  # typer turns a KeyboardInterrupt into this return value

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="settings that differ from the file, as in rollout.group_size=4")
]


class Resume(StrEnum):
    """What to do about a run folder that exists."""

    AUTO = "auto"
    NEVER = "never"
    MUST = "must"


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="validate, show what would start, start nothing")] = False,
    resume: Annotated[
        Resume,
        typer.Option(help="auto: continue the newest checkpoint, if any; never: refuse a used folder; must: refuse a new one"),
    ] = Resume.AUTO,
    slurm: Annotated[bool, typer.Option("--slurm", help="with --dry-run: the sbatch command, its nodes, and whether it fits")] = False,
    hardware: Annotated[str, typer.Option(help="with --slurm: the cluster's GPUs, a name in configs/hardware or a .yaml file")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="with --slurm")] = 8,
) -> None:
    """Train a policy: base model, rollout servers, trainer ranks, evaluation, plots.

    \b
    Example:
      minpro train configs/tiny_moe_cpu.yaml
      minpro train configs/tiny_moe_cpu.yaml objective.name=cispo staleness=4 name=cispo_n4
      minpro train configs/qwen3_30b_a3b.yaml --dry-run
      minpro train configs/qwen3_30b_a3b.yaml --dry-run --slurm --hardware h200 parallel.ep=16
    """
    from megatron_minpro.config import load_config

    run_config = load_config(config, overrides or [])
    if slurm:
        if not dry_run:
            raise ValueError("--slurm: expected --dry-run beside it; the job itself is started by the sbatch command that it prints")
        from rich.console import Console

        from megatron_minpro.cluster import slurm as slurm_plan

        command, shown = slurm_plan.describe(config, overrides or [], run_config, hardware=hardware, gpus_per_node=gpus_per_node)
        typer.echo(command)
        Console(highlight=False).print(shown)
        return
    if dry_run:
        from rich.console import Console

        from megatron_minpro.run.dry_run import describe

        Console(highlight=False).print(describe(run_config))
        return
    from megatron_minpro.run import launcher

    try:
        launcher.run(run_config, resume=resume.value)
    except ValueError:
        raise
    except Exception as error:
        logs = run_config.run_dir / "logs"
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            logs.mkdir(parents=True, exist_ok=True)
            (logs / "launcher_traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise RuntimeError(f"{str(error) or type(error).__name__} (logs: {logs})") from error


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="gets endpoints.json and the logs; default: the run folder's servers/")] = None,
) -> None:
    """Run a configuration's rollout servers alone, until Ctrl-C or SIGTERM; trainers elsewhere name them in rollout.endpoints.

    A server that dies or hangs is started again on its port; trainers ask it again once they have given it their weights.

    \b
    Example:
      minpro serve configs/tiny_moe_cpu.yaml rollout.base_port=30000
    """
    from megatron_minpro.config import load_config

    run_config = load_config(config, overrides or [])
    from megatron_minpro.run import serving

    serving.serve(run_config, folder=run_config.run_dir / "servers" if folder is None else folder, announce=typer.echo)


app.command("doctor")(doctor_command.doctor)
app.command("evaluate")(evaluate_command.evaluate)
app.add_typer(convert_command.app, name="convert")
app.command("plan")(plan_command.plan)
app.command("scale")(scale_command.scale)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script: runs the command and exits with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; says in one line on stderr what went wrong.

    ValueError means that the input is wrong (2); anything else is a failure while running (1).
    """
    try:
        result: Any = typer.main.get_command(app).main(args=arguments, prog_name="minpro", standalone_mode=False)
    except TyperException as error:
        return _fail(f"{error.format_message()} (see minpro --help)", code=2)
    except ValueError as error:
        return _fail(str(error), code=2)
    except Exception as error:
        return _fail(str(error) or type(error).__name__, code=1)
    if result == _TYPER_INTERRUPTED:
        return _fail("interrupted", code=1)
    return result if isinstance(result, int) else 0


def _fail(message: str, *, code: int) -> int:
    print(f"minpro: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
