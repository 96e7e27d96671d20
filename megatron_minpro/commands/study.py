"""`minpro study`: the command line of megatron_minpro.study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_minpro.commands.parameters import takes
from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """What `minpro study` is asked for."""

    study: Annotated[Path, Option("the study's YAML file, or the name of a shipped one, such as lag_sweep_tiny", argument=True)]
    jobs: Annotated[int, Option("cells that run at the same time", minimum=1)] = 1
    retry_failed: Annotated[bool, Option("run the cells again whose row says that they failed")] = False
    delete_runs: Annotated[bool, Option("remove the run folder of a cell once its row is on disk; checkpoints are large")] = False
    smoke: Annotated[
        bool,
        Option(
            "in a folder of its own, real but short runs with the first seed: every level of every axis once, not every combination "
            "(14 objectives at 3 lags are 14 runs)"
        ),
    ] = False
    report: Annotated[bool, Option("write tables and plots of the rows that are there, run nothing")] = False


@takes(StudyOptions)
def study(options: StudyOptions) -> None:
    """Train every cell of a grid, paired by seed, and write rows.jsonl, report.md, tables and plots into one folder.

    Every cell is a run of `minpro train`. The same command continues an interrupted study. A cell that fails becomes a row with its error.

    \b
    Example:
      minpro study lag_sweep_tiny --smoke
      minpro study lag_sweep_tiny
      minpro study my_study.yaml --jobs 2 --delete-runs
      minpro study my_study.yaml --report
    """
    from megatron_minpro.study.cells import make_cells
    from megatron_minpro.study.definition import read_study
    from megatron_minpro.study.execution import check_cells, report, run_study
    from megatron_minpro.study.rows import rows_of
    from megatron_minpro.study.running import Interrupted
    from megatron_minpro.study.smoke import smoke_study

    found = read_study(options.study)
    if options.smoke:
        if options.jobs > 1:
            raise ValueError(f"--jobs: {options.jobs}, expected 1 with --smoke, whose cells share their servers one after the other")
        found = smoke_study(found)
    cells = make_cells(found, smoke=options.smoke)
    rows, others = rows_of(found.folder, cells)
    if others:
        typer.echo(f"{found.folder}: {others} rows of cells that the study does not have are left out", err=True)
    if options.report:
        typer.echo(report(found, rows, total=len(cells)))
        return
    todo = [cell for cell in cells if cell.name not in rows or (options.retry_failed and rows[cell.name].status == "failed")]
    check_cells(todo)
    try:
        run_study(
            found,
            cells,
            todo,
            rows,
            jobs=options.jobs,
            delete_runs=options.delete_runs or found.delete_runs,
            shared=options.smoke,
            say=typer.echo,
        )
    except Interrupted as interruption:
        typer.echo(f"minpro: {interruption}", err=True)
        raise typer.Exit(1) from None
