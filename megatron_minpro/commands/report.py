"""`minpro report`: the command line of megatron_minpro.run.finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_minpro.commands.parameters import takes
from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What `minpro report` is asked for."""

    run_dir: Annotated[Path, Option("folder of the run", argument=True)]


@takes(ReportOptions)
def report(options: ReportOptions) -> None:
    """Write summary.json and plots/ of a run that `minpro train` or a job script made. Of a run that is not complete, only the plots.

    \b
    Example:
      minpro report runs/tiny_moe_cpu
    """
    from megatron_minpro.run import finished

    typer.echo(finished.report(options.run_dir))
