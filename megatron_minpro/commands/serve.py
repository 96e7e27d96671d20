"""`minpro serve`: the command line of megatron_minpro.run.serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_minpro.commands.parameters import Config, Overrides, takes
from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `minpro serve` is asked for."""

    config: Config
    overrides: Overrides = ()
    folder: Annotated[Path | None, Option("gets endpoints.json and the logs; default: the run folder's servers/")] = None
    dry_run: Annotated[bool, Option("check everything, show what would start, start nothing")] = False


@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Run a configuration's rollout servers alone, until Ctrl-C or SIGTERM; trainers elsewhere name them in rollout.endpoints.

    A server that dies or hangs is started again on its port; trainers ask it again once they have given it their weights.

    \b
    Example:
      minpro serve configs/tiny_moe_cpu.yaml rollout.base_port=30000
      minpro serve configs/tiny_moe_cpu.yaml --dry-run
    """
    from megatron_minpro.config import load_config

    config = load_config(options.config, options.overrides)
    from megatron_minpro.run import serving

    if options.dry_run:
        typer.echo(serving.describe(config))
        return
    serving.serve(config, folder=options.folder or config.run_dir / "servers", announce=typer.echo)
