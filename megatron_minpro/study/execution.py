"""One call of `minpro study`: checks, the cells that are left, the report after each."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_minpro.run.plug_ins import check_plug_ins
from megatron_minpro.run.preflight import check_dry_run
from megatron_minpro.run.ranks import are_forked
from megatron_minpro.study import child
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.definition import Study
from megatron_minpro.study.durations import duration
from megatron_minpro.study.rows import Row
from megatron_minpro.study.running import LOGS_FOLDER, check_folders, make_base_models, run_cells
from megatron_minpro.study.shared_servers import SharedServers
from megatron_minpro.study.tables import REPORT_FILE, write_tables
from megatron_minpro.tracking.progress import read_progress
from parallel.capabilities import detect

LOCK_FILE = "lock"
# Sections whose names and options are all that can be wrong once the configuration is valid.
_CHECKED_BY_PLUG_INS: dict[str, Any] = {
    **dict.fromkeys(("name", "seed", "objective", "advantages", "staleness", "schedule", "num_global_steps"), True),
    "actor": {"optimizer"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToRun:
    """
    jobs: cells at the same time.
    delete_runs: remove a run folder once its row is on disk.
    shared: the cells use the same servers, one cell at a time.
    alone: no other process runs cells of the study; False for an array task, which writes no report.
    stop_file: its appearance stops the cells under way with checkpoints; None: Ctrl-C alone does.
    """

    jobs: int
    delete_runs: bool
    shared: bool
    alone: bool
    stop_file: Path | None


def check_cells(cells: Sequence[Cell]) -> list[str]:
    """Everything that `minpro train --dry-run` checks. What does not depend on seed, objective, lag, optimizer and steps is checked once.

    Returns:
        What could not be checked here, one line each.

    Raises:
        ValueError: the first thing that is wrong, in one line.
    """
    capabilities = detect()
    not_checked: dict[str, None] = {}
    plugged, whole = set[str](), set[str]()
    for cell in cells:
        plug_ins = json.dumps(cell.config.model_dump(mode="json", exclude={"name", "seed"}))
        alike = json.dumps(cell.config.model_dump(mode="json", exclude=_CHECKED_BY_PLUG_INS))
        if alike not in whole:
            found = check_dry_run(cell.config, resume="auto", capabilities=capabilities)
            not_checked |= dict.fromkeys(found.not_checked)
        elif plug_ins not in plugged:
            check_plug_ins(cell.config)
        whole.add(alike)
        plugged.add(plug_ins)
    check_folders(cells)
    return list(not_checked)


def run_study(
    study: Study, cells: Sequence[Cell], todo: Sequence[Cell], rows: Mapping[str, Row], *, how: HowToRun, say: Callable[[str], None]
) -> None:
    """Run the cells that are left, and write the report after each.

    Args:
        study: its definition.
        cells: all of them.
        todo: those to run.
        rows: cell -> row, before this call.
        how: to run them.
        say: takes lines for people.

    Raises:
        ValueError: another process runs this study.
        RuntimeError: cells failed; their rows say why. Or the base model could not be made.
        Interrupted: after Ctrl-C.
    """
    folder, known = study.folder, dict(rows)
    view = _View(total=len(todo))

    def ended(row: Row) -> None:
        known[row.cell] = row
        view.clear()
        say(f"{len(known)} of {len(cells)}: {row.cell}: {_describe(row)}; about {duration(view.one_more())} left")
        if how.alone:
            write_tables(folder, study, known, total=len(cells))

    with _ownership(folder, alone=how.alone):
        say(f"{len(cells)} cells, {len(rows)} have a row; {len(todo)} to run in {folder}")
        if todo:
            _run(todo, folder, how, view=view, ended=ended, say=say)
    if how.alone:
        say(report(study, known, total=len(cells)))
    failed = [cell.name for cell in todo if cell.name in known and known[cell.name].status == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} cells failed, the first: {failed[0]}; --retry-failed runs them again")


def _run(
    todo: Sequence[Cell], folder: Path, how: HowToRun, *, view: _View, ended: Callable[[Row], None], say: Callable[[str], None]
) -> None:
    capabilities = detect()
    if preloaded := all(are_forked(cell.config, capabilities) for cell in todo):
        child.preload()
    make_base_models([cell.config for cell in todo], folder=folder, preloaded=preloaded)
    with SharedServers(folder / LOGS_FOLDER, say) as servers:
        run_cells(
            todo,
            folder=folder,
            jobs=how.jobs,
            delete_runs=how.delete_runs,
            preloaded=preloaded,
            place=servers.place if how.shared else lambda config: config,
            watch=view.show,
            stop_file=how.stop_file,
            ended=ended,
            say=say,
        )


def report(study: Study, rows: Mapping[str, Row], *, total: int) -> str:
    """Write tables, plots and the page; returns one line that says where. total: cells of the study.

    Raises ValueError when there is no row.
    """
    if not rows:
        raise ValueError(f"{study.folder}: holds no row of the study's cells")
    from megatron_minpro.study.page import PAGE_FILE, write_study_page  # this and matplotlib take long to import
    from megatron_minpro.study.plots import plot_study

    pictures = plot_study(study.folder, study, rows)
    write_tables(study.folder, study, rows, total=total, pictures=pictures)
    write_study_page(study.folder, study, rows, total=total)
    return f"{len(rows)} rows; written to {study.folder}: {PAGE_FILE}, {REPORT_FILE}, table.csv, table.json, {', '.join(pictures)}"


def _describe(row: Row) -> str:
    if row.status == "failed":
        return f"failed: {row.error}"
    measures = row.measures
    held_out = f", pass@1 {measures['pass_at_1_after']:.3f}" if "pass_at_1_after" in measures else ""
    collapsed = ", collapsed" if measures["collapsed"] else ""
    return f"reward {measures['reward_last']:.3f} (best {measures['reward_best']:.3f}){held_out}{collapsed}, {measures['seconds']:.0f} s"


class _View:
    """One line on a terminal that is painted over: what the cells under way do. No thread, since this process is forked."""

    def __init__(self, *, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._shown_at = 0.0
        self._is_shown = False

    def one_more(self) -> float:
        """A cell has ended. The seconds left, by the mean of those that ended in this call."""
        self._done += 1
        return (time.monotonic() - self._began) / self._done * (self._total - self._done)

    def show(self, running: Sequence[Cell]) -> None:
        """Paint the line, once a second at most, on a terminal only."""
        if not sys.stderr.isatty() or time.monotonic() - self._shown_at < 1.0:
            return
        parts = []
        for cell in running:
            progress = read_progress(cell.config.run_dir)
            where = (
                "starting" if progress is None else f"{progress.phase}, {progress.global_step} of {cell.config.num_global_steps} batches"
            )
            parts.append(f"{cell.name}: {where}")
        width = 24
        filled = round(width * self._done / max(1, self._total))
        line = f"[{'#' * filled}{'.' * (width - filled)}] {self._done} of {self._total}: {'; '.join(parts)}"
        # A line that the terminal breaks could not be painted over.
        sys.stderr.write(f"\r\033[K{textwrap.shorten(line, shutil.get_terminal_size().columns - 1, placeholder=' ...')}")
        sys.stderr.flush()
        self._shown_at, self._is_shown = time.monotonic(), True

    def clear(self) -> None:
        """Remove the line."""
        if self._is_shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._is_shown = False


@contextmanager
def _ownership(folder: Path, *, alone: bool) -> Iterator[None]:
    """Only one `minpro study` at a time runs a study's cells, or several array tasks. Raises ValueError when others are at work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: its cells are being run by another process; expected another name of the study") from None
        yield
