"""`minpro study`: the command line of megatron_minpro.study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_minpro.commands.parameters import takes
from megatron_minpro.option import Option

if TYPE_CHECKING:
    from megatron_minpro.study.cells import Cell
    from megatron_minpro.study.definition import Study
    from megatron_minpro.study.rows import Row

_DEFAULT_HARDWARE = "h100"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """What `minpro study` is asked for."""

    study: Annotated[Path, Option("the study's YAML file, or the name of a shipped one, such as lag_sweep_tiny", argument=True)]
    dry_run: Annotated[bool, Option("list the cells, check all of their configurations, say what they would cost, run nothing")] = False
    smoke: Annotated[
        bool,
        Option(
            "real but short runs in a folder of their own, with the first seed: every level of every axis once, not every combination "
            "(14 objectives at 3 lags are 14 runs)"
        ),
    ] = False
    report: Annotated[bool, Option("write tables and plots of the rows that are there, run nothing")] = False
    slurm: Annotated[bool, Option("print a shell script that submits one job of several nodes for each cell that is left")] = False
    jobs: Annotated[
        int | None, Option("cells that run at the same time; default: 1, and with --slurm as many as Slurm likes", minimum=1)
    ] = None
    retry_failed: Annotated[bool, Option("run the cells again whose row says that they failed")] = False
    delete_runs: Annotated[bool, Option("remove the run folder of a cell once its row is on disk; checkpoints are large")] = False
    cell: Annotated[int | None, Option("run this cell of the list alone, as a job array's task does", minimum=0)] = None
    stop_file: Annotated[Path | None, Option("stop with checkpoints when this file appears, as after Ctrl-C")] = None
    hardware: Annotated[
        str | None,
        Option(f"GPUs that --dry-run and --slurm plan for, a name in configs/hardware or a .yaml file; default: {_DEFAULT_HARDWARE}"),
    ] = None
    mean_tokens: Annotated[int | None, Option("with --dry-run: of a response; default: rollout.max_new_tokens", minimum=1)] = None
    gpus_per_node: Annotated[int, Option("with --slurm", minimum=1)] = 8


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
      minpro study lag_sweep_30b --dry-run --hardware h200 --mean-tokens 6000
      minpro study lag_sweep_30b --slurm | bash
    """
    _check(options)
    from megatron_minpro.study.cells import make_cells
    from megatron_minpro.study.definition import read_study
    from megatron_minpro.study.rows import rows_of
    from megatron_minpro.study.running import collect
    from megatron_minpro.study.smoke import smoke_study

    found = smoke_study(read_study(options.study)) if options.smoke else read_study(options.study)
    cells = make_cells(found, smoke=options.smoke)
    if options.cell is not None and options.cell >= len(cells):
        raise ValueError(f"--cell: {options.cell}, expected 0 to {len(cells) - 1}: the study has {len(cells)} cells")
    rows, others = rows_of(found.folder, cells)
    if others:
        typer.echo(f"{found.folder}: {others} rows of cells that the study does not have are left out", err=True)
    if options.dry_run:
        _show(options, found, cells, rows)
        return
    considered = cells if options.cell is None else [cells[options.cell]]
    rows |= {row.cell: row for row in collect([cell for cell in considered if cell.name not in rows], found.folder)}
    todo = [cell for cell in considered if cell.name not in rows or (options.retry_failed and rows[cell.name].status == "failed")]
    if options.report:
        from megatron_minpro.study.execution import report

        typer.echo(report(found, rows, total=len(cells)))
    elif options.slurm:
        _submit(options, found, todo)
    else:
        _run(options, found, cells, todo, rows)


def _check(options: StudyOptions) -> None:
    """Raises ValueError for options that do not go together."""
    chosen = [name for name in ("dry_run", "report", "slurm") if getattr(options, name)]
    if len(chosen) > 1:
        raise ValueError(f"{' '.join('--' + name.replace('_', '-') for name in chosen)}: expected one of them")
    if options.smoke and (options.jobs or 1) > 1:
        raise ValueError(f"--jobs: {options.jobs}, expected 1 with --smoke, whose cells share their servers one after the other")
    if options.smoke and (options.slurm or options.cell is not None):
        raise ValueError("--smoke: expected neither --slurm nor --cell beside it")
    if options.mean_tokens is not None and not options.dry_run:
        raise ValueError("--mean-tokens: expected --dry-run beside it")


def _show(options: StudyOptions, found: Study, cells: Sequence[Cell], rows: Mapping[str, Row]) -> None:
    from megatron_minpro.study.dry_run import describe
    from megatron_minpro.study.execution import check_cells
    from megatron_minpro.study.rows import read_rows
    from megatron_minpro.study.smoke import smoke_study
    from parallel.capabilities import detect
    from parallel.planner.hardware import read_hardware

    # A run whose model is made on the spot is a small one for a CPU, unless there are GPUs, or somebody names some.
    on_gpus = options.hardware is not None or detect().cuda_devices or any(cell.config.model.warm_up is None for cell in cells)
    machine = read_hardware(options.hardware or _DEFAULT_HARDWARE) if on_gpus else None
    smoke_rows = {} if options.smoke else read_rows(smoke_study(found).folder)
    not_checked = check_cells(cells)
    typer.echo(describe(cells, rows, smoke_rows, machine=machine, mean_tokens=options.mean_tokens, not_checked=not_checked))


def _submit(options: StudyOptions, found: Study, todo: Sequence[Cell]) -> None:
    from megatron_minpro.run.preflight import check_job
    from megatron_minpro.study.jobs import submission
    from parallel.planner.hardware import read_hardware

    if not todo:
        raise ValueError(f"{found.folder}: every cell has a row; expected one that is left")
    for cell in todo:
        check_job(cell.config)
    machine = read_hardware(options.hardware or _DEFAULT_HARDWARE)
    typer.echo(submission(todo, found.folder, machine=machine, gpus_per_node=options.gpus_per_node, jobs=options.jobs))


def _run(options: StudyOptions, found: Study, cells: Sequence[Cell], todo: Sequence[Cell], rows: Mapping[str, Row]) -> None:
    from megatron_minpro.study.execution import HowToRun, check_cells, run_study
    from megatron_minpro.study.running import Interrupted

    check_cells(todo)
    how = HowToRun(
        jobs=options.jobs or 1,
        delete_runs=options.delete_runs or found.delete_runs,
        shared=options.smoke,
        alone=options.cell is None,
        stop_file=options.stop_file,
    )
    try:
        run_study(found, cells, todo, rows, how=how, say=typer.echo)
    except Interrupted as interruption:
        typer.echo(f"minpro: {interruption}", err=True)
        raise typer.Exit(1) from None
