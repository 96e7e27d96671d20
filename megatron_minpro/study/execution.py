"""One call of `minpro study`: checks, the cells that are left, the report after each."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_minpro.run.preflight import check_dry_run
from megatron_minpro.run.ranks import are_forked
from megatron_minpro.study import child
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.definition import Study
from megatron_minpro.study.rows import Row
from megatron_minpro.study.running import LOGS_FOLDER, check_folders, make_base_models, run_cells
from megatron_minpro.study.shared_servers import SharedServers
from megatron_minpro.study.tables import REPORT_FILE, write_tables
from parallel.capabilities import detect

LOCK_FILE = "lock"


def check_cells(cells: Sequence[Cell]) -> list[str]:
    """Everything that `minpro train --dry-run` checks, once for all cells that differ in the seed alone.

    Returns:
        What could not be checked here, one line each.

    Raises:
        ValueError: the first thing that is wrong, in one line.
    """
    capabilities = detect()
    not_checked: dict[str, None] = {}
    groups = {tuple(cell.levels.values()): cell for cell in reversed(cells)}
    for cell in reversed(groups.values()):
        found = check_dry_run(cell.config, resume="auto", capabilities=capabilities)
        not_checked |= dict.fromkeys(found.not_checked)
    check_folders(cells)
    return list(not_checked)


def run_study(
    study: Study,
    cells: Sequence[Cell],
    todo: Sequence[Cell],
    rows: Mapping[str, Row],
    *,
    jobs: int,
    delete_runs: bool,
    shared: bool,
    say: Callable[[str], None],
) -> None:
    """Run the cells that are left, and write the report after each.

    Args:
        study: its definition.
        cells: all of them.
        todo: those to run.
        rows: cell -> row, before this call.
        jobs: cells that run at the same time.
        delete_runs: remove a run folder once its row is on disk.
        shared: the cells use the same servers, one cell at a time.
        say: takes lines for people.

    Raises:
        ValueError: another process runs this study.
        Interrupted: after Ctrl-C.
    """
    folder, known = study.folder, dict(rows)
    began, done = time.monotonic(), 0

    def ended(row: Row) -> None:
        nonlocal done
        known[row.cell] = row
        done += 1
        left = (time.monotonic() - began) / done * (len(todo) - done)
        say(f"{len(known)} of {len(cells)}: {row.cell}: {_describe(row)}; about {duration(left)} left")
        write_tables(folder, study, known, total=len(cells))

    with _ownership(folder):
        say(f"{len(cells)} cells, {len(cells) - len(todo)} have a row; {len(todo)} to run in {folder}")
        capabilities = detect()
        if preloaded := all(are_forked(cell.config, capabilities) for cell in todo):
            child.preload()
        make_base_models([cell.config for cell in todo], folder=folder, preloaded=preloaded)
        with SharedServers(folder / LOGS_FOLDER, say) as servers:
            run_cells(
                todo,
                folder=folder,
                jobs=jobs,
                delete_runs=delete_runs,
                preloaded=preloaded,
                place=servers.place if shared else lambda config: config,
                ended=ended,
                say=say,
            )
    say(report(study, known, total=len(cells)))


def report(study: Study, rows: Mapping[str, Row], *, total: int) -> str:
    """Write tables and plots; returns one line that says where. total: cells of the study.

    Raises ValueError when there is no row.
    """
    if not rows:
        raise ValueError(f"{study.folder}: holds no row of the study's cells")
    from megatron_minpro.study.plots import plot_study  # matplotlib takes long to import

    pictures = plot_study(study.folder, study, rows)
    write_tables(study.folder, study, rows, total=total, pictures=pictures)
    return f"{len(rows)} rows; written to {study.folder}: {REPORT_FILE}, table.csv, table.json, {', '.join(pictures)}"


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _describe(row: Row) -> str:
    if row.status == "failed":
        return f"failed: {row.error}"
    measures = row.measures
    held_out = f", pass@1 {measures['pass_at_1_after']:.3f}" if "pass_at_1_after" in measures else ""
    collapsed = ", collapsed" if measures["collapsed"] else ""
    seconds = f", {measures['seconds']:.0f} s" if "seconds" in measures else ""
    return f"reward {measures['reward_last']:.3f} (best {measures['reward_best']:.3f}){held_out}{collapsed}{seconds}"


@contextmanager
def _ownership(folder: Path) -> Iterator[None]:
    """Only one `minpro study` at a time runs a study's cells. Raises ValueError when another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: its cells are being run by another process; expected another name of the study") from None
        yield
