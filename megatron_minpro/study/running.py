"""Runs the cells that have no row yet, each by the launcher of `minpro train` in a child process, and writes a row when one ends."""

from __future__ import annotations

import fcntl
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.config import RunConfig, dump_config, load_config
from megatron_minpro.run.ctrl_c import CtrlC
from megatron_minpro.run.preflight import check_run_folder
from megatron_minpro.study import child
from megatron_minpro.study.cells import CELLS_FOLDER, Cell, digest, settings_of
from megatron_minpro.study.rows import Row, append_row, failed_row, finished_row, is_complete
from megatron_minpro.tracking.run_files import CONFIG_FILE, RESULT_FILE
from rollout.processes import ManagedProcess

LOGS_FOLDER = "logs"
BASE_MODEL = "base_model"
_LOOK_EVERY_S = 0.1
_LAST_LINES = 50


class Interrupted(RuntimeError):
    """Ctrl-C: the cells under way have stopped, with checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    cell: Cell
    process: ManagedProcess


def check_folders(cells: Sequence[Cell]) -> None:
    """Whether the cells can be begun or continued in their run folders.

    Raises:
        ValueError: a folder belongs to another configuration; names the folder and what differs.
    """
    for cell in cells:
        check_run_folder(cell.config, resume="auto")
        path = cell.config.run_dir / CONFIG_FILE
        if is_complete(cell.config.run_dir) and digest(settings_of(load_config(path))) != cell.digest:
            raise ValueError(f"{path}: a complete run of another configuration; expected that of {cell.name}, or no such folder")


def collect(cells: Sequence[Cell], folder: Path) -> list[Row]:
    """Rows of the cells whose run is complete, though nobody has written them: jobs of a cluster, or a study that was killed just then.

    Raises:
        ValueError: as `check_folders`.
    """
    complete = [cell for cell in cells if is_complete(cell.config.run_dir)]
    check_folders(complete)
    rows = [finished_row(cell) for cell in complete]
    for row in rows:
        append_row(folder, row)
    return rows


def make_base_models(configs: Sequence[RunConfig], *, folder: Path, preloaded: bool) -> None:
    """Make every model.path that does not exist, one after the other.

    Args:
        configs: of the cells.
        folder: of the study.
        preloaded: fork this process.

    Raises:
        RuntimeError: one could not be made; with its error.
        Interrupted: after Ctrl-C.
    """
    makers = {config.model.path: config for config in configs}
    for number, config in enumerate(makers.values(), start=1):
        maker = config.model_copy(update={"name": BASE_MODEL if len(makers) == 1 else f"{BASE_MODEL}_{number}"})
        with _one_at_a_time(folder), CtrlC() as ctrl_c:
            if Path(config.model.path).exists():
                continue
            process = _start(maker, "base_model", folder=folder, preloaded=preloaded)
            try:
                while process.is_running:
                    if ctrl_c.times:
                        process.popen.send_signal(signal.SIGINT)
                        raise Interrupted("interrupted; the same command continues")
                    time.sleep(_LOOK_EVERY_S)
            finally:
                process.terminate()
            if process.exit_code:
                raise RuntimeError(_last_words(process))
            shutil.rmtree(maker.run_dir)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Array tasks of one study wait here for each other."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{BASE_MODEL}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_cells(
    cells: Sequence[Cell],
    *,
    folder: Path,
    jobs: int,
    delete_runs: bool,
    preloaded: bool,
    place: Callable[[RunConfig], RunConfig],
    watch: Callable[[Sequence[Cell]], None],
    stop_file: Path | None,
    ended: Callable[[Row], None],
    say: Callable[[str], None],
) -> None:
    """Run all of them, `jobs` at a time, in order. Their base models are there.

    Args:
        cells: without a row.
        folder: of the study.
        jobs: cells that run at the same time.
        delete_runs: remove a run folder once its row is on disk.
        preloaded: fork this process, which has called `child.preload`.
        place: what is started in place of a cell's configuration; it differs in the servers at most.
        watch: told of the cells under way, several times a second.
        stop_file: its appearance asks for the same as Ctrl-C; None: nothing does.
        ended: told of every new row.
        say: takes lines for people.

    Raises:
        Interrupted: after Ctrl-C, SIGTERM, or when the stop file is there.
    """
    waiting, running = deque(cells), list[_Running]()
    with CtrlC() as ctrl_c:
        forwarded = 0
        try:
            while running or (waiting and not ctrl_c.times):
                if stop_file is not None and stop_file.exists() and not ctrl_c.times:
                    ctrl_c.times = 1
                while waiting and not ctrl_c.times and len(running) < jobs:
                    cell = waiting.popleft()
                    process = _start(place(cell.config), "train", folder=folder, preloaded=preloaded)
                    running.append(_Running(cell=cell, process=process))
                if ctrl_c.times > forwarded:
                    say("stopping the cells under way with checkpoints (Ctrl-C again: at once, without)")
                    forwarded = ctrl_c.times
                    for each in running:
                        each.process.popen.send_signal(signal.SIGINT)
                for each in [each for each in running if not each.process.is_running]:
                    running.remove(each)
                    row = _row_of(each, interrupted=ctrl_c.times > 0)
                    if row is None:
                        say(f"{each.cell.name}: stopped before its end; the same command continues it")
                        continue
                    append_row(folder, row)
                    if delete_runs and row.status == "ok":
                        shutil.rmtree(each.cell.config.run_dir)
                    ended(row)
                watch([each.cell for each in running])
                time.sleep(_LOOK_EVERY_S)
        finally:
            for each in running:
                each.process.terminate()
        if ctrl_c.times:
            raise Interrupted("interrupted; the same command continues")


def write_config(config: RunConfig, folder: Path) -> Path:
    """Write a run's configuration beside its run folder in the study's folder; returns the path."""
    path = folder / CELLS_FOLDER / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_config(config))
    return path


def _start(config: RunConfig, task: child.Task, *, folder: Path, preloaded: bool) -> ManagedProcess:
    path = write_config(config, folder)
    return child.start(path, task, log_path=folder / LOGS_FOLDER / f"{config.name}.log", preloaded=preloaded)


def _row_of(ended: _Running, *, interrupted: bool) -> Row | None:
    """The row of a cell whose process has ended; None for one that was stopped before its end."""
    process, cell = ended.process, ended.cell
    process.terminate()  # sweeps up what is left of its tree
    if process.exit_code == 0:
        return finished_row(cell)
    stopped = process.exit_code == 1 and (cell.config.run_dir / RESULT_FILE).exists()  # with a checkpoint: somebody asked for it
    return None if interrupted or stopped else failed_row(cell, _last_words(process))


def _last_words(process: ManagedProcess) -> str:
    """Why a process failed, in one line."""
    lines = process.last_log_lines(_LAST_LINES)
    errors = [line.removeprefix(child.ERROR) for line in lines if line.startswith(child.ERROR)]
    said = errors[-1] if errors else " ".join(lines[-1:]) or "nothing in its log"
    code = process.exit_code or 0
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{said.strip()} ({how}; log: {process.log_path})"
