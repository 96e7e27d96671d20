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

    runs: Annotated[tuple[Path, ...], Option("folders of runs, of any state", argument=True, metavar="RUN...")]
    out: Annotated[Path | None, Option("the page; default: report.html in the folder of the one run", metavar="FILE")] = None


@takes(ReportOptions)
def report(options: ReportOptions) -> None:
    """Write one page about runs that `minpro train` or a job script made: curves, lag, single tokens, runs laid over each other.

    Each complete run also gets its summary.json and plots/ anew, any other run the plots so far. The page is one HTML file that needs no
    network. What a folder lacks is said in it.

    \b
    Example:
      minpro report runs/tiny_moe_cpu
      minpro report runs/studies/mine/cells/*/ --out mine.html
    """
    if options.out is None and len(options.runs) > 1:
        raise ValueError(f"--out: missing, expected the path of the page about {len(options.runs)} runs, as in --out report.html")
    if options.out is not None and options.out.is_dir():
        raise ValueError(f"--out: {options.out} is a folder, expected the path of a file")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out: {options.out.parent} is no folder, expected one that exists")
    from megatron_minpro.report.runs import read_run
    from megatron_minpro.run import finished
    from megatron_minpro.run.run_folder import PAGE_FILE

    for run_dir in options.runs:
        read_run(run_dir)  # what is no run is refused before anything is written
    for run_dir in options.runs:
        try:
            typer.echo(finished.report(run_dir))
        except ValueError as error:
            typer.echo(f"{run_dir}: neither summary.json nor plots: {error}")
    typer.echo(f"page: {finished.write_page(options.runs, options.out or options.runs[0] / PAGE_FILE)}")
